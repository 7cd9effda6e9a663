"""Layers that change a state in place, run a second time by activation checkpointing: right, or refused."""

import weakref

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.model_cases import boundaries, small_block, small_model, tokens
from torch import nn
from torch.utils.checkpoint import checkpoint

from jetkernels.model.attention import rotary_table
from jetkernels.model.layout import TokenLayout
from jetkernels.modules import JetBlock, JetBlockState, repeatable

C = 20


def inputs(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, C, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def history(block: JetBlock, batch: int = 2) -> JetBlockState:
    """A state that has seen some tokens."""
    state = block.new_state(batch)
    with torch.no_grad():
        block(inputs(batch, 6, seed=99), state=state)
    return state


def gradients(module: nn.Module, run, x: torch.Tensor):
    """Gradients of x and the parameters, and the state after, of sum(run(x, state)^2)."""
    block = next(m for m in module.modules() if isinstance(m, JetBlock))
    state = history(block, x.shape[0])
    module.zero_grad()
    leaf = x.clone().requires_grad_()
    run(leaf, state).square().sum().backward()
    return [leaf.grad, *(p.grad.clone() for p in module.parameters()), *state]


def assert_equal(got, need):
    for g, n in zip(got, need, strict=True):
        torch.testing.assert_close(g, n, atol=1e-10, rtol=1e-8)


def segments(block: JetBlock, sizes, how):
    """The sequence in segments, one call each. how: "plain", "reentrant", "not reentrant" or "one region"."""

    def run(x, state):
        def call(part):
            return block(part, state=state)

        def every(x):
            return torch.cat([call(part) for part in x.split(sizes, 1)], 1)

        if how == "plain":
            return every(x)
        if how == "one region":
            return checkpoint(every, x, use_reentrant=False)
        return torch.cat([checkpoint(call, part, use_reentrant=how == "reentrant") for part in x.split(sizes, 1)], 1)

    return run


@given(
    sizes=st.lists(st.integers(1, 9), min_size=1, max_size=5),
    how=st.sampled_from(["reentrant", "not reentrant", "one region"]),
    seed=st.integers(0, 99),
)
@settings(max_examples=15, deadline=None)
def test_checkpointed_segments_equal_plain_ones(sizes, how, seed):
    block, x = small_block(dtype=torch.float64), inputs(2, sum(sizes), seed=seed)
    need = gradients(block, segments(block, sizes, "plain"), x)
    assert_equal(gradients(block, segments(block, sizes, how), x), need)


@pytest.mark.parametrize("how", ["reentrant", "not reentrant"])
@pytest.mark.parametrize(
    "options",
    [{"attention_mask": torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 0]])}, {"cu_seqlens": boundaries([2, 0, 3])}],
    ids=["mask", "packed"],
)
def test_checkpointed_call_on_ragged_sequences(options, how):
    block, x = small_block(dtype=torch.float64), inputs(2 if "attention_mask" in options else 1, 5)

    def run(checkpointed):
        state = history(block, 2 if "attention_mask" in options else 3)
        block.zero_grad()
        leaf = x.clone().requires_grad_()
        call = lambda part: block(part, state=state, **options)
        y = checkpoint(call, leaf, use_reentrant=how == "reentrant") if checkpointed else call(leaf)
        y.square().sum().backward()
        return [leaf.grad, *(p.grad.clone() for p in block.parameters()), *state]

    assert_equal(run(True), run(False))


class Stack(nn.Module):
    """Layers with a norm in front, each with a state of its own."""

    def __init__(self, depth: int):
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(C, dtype=torch.float64) for _ in range(depth))
        self.blocks = nn.ModuleList(small_block(seed=i, dtype=torch.float64) for i in range(depth))

    def forward(self, x, states):
        for norm, block, state in zip(self.norms, self.blocks, states):
            x = x + block(norm(x), state=state)
        return x


