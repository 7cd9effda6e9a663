"""The properties of jet_block_step, written once for every backend."""

import math
from collections.abc import Sequence

import torch
from support.arguments import BlockStepCall, tensor_names, with_rows
from support.backends import REFERENCE, OpsBackend
from support.comparison import TOLERANCE, assert_bitwise, assert_error
from support.memory import poisoned_allocations
from torch import Tensor

OP = "jet_block_step"
TOKENS = ("q", "k", "v", "hidden", "a", "b", "gate")
POOLS = ("conv_state", "state")


def run(backend: OpsBackend, call: BlockStepCall) -> tuple[Tensor, Tensor, Tensor]:
    """y and both pools after the call; ``call`` keeps its own."""
    pools = {name: getattr(call, name).clone(memory_format=torch.preserve_format) for name in POOLS}
    return backend(OP, *call._replace(**pools)), *pools.values()


def rows_of(call: BlockStepCall) -> list[int]:
    return list(range(call.q.shape[0])) if call.state_indices is None else call.state_indices.tolist()


def check(backend: OpsBackend, call: BlockStepCall) -> None:
    """y and the pools equal the definition; rows that no index names keep their bits; a negative index gives zeros."""
    y, *pools = run(backend, call)
    ref, *ref_pools = REFERENCE[OP](*call)
    rows = rows_of(call)
    used = [row for row in rows if row >= 0]
    unused = [row for row in range(call.state.shape[0]) if row not in used]
    assert y.dtype == call.q.dtype and y.is_contiguous()
    assert_error("y", y, ref, TOLERANCE[y.dtype].output)
    for name, pool, ref_pool in zip(POOLS, pools, ref_pools):
        # the convolution's output, which the state takes up, is rounded to the dtype of the call
        tolerance = TOLERANCE[y.dtype].output if name == "state" else 0.0
        assert_error(name, pool[used], ref_pool[used], max(tolerance, TOLERANCE[pool.dtype].state))
        assert_bitwise(pool[unused], getattr(call, name)[unused], f"rows of {name} without an index")
    nowhere = [n for n, row in enumerate(rows) if row < 0]
    assert_bitwise(y[nowhere], torch.zeros_like(y[nowhere]), "y of a negative index")


def composed(backend: OpsBackend, call: BlockStepCall) -> tuple[Tensor, Tensor, Tensor]:
    """The same of the ops that it consists of, in the dtype of the call."""
    F = torch.nn.functional
    conv_state, state = call.conv_state.clone(), call.state.clone()
    v = backend(
        "dynamic_conv_step", call.v, F.silu(call.hidden), call.weight, call.bias, conv_state, call.state_indices, True
    )
    g = -call.A_log.exp() * F.softplus(call.a.to(call.A_log.dtype) + call.dt_bias)
    tokens = (F.silu(call.q), F.silu(call.k), v.view(call.gate.shape), g, torch.sigmoid(call.b.to(g.dtype)))
    o = backend(
        "recurrent_gated_delta_rule",
        *(t.unsqueeze(1) for t in tokens),
        state,
        call.state_indices,
        call.scale,
        True,
    )
    y = F.rms_norm(o[:, 0], call.norm_weight.shape, call.norm_weight, call.eps) * F.silu(call.gate)
    return y.flatten(1), conv_state, state


def equals_the_ops_that_it_consists_of(backend: OpsBackend, call: BlockStepCall, ceiling: float) -> None:
    for name, out, expected in zip(("y", *POOLS), run(backend, call), composed(backend, call)):
        assert_error(name, out, expected, ceiling)


