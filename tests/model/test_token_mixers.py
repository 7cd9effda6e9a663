"""A kind of layer is one class and one line: a toy with a state and a section of its own, in a whole model."""

import pickle

import pytest
import torch
from support.model_cases import ATOL, JET, WINDOW, padded, small_config, tokens
from torch import Tensor, nn

from jetkernels.cli import memory
from jetkernels.model import JetNemotronConfig, JetNemotronForCausalLM
from jetkernels.model.attention import Attention
from jetkernels.model.mixers import MIXERS
from jetkernels.model.token_mixer import TokenMixer
from jetkernels.modules import JetBlock
from jetkernels.modules.initialization import init_weight_

SECTIONS = {"jet": JET, "swa": {"window_size": WINDOW}, "mean": {"decay": 0.9}}


class DecayedSum(TokenMixer):
    """y_t = W s_t,  s_t = decay s_{t-1} + x_t."""

    def __init__(self, config, *, device=None, dtype=None):
        super().__init__()
        self.decay = config.section("mean")["decay"]
        self.initializer_range = config.initializer_range
        self.proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False, device=device, dtype=dtype)
        self.reset_parameters()

    @classmethod
    def sizes(cls, config):
        decay = config.section("mean").get("decay")
        if not isinstance(decay, float) or not 0 < decay <= 1:
            raise ValueError(f"config: efficient_attention_config.mean.decay must be in (0, 1], got {decay!r}")
        return {"hidden_size": config.hidden_size}

    @classmethod
    def initial_state(cls, config, batch_size, max_length, *, device=None, dtype=None):
        return [torch.zeros(batch_size, config.hidden_size, device=device, dtype=dtype)]

    def reset_parameters(self):
        init_weight_(self.proj.weight, self.initializer_range)

    def forward(self, hidden_states: Tensor, *, layout, rotary=None, state=None):
        x = layout.pad(hidden_states)
        sums = [x.new_zeros(x.shape[0], x.shape[2]) if state is None else state[0]]
        for t in range(x.shape[1]):
            sums.append(self.decay * sums[-1] + x[:, t])
        after = torch.stack(sums, 1)  # [N, 1 + max_new, C]
        if state is not None:
            state[0].copy_(after[torch.arange(len(layout.new)), torch.tensor(layout.new)])
        return self.proj(layout.unpad(after[:, 1:]))


@pytest.fixture(params=[("mean",), ("jet", "mean", "swa", "attn")], ids="-".join)
def model(request, monkeypatch) -> JetNemotronForCausalLM:
    monkeypatch.setitem(MIXERS, "mean", DecayedSum)
    config = small_config(request.param, efficient_attention_config=SECTIONS)
    return JetNemotronForCausalLM.random(config, seed=1).eval()


def test_a_new_kind_is_trained(model):
    ids = tokens(2, 9)
    model(ids, labels=ids).loss.backward()
    need = {name: p.grad.clone() for name, p in model.named_parameters()}
    assert need.keys() >= {"model.layers.0.mlp.up_proj.weight", "model.embed_tokens.weight"}
    assert any(name.endswith("self_attn.proj.weight") and grad.any() for name, grad in need.items())
    model.zero_grad()
    model.model.recompute_layers = True
    model(ids, labels=ids).loss.backward()
    assert all(torch.equal(p.grad, need[name]) for name, p in model.named_parameters())


@torch.no_grad()
def test_a_new_kind_decodes_as_it_prefills(model):
    ids, mask = padded([tokens(12), tokens(5), tokens(9)], left=True)
    need, cache = model(ids, mask).logits, model.new_cache(3, 20)
    parts = [model(ids[:, a:b], mask[:, a:b], cache).logits for a, b in ((0, 7), (7, 8), (8, 12))]
    torch.testing.assert_close(torch.cat(parts, 1), need, rtol=0, atol=ATOL)
    assert torch.equal(model.generate(ids, mask, 6), model.generate(ids, mask, 6, prefill_chunk=5))
    assert cache.nbytes == memory.cache_bytes(model.config, torch.float32, 3, 20)
    assert sum(p.numel() for p in model.parameters()) == memory.parameter_count(model.config)
    cache.reset()
    assert not any(t.any() for t in cache.tensors()) and cache.lengths == [0, 0, 0]


