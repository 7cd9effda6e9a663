"""What stands for the call of a module, a step or a fused op, gives way wherever that call does anything else."""

import warnings

import pytest
import torch
from support.model_cases import ATOL, VOCAB, small_model, tokens
from torch import nn

from jetkernels.model import CausalLMOutput, JetNemotronForCausalLM
from jetkernels.model.attention import Attention
from jetkernels.model.decoder_layer import MLP, DecoderLayer
from jetkernels.model.mixers import JetMixer
from jetkernels.model.network import JetNemotronModel
from jetkernels.modules import DynamicShortConvolution, GatedRMSNorm, JetBlock, KernelGenerator, RMSNorm
from jetkernels.modules.stand_in import may_step

# A module of each class whose call something stands for, or that a captured step would not call again.
PLACES = {
    "": JetNemotronForCausalLM,
    "model": JetNemotronModel,
    "model.layers.2": DecoderLayer,
    "model.layers.0.self_attn": JetMixer,
    "model.layers.3.self_attn": Attention,
    "model.layers.2.self_attn.dynamic_conv1d": DynamicShortConvolution,
    "model.layers.2.self_attn.dynamic_conv1d.kernel_generator": KernelGenerator,
    "model.layers.2.self_attn.o_norm": GatedRMSNorm,
    "model.layers.1.post_attention_layernorm": RMSNorm,
    "model.layers.1.mlp": MLP,
}


@pytest.fixture(autouse=True)
def quiet():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def changed(output):
    """The first, or only, tensor of an output half as large again."""
    if isinstance(output, CausalLMOutput):
        return CausalLMOutput(logits=output.logits * 1.5, cache=output.cache)
    return (output[0] * 1.5, *output[1:]) if isinstance(output, tuple) else output * 1.5


def changed_forward(forward):
    return lambda *args, **options: changed(forward(*args, **options))


def by_a_hook(module, cls, monkeypatch):
    module.register_forward_hook(lambda module, args, output: changed(output))


def on_the_object(module, cls, monkeypatch):
    module.forward = changed_forward(module.forward)


def by_a_subclass(module, cls, monkeypatch):
    module.__class__ = type("Changed", (cls,), {"forward": changed_forward(cls.forward)})


def on_the_class(module, cls, monkeypatch):
    monkeypatch.setattr(cls, "forward", changed_forward(cls.forward))


def by_a_younger_subclass(module, cls, monkeypatch):
    """As torch makes one for a parametrization or for FSDP, of a class that had been changed before."""
    on_the_class(module, cls, monkeypatch)
    module.__class__ = type("Younger", (cls,), {})


@torch.no_grad()
def check_steps(model):
    """Steps of either kind equal the forward of the whole sequence, in which every module is called."""
    ids = tokens(2, 6)
    need = model(ids).logits
    caches = [model.new_cache(2, 6) for _ in range(2)]
    for cache in caches:
        got = model(ids[:, :4], cache=cache).logits
        torch.testing.assert_close(got, need[:, :4], atol=ATOL, rtol=ATOL)
    for t in range(4, 6):
        got = model.step(ids[:, t], caches[0]), model(ids[:, t : t + 1], cache=caches[1]).logits[:, 0]
        for logits in got:
            torch.testing.assert_close(logits, need[:, t], atol=ATOL, rtol=ATOL)
    out = model.generate(ids, max_new_tokens=3, stop_token_ids=())
    for t in range(6, 9):
        assert torch.equal(out[:, t], model(out[:, :t]).logits[:, -1].argmax(-1))
    return need


@pytest.mark.parametrize("change", [by_a_hook, on_the_object, by_a_subclass, on_the_class, by_a_younger_subclass])
def test_whatever_changes_a_call_changes_the_steps(change, monkeypatch):
    plain = small_model(seed=4)
    before = check_steps(plain)
    assert plain.has_device_steps
    for name, cls in PLACES.items():
        model = small_model(seed=4)
        module = model.get_submodule(name)
        assert type(module) is cls
        with monkeypatch.context() as patch:
            change(module, cls, patch)
            assert not model.has_device_steps, name
            assert (check_steps(model) - before).abs().max() > 1e-3, name
    assert plain.has_device_steps


@pytest.mark.parametrize("cls", [JetBlock, Attention, nn.Embedding])
def test_a_changed_class_changes_those_derived_from_it(cls, monkeypatch):
    """JetMixer calls the forward of JetBlock, SlidingWindowAttention has that of Attention."""
    model = small_model("jet", "swa", seed=4)
    before = check_steps(model)
    monkeypatch.setattr(cls, "forward", changed_forward(cls.forward))
    assert not model.has_device_steps
    assert (check_steps(model) - before).abs().max() > 1e-3


def test_the_step_of_a_subclass_is_its_own_where_its_forward_is_no_newer():
    forward, step = changed_forward(Attention.forward), changed_forward(Attention.step)
    for names, may in (
        ({}, True),
        ({"step": step}, True),
        ({"forward": forward}, False),
        ({"forward": forward, "step": step}, True),
    ):
        model = small_model(seed=4)
        mixer = model.model.layers[3].self_attn
        mixer.__class__ = type("Derived", (Attention,), names)
        assert may_step(mixer) is may, names
    # Its forward calls the step that it inherits, its step that of Attention: each is changed once.
    check_steps(model)


class Wrapper(nn.Module):
    """A module in the place of another, which it calls and of which it knows nothing."""

    def __init__(self, inner):
        super().__init__()
        self.inner, self.calls = inner, 0

    def forward(self, *args, **options):
        self.calls += 1
        return self.inner(*args, **options)