def negative_index_is_not_a_row(backend: OpsBackend, call: BlockStepCall) -> None:
    """-1 means neither row 0 nor the last row, whatever the tokens and the pools hold."""
    N, P = call.q.shape[0], call.state.shape[0]
    for value in (0.5, math.nan):
        filled = {name: torch.full_like(getattr(call, name), value) for name in (*POOLS, *TOKENS)}
        for row in (-1, -2, -P, -(2**31)):
            nowhere = with_rows(call._replace(**filled), [row] * N)
            y, *pools = run(backend, nowhere)
            assert_bitwise(y, torch.zeros_like(y), f"y of index {row}")
            for name, pool in zip(POOLS, pools):
                assert_bitwise(pool, getattr(nowhere, name), f"{name} after index {row}")


def other_rows_do_not_matter(backend: OpsBackend, call: BlockStepCall, rows: Sequence[int]) -> None:
    """NaN in a row that no index names reaches nothing, and stays as it is to the bit."""
    call = with_rows(call, rows)
    unused = [row for row in range(call.state.shape[0]) if row not in rows]
    used = [row for row in rows if row >= 0]
    dirty = call._replace(**{name: getattr(call, name).clone() for name in POOLS})
    for name in POOLS:
        getattr(dirty, name)[unused] = torch.nan
    (y, *pools), (dirty_y, *dirty_pools) = run(backend, call), run(backend, dirty)
    assert_bitwise(dirty_y, y, "y")
    for name, pool, dirty_pool in zip(POOLS, pools, dirty_pools):
        assert_bitwise(dirty_pool[used], pool[used], name)
        assert dirty_pool[unused].isnan().all()


def nan_stays_in_its_sequence(backend: OpsBackend, call: BlockStepCall, n: int, value: float) -> None:
    """``value`` in the tokens and the states of sequence n changes no bit of the others."""
    bad = call._replace(**{name: getattr(call, name).clone() for name in (*TOKENS, *POOLS)})
    row = rows_of(call)[n]
    for name in TOKENS:
        getattr(bad, name)[n] = value
    for name in POOLS:
        getattr(bad, name)[row] = value
    for name, out, bad_out in zip(("y", *POOLS), run(backend, call), run(backend, bad)):
        index = n if name == "y" else row
        out[index] = bad_out[index] = 0
        assert_bitwise(bad_out, out, name)


def repeated_runs_are_equal(backend: OpsBackend, call: BlockStepCall) -> None:
    first = run(backend, call)
    for _ in range(3):
        for again, before in zip(run(backend, call), first):
            assert_bitwise(again, before)


def every_element_is_written(backend: OpsBackend, call: BlockStepCall) -> None:
    expected = run(backend, call)
    with poisoned_allocations():
        for what, out, ref in zip(("y", *POOLS), run(backend, call), expected):
            assert_bitwise(out, ref, what)


def writes_to_nothing_but_the_pools(backend: OpsBackend, call: BlockStepCall) -> None:
    """The pools keep their memory, no other argument changes, and y shares memory with none."""
    before = call._replace(**{name: getattr(call, name).clone() for name in tensor_names(call)})
    addresses = [getattr(call, name).data_ptr() for name in POOLS]
    y = backend(OP, *call)
    assert [getattr(call, name).data_ptr() for name in POOLS] == addresses
    for name in tensor_names(call):
        t = getattr(call, name)
        assert y.untyped_storage().data_ptr() != t.untyped_storage().data_ptr(), name
        if name in POOLS:
            assert not torch.equal(t, getattr(before, name)), name
        else:
            assert_bitwise(t, getattr(before, name), name)


def fused(call: BlockStepCall, pad: int = 0) -> BlockStepCall:
    """The same activations as views of the rows of one projection; between two rows lie ``pad`` NaN."""
    N = call.q.shape[0]
    parts = [getattr(call, name).reshape(N, -1) for name in TOKENS]
    width = sum(part.shape[1] for part in parts)
    rows = call.q.new_full((N, width + pad), math.nan)
    rows[:, :width] = torch.cat(parts, 1)
    views = rows[:, :width].split([part.shape[1] for part in parts], 1)
    return call._replace(
        **{name: view.unflatten(1, getattr(call, name).shape[1:]) for name, view in zip(TOKENS, views)}
    )
