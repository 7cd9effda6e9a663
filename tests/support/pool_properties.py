"""The properties of the two ops that update a pool of states in place, written once for both.

A call is a `RecurrentCall` or a `StepCall`.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from support.arguments import TOKENS, op_of, tensor_names, with_pool, with_rows
from support.backends import REFERENCE, OpsBackend
from support.comparison import TOLERANCE, assert_bitwise, assert_error
from support.layouts import far_apart
from support.memory import poisoned_allocations
from torch import Tensor


def run(backend: OpsBackend, call: NamedTuple) -> tuple[Tensor, Tensor]:
    """The output, and the pool after the call; ``call`` keeps its own."""
    pool = call.pool.clone(memory_format=torch.preserve_format)
    return backend(op_of(call), *with_pool(call, pool)), pool


def rows_of(call: NamedTuple) -> list[int]:
    return list(range(call[0].shape[0])) if call.state_indices is None else call.state_indices.tolist()


def check(backend: OpsBackend, call: NamedTuple) -> None:
    """Output and pool equal the definition; rows that no index names keep their bits; a negative index gives zeros."""
    out, pool = run(backend, call)
    ref, ref_pool = REFERENCE[op_of(call)](*call)
    rows = rows_of(call)
    used = [row for row in rows if row >= 0]
    unused = [row for row in range(call.pool.shape[0]) if row not in used]
    assert out.dtype == call[0].dtype
    assert_error("output", out, ref, TOLERANCE[out.dtype].output)
    assert_error("pool", pool[used], ref_pool[used], TOLERANCE[pool.dtype].state)
    assert_bitwise(pool[unused], call.pool[unused], "rows without an index")
    nowhere = [n for n, row in enumerate(rows) if row < 0]
    assert_bitwise(out[nowhere], torch.zeros_like(out[nowhere]), "output of a negative index")


def negative_index_is_not_a_row(backend: OpsBackend, call: NamedTuple) -> None:
    """-1 means neither row 0 nor the last row: all pool rows are kept, NaN in them stays there."""
    N, P = call[0].shape[0], call.pool.shape[0]
    for value in (0.5, math.nan):
        for row in (-1, -2, -P, -(2**31)):
            nowhere = with_rows(with_pool(call, torch.full_like(call.pool, value)), [row] * N)
            out, pool = run(backend, nowhere)
            assert_bitwise(out, torch.zeros_like(out), f"output of index {row}")
            assert_bitwise(pool, nowhere.pool, f"pool after index {row}")
    ones = [0, -1] + [-1] * (N - 2)
    check(backend, with_rows(call, ones[:N]))


def other_rows_do_not_matter(backend: OpsBackend, call: NamedTuple, rows: Sequence[int]) -> None:
    """NaN in a row that no index names reaches nothing, and stays as it is to the bit."""
    call = with_rows(call, rows)
    dirty = call.pool.clone()
    dirty[[row for row in range(dirty.shape[0]) if row not in rows]] = torch.nan
    (out, pool), (dirty_out, dirty_pool) = run(backend, call), run(backend, with_pool(call, dirty))
    used = [row for row in rows if row >= 0]
    assert_bitwise(dirty_out, out, "output")
    assert_bitwise(dirty_pool[used], pool[used], "pool")
    check(backend, call)


def nan_stays_in_its_sequence(backend: OpsBackend, call: NamedTuple, n: int, value: float) -> None:
    """``value`` in the tokens and the state of sequence n changes no bit of the others."""
    bad = with_pool(call, call.pool.clone())
    bad = bad._replace(**{name: getattr(call, name).clone() for name in call._fields if name in TOKENS})
    row = rows_of(call)[n]
    for name in bad._fields:
        if name in TOKENS:
            getattr(bad, name)[n] = -abs(value) if name == "g" else value  # a g above 0 is refused
    bad.pool[row] = value
    (out, pool), (bad_out, bad_pool) = run(backend, call), run(backend, bad)
    for t, index in ((out, n), (bad_out, n), (pool, row), (bad_pool, row)):
        t[index] = 0
    assert_bitwise(bad_out, out, "output")
    assert_bitwise(bad_pool, pool, "pool")


def rows_do_not_depend_on_others(backend: OpsBackend, call: NamedTuple) -> None:
    out, pool = run(backend, call)
    rows = rows_of(call)
    for n, row in enumerate(rows):
        alone = call._replace(**{name: getattr(call, name)[n : n + 1] for name in call._fields if name in TOKENS})
        one, one_pool = run(backend, with_rows(alone, [row]))
        assert_error("output", one, out[n : n + 1], TOLERANCE[out.dtype].output)
        assert_error("pool", one_pool[row], pool[row], TOLERANCE[pool.dtype].state)


def repeated_runs_are_equal(backend: OpsBackend, call: NamedTuple) -> None:
    first = run(backend, call)
    for _ in range(3):
        for again, before in zip(run(backend, call), first):
            assert_bitwise(again, before)


def every_element_is_written(backend: OpsBackend, call: NamedTuple) -> None:
    expected = run(backend, call)
    with poisoned_allocations():
        for what, out, ref in zip(("output", "pool"), run(backend, call), expected):
            assert_bitwise(out, ref, what)


def updates_in_place(backend: OpsBackend, call: NamedTuple) -> None:
    """The pool keeps its memory, no other argument changes, and the output shares memory with none."""
    before = call._replace(**{name: getattr(call, name).clone() for name in tensor_names(call)})
    address = call.pool.data_ptr()
    out = backend(op_of(call), *call)
    assert call.pool.data_ptr() == address and not torch.equal(call.pool, before.pool)
    for name in tensor_names(call):
        t = getattr(call, name)
        assert out.untyped_storage().data_ptr() != t.untyped_storage().data_ptr(), name
        if t is not call.pool:
            assert_bitwise(t, getattr(before, name), name)


def row_beyond_32_bits(backend: OpsBackend, call: NamedTuple) -> None:
    """A pool of more than 2^31 elements, of which the first and the last row are used."""
    small = with_pool(with_rows(call, [1, 0]), call.pool[:2])
    size = small.pool[0].numel()
    far = far_apart(small.pool, 0)
    P = far.stride(0) // size + 1
    far = far.as_strided((P, *small.pool.shape[1:]), (size, *small.pool.stride()[1:]))
    last = far[P - 1].copy_(small.pool[1])
    out, pool = run(backend, small)
    big = with_pool(with_rows(small, [P - 1, 0]), far)
    assert_bitwise(backend(op_of(call), *big), out, "output")
    assert_bitwise(far[0], pool[0], "first row")
    assert_bitwise(last, pool[1], "last row")