def run_stack(stack: Stack, wrap, sizes=(5, 1, 7)):
    states = [history(block) for block in stack.blocks]
    stack.zero_grad()
    x = inputs(2, sum(sizes)).requires_grad_()
    y = torch.cat([wrap(lambda part: stack(part, states), part) for part in x.split(sizes, 1)], 1)
    y.square().sum().backward()
    return [x.grad, *(p.grad.clone() for p in stack.parameters()), *(t for state in states for t in state)]


def test_checkpointed_stack_equals_a_plain_one():
    stack = Stack(3)
    need = run_stack(stack, lambda f, x: f(x))
    assert_equal(run_stack(stack, lambda f, x: checkpoint(f, x, use_reentrant=False)), need)
    # A checkpoint inside a checkpoint: the layers run three times.
    inner = lambda f, x: checkpoint(f, x, use_reentrant=False)
    assert_equal(run_stack(stack, lambda f, x: checkpoint(inner, f, x, use_reentrant=False)), need)


def test_reentrant_stack_is_refused():
    """The first run of its layers cannot be told from inference, so nothing was kept."""
    with pytest.raises(
        RuntimeError, match="0 calls on this state kept such an input. Checkpoint with use_reentrant=False"
    ):
        run_stack(Stack(2), lambda f, x: checkpoint(f, x, use_reentrant=True))


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("order", [[0, 1, 2], [2, 1, 0], [1, 0, 2]])
def test_segments_may_go_backward_in_any_order(order, reentrant):
    block, x = small_block(dtype=torch.float64), inputs(2, 12)

    def run(wrap):
        state = history(block)
        block.zero_grad()
        leaves = [part.clone().requires_grad_() for part in x.split(4, 1)]
        losses = [wrap(lambda part: block(part, state=state), leaf).square().sum() for leaf in leaves]
        for i in order:
            losses[i].backward()
        return [*(leaf.grad for leaf in leaves), *(p.grad.clone() for p in block.parameters()), *state]

    assert_equal(run(lambda f, x: checkpoint(f, x, use_reentrant=reentrant)), run(lambda f, x: f(x)))


@pytest.mark.parametrize("reentrant", [False, True])
def test_two_backward_passes(reentrant):
    block, x = small_block(dtype=torch.float64), inputs(1, 7).requires_grad_()
    state = history(block, 1)
    loss = checkpoint(lambda x: block(x, state=state), x, use_reentrant=reentrant).square().sum()
    after = [t.clone() for t in state]
    loss.backward(retain_graph=True)
    once = x.grad.clone()
    loss.backward()
    torch.testing.assert_close(x.grad, 2 * once)
    assert all(map(torch.equal, state, after))


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_state_made_in_the_checkpointed_function(reentrant):
    block, x = small_block(dtype=torch.float64), inputs(2, 9)

    def call(x):
        state = block.new_state(2)
        y = torch.cat([block(x[:, :4], state=state), block(x[:, 4:], state=state)], 1)
        return y + state.recurrent_state.sum()

    results = []
    for run in (call, lambda x: checkpoint(call, x, use_reentrant=reentrant)):
        leaf = x.clone().requires_grad_()
        block.zero_grad()
        run(leaf).square().sum().backward()
        results.append([leaf.grad, *(p.grad.clone() for p in block.parameters())])
    assert_equal(*results)


def test_equal_inputs_are_refused():
    block, x = small_block(dtype=torch.float64), torch.ones(1, 3, C, dtype=torch.float64, requires_grad=True)
    state = block.new_state(1)
    total = sum(checkpoint(lambda x: block(x, state=state), x, use_reentrant=False).sum() for _ in range(2))
    after = [t.clone() for t in state]
    with pytest.raises(RuntimeError, match="2 calls on this state kept such an input"):
        total.backward()
    assert all(map(torch.equal, state, after))


def kept_calls(state) -> int:
    found = repeatable._histories.get(state[0])
    return 0 if found is None else sum(ref() is not None and ref().before is not None for ref in found.calls)


def test_inference_keeps_nothing():
    block = small_block()
    state = block.new_state(2)
    with torch.no_grad():
        for T in (5, 1, 1):
            block(torch.randn(2, T, C), state=state)
    assert state[0] not in repeatable._histories


