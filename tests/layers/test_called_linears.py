"""A Linear that is used is called: adapters, hooks, pruning, parametrizations and quantisation of any projection have
their effect.
"""

import copy
import warnings

import pytest
import torch
from support.model_cases import VOCAB, boundaries, small_block, small_model, tokens
from torch import nn
from torch.nn.utils import parametrizations, prune

from jetkernels.modules import JetBlock, linear
from reference.jet_block import jet_block

W2 = "dynamic_conv1d.kernel_generator.w2"
PROJECTIONS = [f"{n}_proj" for n in "qkvgoab"] + ["dynamic_conv1d.kernel_generator.w1", W2]
# Unfused, the taps are rounded once more.
ATOL = 1e-10


class Adapter(nn.Module):
    """A low-rank addition to a Linear, as peft wraps one."""

    def __init__(self, base: nn.Linear):
        super().__init__()
        self.base_layer = base
        generator = torch.Generator().manual_seed(5)
        dtype = base.weight.dtype
        self.A = nn.Parameter(torch.randn(3, base.in_features, generator=generator).to(dtype) * 0.3)
        self.B = nn.Parameter(torch.randn(base.out_features, 3, generator=generator).to(dtype) * 0.3)

    weight = property(lambda self: self.base_layer.weight)
    bias = property(lambda self: self.base_layer.bias)

    def forward(self, x):
        return self.base_layer(x) + x @ self.A.mT @ self.B.mT


def replace(module: nn.Module, name: str, make) -> None:
    parent, _, leaf = name.rpartition(".")
    parent = module.get_submodule(parent)
    setattr(parent, leaf, make(getattr(parent, leaf)))


def merged(block: JetBlock, name: str) -> JetBlock:
    """The same layer with the adapter added into the weight."""
    merged = copy.deepcopy(block)

    def make(adapter):
        with torch.no_grad():
            adapter.base_layer.weight += adapter.B @ adapter.A
        return adapter.base_layer

    replace(merged, name, make)
    return merged


def calls(x):
    """Ways to run a block over x [2, 9, C], all giving the same: in one call, packed, in pieces, token by token."""

    def pieces(*sizes):
        def run(block):
            state = block.new_state(2)
            with torch.no_grad():
                return torch.cat([block(part, state=state) for part in x.split(sizes, 1)], 1)

        return run

    yield lambda block: block(x)
    yield lambda block: block(x.reshape(1, 18, -1), cu_seqlens=boundaries([9, 9])).reshape(x.shape)
    yield pieces(4, 1, 3, 1)
    yield pieces(*[1] * 9)


@pytest.fixture(autouse=True)
def quiet():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@pytest.mark.parametrize("name", PROJECTIONS)
def test_an_adapter_equals_its_merged_weight(name):
    block, x = small_block(dtype=torch.float64), torch.randn(2, 9, 20, dtype=torch.float64)
    before = block(x)
    replace(block, name, Adapter)
    need = merged(block, name)(x)
    assert (need - before).abs().max() > 1e-4
    for call in calls(x):
        torch.testing.assert_close(call(block), need, atol=ATOL, rtol=1e-7)
    block(x).square().sum().backward()
    adapter = block.get_submodule(name)
    assert adapter.A.grad.any() and adapter.B.grad.any() and adapter.base_layer.weight.grad.any()


def test_gradients_through_a_called_w2_are_those_of_the_definition():
    block, x = small_block(dtype=torch.float64), torch.randn(1, 9, 20, dtype=torch.float64)
    block.get_submodule(W2).register_forward_hook(lambda *_: None)
    parameters = list(block.parameters())
    got = torch.autograd.grad(block(x).square().sum(), parameters)
    need = torch.autograd.grad(
        jet_block(x, dict(block.named_parameters()), norm_eps=1e-5)[0].square().sum(), parameters
    )
    for g, n in zip(got, need):
        torch.testing.assert_close(g, n, atol=1e-8, rtol=1e-6)


HOOKS = {
    "forward": lambda m, seen: m.register_forward_hook(lambda *_: seen.append(1)),
    "forward pre": lambda m, seen: m.register_forward_pre_hook(lambda *_: seen.append(1)),
    "all modules": lambda m, seen: nn.modules.module.register_module_forward_hook(
        lambda module, *_: seen.append(1) if module is m else None
    ),
    "backward": lambda m, seen: m.register_full_backward_hook(lambda *_: seen.append(1)),
    "backward pre": lambda m, seen: m.register_full_backward_pre_hook(lambda *_: seen.append(1)),
}


