"""The properties of prefill_gated_delta_rule, written once for every backend."""

import math
from collections.abc import Sequence

import torch
from hypothesis import strategies as st
from support.arguments import PrefillCall, accumulator, prefill_call, with_rows
from support.backends import REFERENCE, OpsBackend
from support.comparison import TOLERANCE, assert_bitwise, assert_error
from support.device_backends import DeviceBackend
from support.memory import poisoned_allocations
from support.pool_properties import run
from support.shapes import DeltaShape
from support.strategies import seeds
from torch import Tensor

CHUNK = 64


def bounds_of(call: PrefillCall) -> list[tuple[int, int]]:
    bounds = call.cu_seqlens.tolist()
    return list(zip(bounds[:-1], bounds[1:]))


def marks_of(call: PrefillCall) -> dict[int, tuple[int, int]]:
    """{number of tokens: (sequence, row of the pool)} of the marks that are kept."""
    if call.mark_tokens is None:
        return {}
    marks = {}
    for token, row in zip(call.mark_tokens.tolist(), call.mark_indices.tolist()):
        if row < 0:
            continue
        n = next(n for n, (begin, end) in enumerate(bounds_of(call)) if begin < token <= end)
        if rows_of(call)[n] >= 0:
            marks[token] = (n, row)
    return marks


def goes_on(call: PrefillCall, n: int) -> bool:
    return call.has_initial_state is None or bool(call.has_initial_state[n])


def read_rows(call: PrefillCall) -> list[int]:
    """Those that a sequence begins from."""
    return [row for n, row in enumerate(rows_of(call)) if row >= 0 and goes_on(call, n)]


def written_rows(call: PrefillCall) -> list[int]:
    """Those that may have other bits after the call: an empty sequence that goes on leaves its own."""
    moved = [n for n, (begin, end) in enumerate(bounds_of(call)) if begin < end or not goes_on(call, n)]
    rows = rows_of(call)
    return [*(rows[n] for n in moved if rows[n] >= 0), *(row for _, row in marks_of(call).values())]


def rows_of(call: PrefillCall) -> list[int]:
    return list(range(len(bounds_of(call)))) if call.state_indices is None else call.state_indices.tolist()


def possible_marks(offsets: Sequence[int]) -> list[int]:
    return sorted(
        {
            t
            for begin, end in zip(offsets[:-1], offsets[1:])
            for t in (*range(begin + CHUNK, end, CHUNK), end)
            if t > begin
        }
    )


def v_first(call: PrefillCall) -> PrefillCall:
    """The same with a pool [P, V, K] in memory."""
    return call._replace(state=call.state.mT.contiguous().mT)


def check(backend: OpsBackend, call: PrefillCall, state_ceiling: float | None = None) -> None:
    """Output and pool equal the definition; rows that nothing names keep their bits; a negative index gives zeros."""
    out, pool = run(backend, call)
    ref, ref_pool = REFERENCE["prefill_gated_delta_rule"](*call)
    written = written_rows(call)
    kept = [row for row in range(call.state.shape[0]) if row not in written]
    assert out.dtype == call.v.dtype and out.is_contiguous()
    assert_error("output", out, ref, TOLERANCE[out.dtype].output)
    ceiling = max(state_ceiling or 0, TOLERANCE[pool.dtype].state)
    assert_error("pool", pool[written], ref_pool[written], ceiling)
    assert_bitwise(pool[kept], call.state[kept], "rows without an index")
    for row, (begin, end) in zip(rows_of(call), bounds_of(call)):
        if row < 0:
            assert_bitwise(out[:, begin:end], torch.zeros_like(out[:, begin:end]), "output of a negative index")


def assert_same(backend: OpsBackend, out: Tensor, expected: Tensor, what: str) -> None:
    """To the bit; in plain PyTorch, whose order of summation depends on the number of tokens, up to rounding."""
    if backend.is_plain:
        assert_error(what, out, expected, TOLERANCE[out.dtype].output)
    else:
        assert_bitwise(out, expected, what)


def equals_the_op_without_a_pool(backend: OpsBackend, call: PrefillCall) -> None:
    """Also at marks, where the sequence is cut there. A state is rounded to the pool's dtype."""
    out, pool = run(backend, call)
    rows = rows_of(call)
    begin = torch.stack(
        [
            call.state[row] if row >= 0 and goes_on(call, n) else torch.zeros_like(call.state[0])
            for n, row in enumerate(rows)
        ]
    )
    begin = begin.to(accumulator(call.v.dtype))
    o, final = backend("chunk_gated_delta_rule", *call[:5], begin, call.cu_seqlens, call.scale, call.l2norm_qk)
    for n, (row, (first, last)) in enumerate(zip(rows, bounds_of(call))):
        if row >= 0:
            assert_same(backend, out[:, first:last], o[:, first:last], f"output of sequence {n}")
            assert_same(backend, pool[row], final[n].to(pool.dtype), f"state of sequence {n}")
    for token, (n, row) in marks_of(call).items():
        first = bounds_of(call)[n][0]
        part = (t[:, first:token] for t in call[:5])
        _, state = backend("chunk_gated_delta_rule", *part, begin[n : n + 1], None, call.scale, call.l2norm_qk)
        assert_same(backend, pool[row], state[0].to(pool.dtype), f"state at mark {token}")