def test_a_new_kind_is_saved_and_loaded(model, tmp_path):
    model.save_pretrained(tmp_path / "m")
    again, ids = JetNemotronForCausalLM.from_pretrained(tmp_path / "m"), tokens(2, 7)
    assert again.config == model.config and torch.equal(again(ids).logits, model(ids).logits)


@pytest.mark.parametrize(
    ("section", "sentence"),
    [({}, "efficient_attention_config.mean is needed by a mean layer"), ({"mean": {"decay": 2.0}}, "got 2.0")],
)
def test_a_new_kind_checks_its_section(monkeypatch, section, sentence):
    values = small_config(("attn",)).to_dict() | {"layer_types": ["mean"], "efficient_attention_config": section}
    with pytest.raises(ValueError, match=r"layer_types\[0\] must be one of .*, got 'mean'"):
        JetNemotronConfig.from_dict(values)
    monkeypatch.setitem(MIXERS, "mean", DecayedSum)
    with pytest.raises(ValueError, match=sentence):
        JetNemotronConfig.from_dict(values)


def test_a_cache_of_another_kind_is_refused(model):
    other = JetNemotronForCausalLM.random(small_config(("attn",) * len(model.config.layer_types)))
    with pytest.raises(ValueError, match="cache must be of this model: it was made for layer_types"):
        model(tokens(1, 2), cache=other.new_cache(1, 4))


def test_a_model_with_other_mixers_shares_the_rest(model):
    ids, mixers = tokens(1, 5), [DecayedSum(model.config) for _ in model.config.layer_types]
    before = model(ids).logits
    other = model.with_mixers(model.config, mixers)
    assert [layer.self_attn for layer in other.model.layers] == mixers and other.model.layers[
        0
    ].mlp is model.model.layers[0].mlp
    assert not torch.equal(other(ids).logits, before) and torch.equal(model(ids).logits, before)
    with pytest.raises(ValueError, match="zip"):
        model.with_mixers(model.config, [])


# ---- models made or changed elsewhere


def test_a_model_pickled_when_layers_knew_their_kind_decodes_as_before():
    """Its mixers are of the classes that the kinds had in common: Attention for both attentions, JetBlock."""
    model = JetNemotronForCausalLM.random(small_config(("jet", "swa", "attn")), seed=1).eval()
    wanted = model.generate(tokens(2, 9), max_new_tokens=12)
    for layer, kind in zip(model.model.layers, model.config.layer_types):
        layer.self_attn.__class__ = JetBlock if kind == "jet" else Attention
        layer.kind = kind
    again = pickle.loads(pickle.dumps(model))
    assert [type(layer.self_attn) for layer in again.model.layers] == [MIXERS[k] for k in model.config.layer_types]
    assert torch.equal(again.generate(tokens(2, 9), max_new_tokens=12), wanted)


def test_a_model_pickled_when_one_file_had_all_its_classes_is_read():
    model = JetNemotronForCausalLM.random(small_config(("jet", "swa", "attn")), seed=1).eval()
    written = pickle.dumps(model, protocol=0)  # names of modules in lines of their own
    for name in (b"network", b"decoder_layer"):
        assert b"jetkernels.model." + name in written
        written = written.replace(b"cjetkernels.model." + name, b"cjetkernels.model.hybrid")
    assert torch.equal(pickle.loads(written)(tokens(2, 9)).logits, model(tokens(2, 9)).logits)


def test_a_wrapped_mixer_is_called():
    class Wrapper(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner, self.calls = inner, 0

        def forward(self, *args, **kwargs):
            self.calls += 1
            return self.inner(*args, **kwargs)

    model = JetNemotronForCausalLM.random(small_config(("jet", "swa", "attn")), seed=1).eval()
    wanted = model.generate(tokens(2, 9), max_new_tokens=5)
    for layer in model.model.layers:
        layer.self_attn = Wrapper(layer.self_attn)
    assert torch.equal(model.generate(tokens(2, 9), max_new_tokens=5), wanted)
    assert all(layer.self_attn.calls for layer in model.model.layers)