@pytest.mark.parametrize("kind", HOOKS)
@pytest.mark.parametrize("name", [*PROJECTIONS, "dynamic_conv1d"])
def test_hooks_run_once_a_call(name, kind):
    block, seen = small_block(), []
    handle = HOOKS[kind](block.get_submodule(name), seen)
    x = torch.randn(2, 4, 20, requires_grad=True)
    block(x).sum().backward()
    assert len(seen) == 1
    if "backward" not in kind:
        state = block.new_state(2)
        with torch.no_grad():
            for t in range(4):
                block(x[:, t : t + 1], state=state)
        assert len(seen) == 5
    handle.remove()
    assert linear.plain_weights(block.get_submodule(W2), "w2") is not None


def test_a_hook_on_a_layer_runs_once_for_a_padded_batch():
    block, seen = small_block(), []
    block.register_forward_hook(lambda module, args, y: seen.append(tuple(y.shape)))
    block(torch.randn(2, 4, 20), attention_mask=torch.tensor([[0, 1, 1, 1], [1, 1, 1, 1]]))
    assert seen == [(2, 4, 20)]


@pytest.mark.parametrize("indices", [None, [1, 0], [2, -1], [-1, -1]])
@torch.no_grad()
def test_a_step_with_a_called_w2_equals_the_fused_one(indices):
    conv, called = (small_block(dtype=torch.float64).dynamic_conv1d for _ in range(2))
    called.kernel_generator.w2.register_forward_hook(lambda *_: None)
    x, u = torch.randn(2, conv.channels, dtype=torch.float64), torch.randn(2, 20, dtype=torch.float64)
    index = None if indices is None else torch.tensor(indices, dtype=torch.int32)
    pools = [
        torch.randn(
            2 if index is None else 4, conv.channels, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0)
        )
        for _ in range(2)
    ]
    for _ in range(3):
        need, got = (c.step_(x, u, pool, index) for c, pool in zip((conv, called), pools))
        torch.testing.assert_close(got, need, atol=ATOL, rtol=0)
        assert torch.equal(*pools)
    for wrong in ([4, 0], [1, 1]):
        before = pools[1].clone()
        with pytest.raises(RuntimeError, match="state_indices"):
            called.step_(x, u, pools[1], torch.tensor(wrong))
        assert index is None or torch.equal(pools[1], before)


def test_a_pruned_weight_follows_the_optimiser():
    block, x = small_block(dtype=torch.float64), torch.randn(2, 9, 20, dtype=torch.float64)
    w2 = block.get_submodule(W2)
    prune.random_unstructured(w2, "weight", 0.5)
    optimizer = torch.optim.SGD(block.parameters(), lr=1e-3)
    for _ in range(2):
        optimizer.zero_grad()
        block(x).square().sum().backward()
        optimizer.step()
    values = dict(block.named_parameters()) | {f"{W2}.weight": w2.weight_orig * w2.weight_mask}
    torch.testing.assert_close(block(x), jet_block(x, values, norm_eps=1e-5)[0], atol=ATOL, rtol=1e-7)
    prune.remove(w2, "weight")
    assert linear.plain_weights(w2, "w2") is not None


@pytest.mark.parametrize("wrap", [parametrizations.weight_norm, parametrizations.orthogonal])
def test_a_parametrized_weight_learns(wrap):
    block, x = small_block(), torch.randn(2, 9, 20)
    w2 = wrap(block.get_submodule(W2))
    block(x).sum().backward()
    assert all(p.grad is not None for p in w2.parameters())


def test_dynamically_quantised_layers_run():
    block, x = small_block(), torch.randn(2, 9, 20)
    quantised = torch.ao.quantization.quantize_dynamic(copy.deepcopy(block), {nn.Linear}, dtype=torch.qint8)
    need, got = block(x), quantised(x)
    assert not torch.equal(got, need) and (got - need).norm() < 0.2 * need.norm()
    state = quantised.new_state(2)
    with torch.no_grad():
        for t in range(9):
            step = quantised(x[:, t : t + 1], state=state)
    assert (step[:, 0] - need[:, -1]).norm() < 0.2 * need.norm()


@pytest.mark.parametrize("nested", [False, True])
def test_an_offloaded_layer_computes_where_its_hook_says(nested):
    """As accelerate's: the weights are on meta between calls."""
    model = small_model(tie_word_embeddings=False).to("meta")
    hook = type("Hook", (), {"execution_device": "cpu"})()
    for module in (model.model.embed_tokens, model.model.layers[0].self_attn):
        module._hf_hook = type("Hooks", (), {"hooks": [object(), hook]})() if nested else hook
    assert model.device == torch.device("cpu") and model.new_cache(1, 2).layers[1].key.device.type == "cpu"
    assert model.model.layers[0].self_attn.new_state(1).conv_state.device.type == "cpu"
    assert model.model.layers[2].self_attn.new_state(1).conv_state.device.type == "meta"