@pytest.mark.parametrize(
    "names",
    [
        ["model.norm"],
        ["model.embed_tokens"],
        ["model.layers.0", "model.layers.1"],
        ["model.norm", "model.embed_tokens", "lm_head", *(f"model.layers.{i}" for i in range(4))],
        [f"model.layers.0.{name}" for name in ("self_attn", "mlp", "input_layernorm", "post_attention_layernorm")],
    ],
    ids=" ".join,
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_wrappers_are_called_in_every_place(names, dtype):
    model = small_model(seed=4, dtype=dtype, tie_word_embeddings=False)
    need = check_steps(model)
    for name in names:
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, Wrapper(model.get_submodule(name)))
    assert (model.dtype, model.device) == (dtype, torch.device("cpu")) and not model.has_device_steps
    torch.testing.assert_close(check_steps(model), need, atol=ATOL, rtol=ATOL)
    # A whole sequence, two prefills, four steps; then a prompt, two steps, and three whole sequences.
    assert {model.get_submodule(name).calls for name in names} == {13}


def test_a_wrapper_round_an_offloaded_embedding_says_where_it_computes():
    model = small_model(tie_word_embeddings=False).to("meta")
    model.model.embed_tokens._hf_hook = type("Hook", (), {"execution_device": "cpu"})()
    model.model.embed_tokens = Wrapper(model.model.embed_tokens)
    assert model.device == torch.device("cpu")


def test_what_a_wrapper_hides_is_named():
    model = small_model()
    model.model.embed_tokens = Wrapper(model.model.embed_tokens)
    with pytest.raises(RuntimeError, match=r"embed_tokens, whose weight must be a tensor on cpu, got NoneType"):
        model(tokens(1, 2))
    model.model.embed_tokens = model.model.norm = nn.Identity()
    model.model.layers[1] = Wrapper(model.model.layers[1])
    with pytest.raises(ValueError, match=r"^layers\[1\] must have a self_attn to be replaced, got Wrapper$"):
        model.with_mixers(model.config, [nn.Identity()] * 4)
    with pytest.raises(RuntimeError, match="^one of Identity, Identity must have a floating weight"):
        model.new_cache(1, 2)


# ---- dtypes


class Wide(nn.Module):
    """A Linear whose result is fp32, as that of an adapter with fp32 weights."""

    def __init__(self, base):
        super().__init__()
        self.base = base

    def forward(self, x):
        return self.base(x).float()


@pytest.mark.parametrize("name", ["0.self_attn.g_proj", "0.self_attn.a_proj", "0.self_attn.b_proj"])
def test_a_wider_gate_of_a_jet_layer(name):
    check_wide_projection(name)


@pytest.mark.parametrize("name", ["1.self_attn.k_proj", "1.self_attn.v_proj", "3.self_attn.k_proj"])
def test_wider_keys_and_values(name):
    check_wide_projection(name)


@torch.no_grad()
def check_wide_projection(name):
    """bf16 steps are as near to the fp64 model as the bf16 forward of the whole sequence is."""
    model, exact = small_model(seed=4, dtype=torch.bfloat16), small_model(seed=4, dtype=torch.bfloat16).double()
    parent, _, leaf = f"model.layers.{name}".rpartition(".")
    setattr(model.get_submodule(parent), leaf, Wide(model.get_submodule(f"model.layers.{name}")))
    ids = tokens(2, 7)
    need, whole, cache = exact(ids).logits, model(ids).logits.double(), model.new_cache(2, 7)
    parts = [model(ids[:, :3], cache=cache).logits, *(model.step(token, cache)[:, None] for token in ids[:, 3:].mT)]
    assert (torch.cat(parts, 1) - need).norm() < 1.5 * (whole - need).norm() < 0.03 * need.norm()


@pytest.mark.parametrize("kinds", [("attn",), ("swa", "jet")])
@torch.no_grad()
def test_a_cache_of_another_dtype_or_device_is_refused_before_anything_is_computed(kinds):
    model, ids = small_model(*kinds), tokens(2, 4)
    cache, other = model.new_cache(2, 4), small_model(*kinds).to("meta").new_cache(2, 4)
    model.double()
    calls = (
        lambda c: model(ids, cache=c),
        lambda c: model(ids[:, :1], cache=c),
        lambda c: model.step(ids[:, 0], c),
    )
    for wrong, message in (
        (cache, "^cache must be of torch.float64, like the model, got torch.float32$"),
        (other, "^cache must be on cpu, like the model, got meta$"),
    ):
        for call in calls:
            with pytest.raises(ValueError, match=message):
                call(wrong)
    assert not any(t.any() for t in cache.tensors())
    model.float()
    torch.testing.assert_close(model(ids, cache=cache).logits, model(ids).logits, atol=ATOL, rtol=0)


@pytest.mark.parametrize("dtype, autocast", [(torch.bfloat16, torch.float16), (torch.float16, torch.bfloat16)])
@pytest.mark.parametrize("sizes", [[3, 4], [7, 2, 1], [1] * 8], ids=str)
@torch.no_grad()
def test_autocast_to_the_other_narrow_dtype(dtype, autocast, sizes):
    """The cache has the model's dtype, the activations that of autocast."""
    model, exact = small_model(seed=4, dtype=dtype), small_model(seed=4, dtype=dtype).double()
    ids = tokens(2, sum(sizes))
    cache, need = model.new_cache(2, sum(sizes)), exact(ids).logits
    with torch.autocast("cpu", autocast):
        whole = model(ids).logits.double()
        got = torch.cat([model(part, cache=cache).logits for part in ids.split(sizes, 1)], 1)
    assert got.dtype == autocast and got.shape == (2, sum(sizes), VOCAB)
    for logits in (whole, got):
        assert (logits - need).norm() < 4 * torch.finfo(torch.bfloat16).eps * need.norm()
