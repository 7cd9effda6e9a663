"""A decode step: a function of tensors on the device, equal to the forward of the whole sequence."""

import contextlib
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.model_cases import ATOL, VOCAB, padded, small_model, tokens
from torch.utils._python_dispatch import TorchDispatchMode

from jetkernels.model import JetNemotronForCausalLM, generation

READS_ON_THE_HOST = (
    "_local_scalar_dense",
    "item",
    "nonzero",
    "is_nonzero",
    "equal",
    "masked_select",
    "unique",
    "_unique2",
)
VIEWS = (
    "view",
    "split",
    "split_with_sizes",
    "slice",
    "select",
    "unsqueeze",
    "squeeze",
    "expand",
    "t",
    "transpose",
    "_unsafe_view",
    "as_strided",
    "detach",
    "alias",
    "unflatten",
    "reshape",
    "permute",
    "unbind",
    "chunk",
)
# Kernels that an op launches on a GPU, where it is not one.
LAUNCHES = {"jet_block_step": 3, "attention_step": 2}


class Ops(TorchDispatchMode):
    """What is dispatched, views aside; refuses what reads a value."""

    def __init__(self):
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        assert name not in READS_ON_THE_HOST, f"{func} reads a value on the host"
        if name not in VIEWS:
            self.names.append(name)
        result = func(*args, **(kwargs or {}))
        devices = {
            x.device for x in torch.utils._pytree.tree_leaves((args, kwargs, result)) if isinstance(x, torch.Tensor)
        }
        assert len(devices) <= 1, f"{func} has tensors on {devices}"
        return result

    @property
    def launches(self) -> int:
        return sum(LAUNCHES.get(name, 1) for name in self.names)


@contextlib.contextmanager
def nothing_read_on_the_host(monkeypatch):
    """Refuses all ways from a tensor to a Python number."""

    def refuse(*_, **__):
        raise AssertionError("a value was read on the host")

    with monkeypatch.context() as patch, Ops() as ops:
        for name in ("item", "tolist", "numpy", "__bool__", "__int__", "__float__", "__index__", "nonzero"):
            patch.setattr(torch.Tensor, name, refuse)
        yield ops


def prefilled(model, lengths, room=8):
    """A cache after prompts of these lengths, and the prompts."""
    rows = [tokens(length, seed=n) for n, length in enumerate(lengths)]
    ids, mask = padded(rows, left=True)
    cache = model.new_cache(len(lengths), max(lengths) + room)
    generation.prefill(model, ids, mask, cache)
    return cache, rows


@pytest.fixture(scope="module")
def model():
    return small_model(seed=4)


@given(lengths=st.lists(st.integers(1, 12), min_size=1, max_size=4), seed=st.integers(0, 9))
@settings(max_examples=15, deadline=None)
@torch.no_grad()
def test_ragged_steps_equal_the_whole_sequence(model, lengths, seed):
    cache, rows = prefilled(model, lengths)
    for i in range(6):
        new = tokens(len(lengths), seed=seed + i)
        logits = model.step(new, cache)
        assert logits.shape == (len(lengths), VOCAB)
        rows = [torch.cat((row, token[None])) for row, token in zip(rows, new)]
        for n, row in enumerate(rows):
            torch.testing.assert_close(logits[n], model(row[None]).logits[0, -1], atol=ATOL, rtol=ATOL)
    assert cache.lengths == [length + 6 for length in lengths] == cache.lengths_device.tolist()


@torch.no_grad()
def test_a_forward_of_one_token_is_a_step(model):
    (cache, _), (again, _) = prefilled(model, [3, 5]), prefilled(model, [3, 5])
    new = tokens(2)
    out = model(new[:, None], cache=cache)
    assert out.logits.shape == (2, 1, VOCAB) and out.cache is cache
    assert torch.equal(out.logits[:, 0], model.step(new, again))


@pytest.mark.parametrize("lengths", [[6, 6], [2, 9]])
@torch.no_grad()
def test_nothing_is_read_on_the_host(monkeypatch, lengths):
    model = small_model(seed=4)
    cache, _ = prefilled(model, lengths)
    new = tokens(2)
    need = model.step(new, prefilled(model, lengths)[0])
    assert model.has_device_steps
    with nothing_read_on_the_host(monkeypatch):
        logits = model.compute_step(new, cache)
    assert torch.equal(logits, need)


@torch.no_grad()
def test_nothing_is_copied_between_host_and_device():
    # On the meta device there are no values that the host could read, and a tensor of the host fits none of it.
    model = JetNemotronForCausalLM(small_model().config, device="meta")
    cache = model.new_cache(2, 9)
    ids = torch.zeros(2, dtype=torch.int64, device="meta")
    with Ops():
        logits = model.compute_step(ids, cache)
        chosen = generation.choose(logits, 0.8, 7, 0.9, None)
    assert logits.shape == (2, VOCAB) and logits.is_meta and chosen.is_meta


def layer_ops(model, kind: str) -> Ops:
    """What one layer of a kind dispatches in a step."""
    i = model.config.layer_types.index(kind)
    cache, _ = prefilled(model, [4, 4])
    h = torch.randn(2, model.config.hidden_size)
    rotary = torch.randn(2, 2, model.config.head_size).unbind()
    with Ops() as ops:
        model.model.layers[i].step(h, h, cache.layers[i], lengths=cache.lengths_device, rotary=rotary)
    return ops