def test_norms_in_fp32_leave_the_state_in_the_layers_dtype():
    model = small_model(dtype=torch.bfloat16)
    for module in model.modules():
        if "Norm" in type(module).__name__:
            module.float()
    ids = tokens(1, 5)
    need = model(ids).logits
    with torch.no_grad():
        cache = model.new_cache(1, 5)
        for t in range(5):
            got = model(ids[:, t : t + 1], cache=cache).logits
    assert model.dtype == got.dtype == torch.bfloat16 and (got[0, 0] - need[0, -1]).norm() < 0.05 * need[0, -1].norm()


@pytest.mark.parametrize("tied", [True, False])
def test_a_quantised_model_generates(tied):
    model = small_model(tie_word_embeddings=tied)
    quantised = torch.ao.quantization.quantize_dynamic(copy.deepcopy(model), {nn.Linear}, dtype=torch.qint8)
    ids = tokens(2, 5)
    need, got = model(ids).logits, quantised(ids).logits
    assert (got - need).norm() < 0.2 * need.norm()
    assert quantised.generate(ids, max_new_tokens=3).shape == (2, 8)


def test_an_adapter_on_the_head():
    model, ids = small_model(tie_word_embeddings=False, dtype=torch.float64), tokens(2, 7)
    h = []
    model.model.norm.register_forward_hook(lambda m, args, y: h.append(y))
    replace(model, "lm_head", Adapter)
    out = model(ids, labels=ids)
    adapter = model.lm_head
    torch.testing.assert_close(out.logits, h[0] @ (adapter.base_layer.weight + adapter.B @ adapter.A).mT)
    out.loss.backward()
    assert adapter.A.grad.any() and adapter.B.grad.any()
    torch.testing.assert_close(model(ids, last_logits_only=True).logits, out.logits[:, -1:])
    assert model.generate(ids, max_new_tokens=2).shape == (2, 9)


def test_padding_has_zero_logits_whatever_the_head_adds():
    model, mask = small_model(tie_word_embeddings=False), torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])
    model.lm_head.register_forward_hook(lambda m, args, y: y + 1)
    logits = model(tokens(2, 4), mask).logits
    assert not logits[0, :2].any() and (logits[0, 2:] - 1).abs().max() > 0


def test_hooks_on_tied_embeddings_change_the_embedding_only():
    """As in transformers: the head shares the weight, not the module."""
    model, ids, seen = small_model(), tokens(2, 4), []
    model.model.embed_tokens.register_forward_hook(lambda m, args, y: seen.append(y.shape))
    assert model(ids).logits.shape == (2, 4, VOCAB) and len(seen) == 1


def test_a_tied_head_without_its_weight_says_so():
    model = small_model()
    model.model.embed_tokens.to("meta")
    with pytest.raises(
        RuntimeError, match="the head is tied to embed_tokens, whose weight must be a tensor on cpu, got on meta"
    ):
        model.head(torch.randn(1, 2, 32))


def test_a_called_layer_is_announced_once(monkeypatch):
    monkeypatch.setattr(linear, "_announced", set())
    block, x = small_block(), torch.randn(1, 3, 20)
    block(x)
    block.get_submodule(W2).register_forward_hook(lambda *_: None)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        block(x)
        block(x)
        replace(block, W2, Adapter)
        block(x)
    messages = [str(w.message) for w in caught]
    assert len(messages) == 2 and all("kernel_generator.w2 is called as a module, not fused" in m for m in messages)
    assert (
        messages[0].endswith("it has hooks")
        and "it is a test_called_linears.Adapter, not a torch.nn.Linear" in messages[1]
    )


def test_compiled_with_an_adapter():
    block, x = small_block(dtype=torch.float64), torch.randn(2, 9, 20, dtype=torch.float64)
    plain = block(x)
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), plain)
    replace(block, W2, Adapter)
    torch.testing.assert_close(compiled(x), block(x))
    state, alone = block.new_state(2), block.new_state(2)
    with torch.no_grad():
        for part in x.split([4, 1, 4], 1):
            torch.testing.assert_close(compiled(part, state=state), block(part, state=alone))


def test_a_replica_of_data_parallel_is_plain():
    block, x = small_block(), torch.randn(1, 3, 20)
    w2 = block.get_submodule(W2)
    replica = w2._replicate_for_data_parallel()
    for name, value in w2.named_parameters():
        setattr(replica, name, value.data)
    weight, bias = linear.plain_weights(replica, "w2")
    assert weight is replica.weight and bias is replica.bias and block(x).isfinite().all()