def layout_does_not_matter(backend: OpsBackend, call: PrefillCall) -> None:
    """A pool [P, V, K], and one with gaps full of NaN, give the same bits."""
    expected = run(backend, call)
    for out, ref in zip(run(backend, v_first(call)), expected):
        assert_bitwise(out, ref, "V before K")
    P, H, K, V = call.state.shape
    storage = torch.full((P, K, H + 1, V + 16), math.nan, dtype=call.state.dtype)
    pool = storage.permute(0, 2, 1, 3)[:, :H, :, 8 : V + 8]
    pool.copy_(call.state)
    out = backend("prefill_gated_delta_rule", *call._replace(state=pool))
    assert_bitwise(out, expected[0], "output with a pool with gaps")
    assert_bitwise(pool.contiguous(), expected[1], "pool with gaps")
    assert storage[:, :, H].isnan().all() and storage[..., :8].isnan().all() and storage[..., V + 8 :].isnan().all()


def what_nothing_names_does_not_matter(backend: OpsBackend, call: PrefillCall) -> None:
    """NaN in rows that no sequence begins from reaches nothing."""
    read = read_rows(call)
    dirty = call._replace(state=call.state.clone())
    dirty.state[[row for row in range(call.state.shape[0]) if row not in read]] = math.nan
    (out, pool), (dirty_out, dirty_pool) = run(backend, call), run(backend, dirty)
    assert_bitwise(dirty_out, out, "output")
    assert_bitwise(dirty_pool[written_rows(call)], pool[written_rows(call)], "pool")


def nan_stays_in_its_sequence(backend: OpsBackend, call: PrefillCall, n: int, value: float) -> None:
    """``value`` in a token of sequence n: no bit of the others changes, nor of its own before the token. Kernels make
    the sequence's columns again, in fp32: what is before the token equals the definition then.
    """
    begin, end = bounds_of(call)[n]
    bad = call._replace(**{name: getattr(call, name).clone() for name in ("q", "k", "v", "g", "beta", "state")})
    middle = (begin + end) // 2
    for name in ("q", "k", "v", "g", "beta"):
        getattr(bad, name)[:, middle] = -abs(value) if name == "g" else value
    (out, pool), (bad_out, bad_pool) = run(backend, call), run(backend, bad)
    assert_bitwise(bad_out[:, :begin], out[:, :begin], "output before the sequence")
    assert_bitwise(bad_out[:, end:], out[:, end:], "output behind the sequence")
    own = [rows_of(call)[n], *(row for token, (_, row) in marks_of(call).items() if middle < token <= end)]
    earlier = [row for token, (m, row) in marks_of(call).items() if m == n and token <= middle]
    others = [row for row in range(pool.shape[0]) if row not in own + earlier]
    assert_bitwise(bad_pool[others], pool[others], "rows of others")
    marks, before = bad_pool[earlier], bad_out[:, begin:middle]
    if isinstance(backend, DeviceBackend):
        ref, ref_pool = REFERENCE["prefill_gated_delta_rule"](*call)
        assert_error("marks before the token", marks, ref_pool[earlier], TOLERANCE[pool.dtype].state)
        assert_error("output before the token", before, ref[:, begin:middle], TOLERANCE[out.dtype].output)
    else:
        assert_bitwise(marks, pool[earlier], "marks before the token")
        assert_bitwise(before, out[:, begin:middle], "output before the token")
    assert not bad_pool[own].isfinite().any()


def every_element_is_written(backend: OpsBackend, call: PrefillCall) -> None:
    expected = run(backend, call)
    with poisoned_allocations():
        for out, ref in zip(run(backend, call), expected):
            assert_bitwise(out, ref)


def pieces_equal_the_whole(backend: OpsBackend, call: PrefillCall, cut: int) -> None:
    """A sequence cut behind whole chunks, in two calls."""
    out, pool = run(backend, call)
    state = call.state.clone()
    parts = []
    for first, last in ((0, cut), (cut, call.v.shape[1])):
        tokens = [t[:, first:last] for t in call[:5]]
        part = call._replace(**dict(zip(call._fields, tokens)), state=state, cu_seqlens=torch.tensor([0, last - first]))
        if first:
            part = part._replace(has_initial_state=None)
        parts.append(backend("prefill_gated_delta_rule", *part))
    assert_same(backend, torch.cat(parts, 1), out, "output")
    assert_same(backend, state, pool, "pool")


@st.composite
def calls(draw, shape: DeltaShape, dtype: torch.dtype, state_dtype: torch.dtype, longest: int = 150) -> PrefillCall:
    """Any rows, beginnings, marks and layout of the pool for a shape without sequences."""
    lengths = draw(st.lists(st.integers(0, longest), min_size=1, max_size=4))
    offsets = tuple(sum(lengths[:n]) for n in range(len(lengths) + 1))
    tokens = [t for t in possible_marks(offsets) if draw(st.booleans())]
    N, M = len(lengths), len(tokens)
    rows = draw(st.permutations(range(N + M + 2)))
    signs = [draw(st.integers(0, 3)) > 0 for _ in range(N + M)]
    named: list[int] = [row if sign else -1 - row for row, sign in zip(rows, signs)]
    call = prefill_call(
        shape._replace(B=1, T=offsets[-1], cu_seqlens=offsets),
        dtype,
        state_dtype,
        named[:N],
        [draw(st.booleans()) for _ in lengths] if draw(st.booleans()) else None,
        dict(zip(tokens, named[N:])) if tokens or draw(st.booleans()) else None,
        seed=draw(seeds),
    )
    index = draw(st.sampled_from((torch.int32, torch.int64)))
    if call.mark_tokens is not None:
        call = call._replace(mark_tokens=call.mark_tokens.to(index), mark_indices=call.mark_indices.to(index))
    call = with_rows(call, named[:N], index)
    return v_first(call) if draw(st.booleans()) else call