@pytest.mark.parametrize("kind", ["jet", "attn", "swa"])
@torch.no_grad()
def test_at_most_ten_launches_a_layer(kind):
    ops = layer_ops(small_model(seed=4), kind)
    assert ops.launches <= 10, ops.names


def unfused(model):
    """The same model with a hook, which does nothing, on every Linear."""
    for module in model.modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_hook(lambda *_: None)
    return model


@torch.no_grad()
def test_logits_equal_those_of_the_unfused_model(model):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        other = unfused(small_model(seed=4))
        (cache, _), (other_cache, _) = prefilled(model, [3, 7, 1]), prefilled(other, [3, 7, 1])
        for i in range(5):
            new = tokens(3, seed=i)
            torch.testing.assert_close(model.step(new, cache), other.step(new, other_cache), atol=1e-5, rtol=1e-5)
        ids = torch.stack([tokens(11, seed=n) for n in range(2)])
        torch.testing.assert_close(model(ids).logits, other(ids).logits, atol=1e-5, rtol=1e-5)
    assert "jet_block_step" in layer_ops(model, "jet").names


@torch.no_grad()
def test_layers_that_are_called_take_part_in_a_step(monkeypatch):
    need_model, model = small_model(seed=4), small_model(seed=4)
    seen = []
    model.model.layers[0].register_forward_hook(lambda *_: seen.append("layer"))
    model.model.layers[1].self_attn.register_forward_hook(lambda *_: seen.append("mixer"))
    model.model.layers[2].mlp.register_forward_hook(lambda *_: seen.append("mlp"))
    model.model.layers[3].post_attention_layernorm.register_forward_hook(lambda *_: seen.append("norm"))
    assert not model.has_device_steps and need_model.has_device_steps
    (cache, _), (need_cache, _) = prefilled(model, [4, 2]), prefilled(need_model, [4, 2])
    seen.clear()
    new = tokens(2)
    torch.testing.assert_close(model.step(new, cache), need_model.step(new, need_cache), atol=ATOL, rtol=ATOL)
    assert seen == ["layer", "mixer", "mlp", "norm"]
    ids = tokens(2, 5)
    assert torch.equal(model.generate(ids, max_new_tokens=6), need_model.generate(ids, max_new_tokens=6))


class Foreign(torch.nn.Module):
    """A Linear of somebody else, who may read on the host."""

    def __init__(self, linear):
        super().__init__()
        self.linear = linear

    def forward(self, x):
        return self.linear(x)


@pytest.mark.parametrize("name", ["model.embed_tokens", "model.norm", "model.layers.0.self_attn.o_norm"])
def test_a_hook_anywhere_is_called_at_every_step(name):
    """So a graph, which would call it once, does not stand for the steps."""
    model, seen = small_model(seed=4), []
    need = model.generate(tokens(1, 3), max_new_tokens=12, stop_token_ids=())
    model.get_submodule(name).register_forward_hook(lambda *_: seen.append(1))
    assert not model.has_device_steps
    assert torch.equal(model.generate(tokens(1, 3), max_new_tokens=12, stop_token_ids=()), need)
    assert len(seen) == 12


def test_modules_of_others_are_not_captured():
    model = small_model(seed=4)
    model.model.layers[0].mlp.down_proj = Foreign(model.model.layers[0].mlp.down_proj)
    assert not model.has_device_steps


@torch.no_grad()
def test_wrong_steps_are_refused(model):
    cache, _ = prefilled(model, [3, 3], room=1)
    for wrong, message in (
        (tokens(2, 1), r"^tokens must be a tensor \[N\], got \[2, 1\]$"),
        (tokens(3), "^cache: holds 2 sequences, got 3$"),
        (torch.tensor([0, VOCAB]), f"^input_ids must be in 0..{VOCAB - 1}, got {VOCAB}$"),
        ([1, 2], r"^tokens must be a tensor \[N\], got list$"),
    ):
        with pytest.raises(ValueError, match=message):
            model.step(wrong, cache)
    model.step(tokens(2), cache)
    with pytest.raises(ValueError, match="^cache: max_length = 4 must hold the 4 \\+ 1 tokens of sequence 0$"):
        model.step(tokens(2), cache)
    with pytest.raises(ValueError, match="^cache must be a JetNemotronCache"):
        model.step(tokens(2), None)


OPTIONS = [{}, {"temperature": 0.8}, {"temperature": 1.3, "top_k": 7, "top_p": 0.9}]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("lengths", [[5, 5, 5], [1, 9, 4]])
def test_capture_changes_no_token(model, options, lengths):
    ids, mask = padded([tokens(length, seed=n) for n, length in enumerate(lengths)], left=False)
    runs = []
    for capture in (True, False):
        generator = torch.Generator().manual_seed(3)
        runs.append(model.generate(ids, mask, 20, capture=capture, generator=generator, **options))
    assert torch.equal(*runs)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("lengths", [[5, 5, 5], [1, 9, 4]])
def test_capture_changes_no_token_on_a_gpu(options, lengths):
    model = small_model(seed=4).cuda()
    ids, mask = (t.cuda() for t in padded([tokens(length, seed=n) for n, length in enumerate(lengths)], left=False))
    runs = []
    for capture in (True, False):
        generator = torch.Generator("cuda").manual_seed(3)
        runs.append(model.generate(ids, mask, 20, capture=capture, generator=generator, **options))
    assert torch.equal(*runs)