@pytest.mark.parametrize(
    "wrap",
    [
        lambda f, x: f(x),
        lambda f, x: checkpoint(f, x, use_reentrant=False),
        lambda f, x: checkpoint(f, x, use_reentrant=True),
    ],
)
def test_nothing_is_kept_after_backward(wrap):
    """Also where somebody keeps the losses, as a training loop may."""
    block, losses = small_block(), []
    states = [block.new_state(2)]  # from which the functions take it, so that they do not keep it
    for _ in range(4):
        x = torch.randn(2, 5, C, requires_grad=True)
        losses.append(wrap(lambda x: block(x, state=states[0]), x).square().sum())
        assert kept_calls(states[0]) == 1
        losses[-1].backward()
        assert kept_calls(states[0]) == 0
    wrap(lambda x: block(x, state=states[0]), torch.randn(2, 5, C, requires_grad=True))
    assert kept_calls(states[0]) == 0, "the result was dropped"
    key = weakref.ref(states[0][0])
    states.clear()
    assert key() is None


def test_a_state_after_training_is_ready_for_inference():
    block, x = small_block(), torch.randn(2, 9, C)
    state, alone = block.new_state(2), block.new_state(2)
    checkpoint(lambda x: block(x, state=state), x[:, :8].requires_grad_(), use_reentrant=False).sum().backward()
    with torch.no_grad():
        block(x[:, :8], state=alone)
        torch.testing.assert_close(block(x[:, 8:], state=state), block(x[:, 8:], state=alone))


def test_compiled_training_with_a_state():
    """The part with a state is run as it is; asked to compile all of it, the compiler says why not."""
    block, x = small_block(dtype=torch.float64), inputs(2, 9)
    need = gradients(block, segments(block, [9], "plain"), x)
    compiled = torch.compile(block, backend="eager")
    assert_equal(gradients(block, segments(compiled, [9], "not reentrant"), x), need)
    with pytest.raises(Exception, match="training with a state is not compiled"):
        torch.compile(block, backend="eager", fullgraph=True)(x, state=block.new_state(2))


def test_a_model_with_a_cache_in_a_repeated_function():
    """A frozen model reads on while a head on it is trained."""
    model, head = small_model(dtype=torch.float64), nn.Linear(61, 3, dtype=torch.float64)
    ids, cache = tokens(2, 8), model.new_cache(2, 8)

    def with_cache(ids, head):
        return head(model(ids, cache=cache).logits)

    def with_its_own(ids, head):
        own = model.new_cache(2, 8)
        return torch.cat([head(model(part, cache=own).logits) for part in ids.split(4, 1)], 1)

    y = checkpoint(with_cache, ids[:, :4], head, use_reentrant=False)
    before = [t.clone() for t in cache.tensors()]
    with pytest.raises(RuntimeError, match="a call with a cache cannot be repeated in a backward pass"):
        y.square().sum().backward()
    assert all(map(torch.equal, cache.tensors(), before)) and cache.lengths == [4, 4]
    grads = []
    for run in (with_its_own, lambda ids, head: checkpoint(with_its_own, ids, head, use_reentrant=False)):
        head.zero_grad()
        run(ids, head).square().sum().backward()
        grads.append([p.grad.clone() for p in head.parameters()])
    assert_equal(*grads)


@pytest.mark.parametrize("kind", ["attn", "swa"])
def test_an_attention_layer_with_a_cache_computes_no_gradient(kind):
    model = small_model(kind)
    layer, cache = model.model.layers[0].self_attn, model.new_cache(1, 8)
    rotary = rotary_table(torch.arange(4)[None], model.config.head_dim, 1e6)
    with pytest.raises(RuntimeError, match="Attention: a call with a cache computes no gradient"):
        layer(
            torch.randn(1, 4, 32),
            layout=TokenLayout.dense(1, 4, [0], None, "cpu"),
            rotary=rotary,
            state=cache.layers[0],
        )
    assert not cache.layers[0].key.any()
