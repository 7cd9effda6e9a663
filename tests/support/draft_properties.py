"""The properties of recurrent_gated_delta_rule_verify and _commit, written once for every backend.

A call is a `RecurrentCall`: verify takes the arguments of recurrent_gated_delta_rule, and the buffers that it writes.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from support.arguments import CommitCall, RecurrentCall, verify_call, with_rows
from support.backends import OpsBackend
from support.comparison import TOLERANCE, assert_bitwise, assert_error
from support.memory import poisoned_allocations
from support.pool_properties import rows_of, run
from torch import Tensor

from reference.recurrent_gated_delta_rule_commit import recurrent_gated_delta_rule_commit
from reference.recurrent_gated_delta_rule_verify import recurrent_gated_delta_rule_verify


class Draft(NamedTuple):
    o: Tensor
    keys: Tensor
    updates: Tensor


def verify(backend: OpsBackend, call: RecurrentCall) -> Draft:
    """The three outputs, of which the buffers held NaN; the pool keeps its bits."""
    state = call.state.clone(memory_format=torch.preserve_format)
    arguments = verify_call(call, fill=math.nan)
    o = backend("recurrent_gated_delta_rule_verify", *arguments)
    assert_bitwise(call.state, state, "pool after verify")
    return Draft(o, arguments.keys, arguments.updates)


def commit(
    backend: OpsBackend, call: RecurrentCall, draft: Draft, accepted: Sequence[int], dtype: torch.dtype = torch.int64
) -> Tensor:
    """The pool after the call; ``call`` keeps its own."""
    state = call.state.clone(memory_format=torch.preserve_format)
    arguments = CommitCall(*draft[1:], call.g, torch.tensor(accepted, dtype=dtype), state, call.state_indices)
    assert backend("recurrent_gated_delta_rule_commit", *arguments) is None
    return state


def check(backend: OpsBackend, call: RecurrentCall, accepted: Sequence[int], dtype: torch.dtype = torch.int64) -> None:
    """Outputs, buffers and committed pool equal the definition; zeros for negative indices, other rows keep their
    bits.
    """
    draft = verify(backend, call)
    reference = recurrent_gated_delta_rule_verify(*call)
    assert draft.o.dtype == call.v.dtype
    nowhere = [n for n, row in enumerate(rows_of(call)) if row < 0]
    for name, out, ref in zip(Draft._fields, draft, reference):
        assert_error(name, out, ref, TOLERANCE[out.dtype].output)
        assert_bitwise(out[nowhere], torch.zeros_like(out[nowhere]), f"{name} of a negative index")
    pool = commit(backend, call, draft, accepted, dtype)
    ref_pool = recurrent_gated_delta_rule_commit(
        *reference[1:], call.g, torch.tensor(accepted), call.state, call.state_indices
    )
    moved = [row for n, row in enumerate(rows_of(call)) if row >= 0 and accepted[n]]
    kept = [row for row in range(call.state.shape[0]) if row not in moved]
    assert_error("pool", pool[moved], ref_pool[moved], TOLERANCE[pool.dtype].state)
    assert_bitwise(pool[kept], call.state[kept], "rows that commit must not touch")


def accepted_prefix_equals_one_call(
    backend: OpsBackend, call: RecurrentCall, accepted: Sequence[int], bitwise: bool = True
) -> None:
    """verify and commit leave what recurrent_gated_delta_rule on the accepted tokens leaves; verify's outputs are its
    outputs.
    """
    draft = verify(backend, call)
    pool = commit(backend, call, draft, accepted)
    expected = call.state.clone()
    for length in set(accepted):
        _, after = run(backend, call._replace(**{name: getattr(call, name)[:, :length] for name in call._fields[:5]}))
        for n, row in enumerate(rows_of(call)):
            if row >= 0 and accepted[n] == length:
                expected[row] = after[row]
    for name, out, ref in (("o", draft.o, run(backend, call)[0]), ("pool", pool, expected)):
        if bitwise:
            assert_bitwise(out, ref, name)
        else:
            assert_error(name, out, ref, 1e-6 if out.dtype in (torch.float32, torch.float64) else 1e-2)


def any_bits_are_kept_without_an_accepted_token(backend: OpsBackend, call: RecurrentCall) -> None:
    """NaN of any kind, -0, subnormal numbers: nothing goes through arithmetic."""
    integers = {8: torch.int64, 4: torch.int32, 2: torch.int16}[call.state.element_size()]
    limits = torch.iinfo(integers)
    bits = torch.randint(limits.min, limits.max, call.state.shape, dtype=integers)
    any_bits = call._replace(state=bits.view(call.state.dtype))
    draft = verify(backend, any_bits)
    assert_bitwise(commit(backend, any_bits, draft, [0] * call.v.shape[0]), any_bits.state, "pool")


def negative_index_is_not_a_row(backend: OpsBackend, call: RecurrentCall) -> None:
    """-1 means neither row 0 nor the last row: all pool rows are kept, NaN in them stays there."""
    N, T = call.v.shape[:2]
    for row in (-1, -2, -call.state.shape[0], -(2**31)):
        nowhere = with_rows(call._replace(state=torch.full_like(call.state, math.nan)), [row] * N)
        draft = verify(backend, nowhere)
        for name, out in zip(Draft._fields, draft):
            assert_bitwise(out, torch.zeros_like(out), f"{name} of index {row}")
        assert_bitwise(commit(backend, nowhere, draft, [T] * N), nowhere.state, f"pool after index {row}")


def other_rows_do_not_matter(backend: OpsBackend, call: RecurrentCall, rows: Sequence[int]) -> None:
    """NaN in a row that no index names reaches nothing."""
    call = with_rows(call, rows)
    used, accepted = [row for row in rows if row >= 0], [call.v.shape[1]] * len(rows)
    dirty = call._replace(state=call.state.clone())
    dirty.state[[row for row in range(call.state.shape[0]) if row not in rows]] = math.nan
    draft, bad_draft = verify(backend, call), verify(backend, dirty)
    for name, out, bad in zip(Draft._fields, draft, bad_draft):
        assert_bitwise(bad, out, name)
    pool, bad_pool = commit(backend, call, draft, accepted), commit(backend, dirty, bad_draft, accepted)
    assert_bitwise(bad_pool[used], pool[used], "pool")


def nan_stays_in_its_sequence(backend: OpsBackend, call: RecurrentCall, n: int, value: float) -> None:
    """``value`` in the tokens and the state of sequence n changes no bit of the others."""
    accepted, row = [call.v.shape[1]] * call.v.shape[0], rows_of(call)[n]
    bad = call._replace(**{name: getattr(call, name).clone() for name in (*call._fields[:5], "state")})
    for name in call._fields[:5]:
        getattr(bad, name)[n] = -abs(value) if name == "g" else value  # a g above 0 is refused
    bad.state[row] = value
    draft, bad_draft = verify(backend, call), verify(backend, bad)
    pools = commit(backend, call, draft, accepted), commit(backend, bad, bad_draft, accepted)
    for t in (*draft, *bad_draft):
        t[n] = 0
    for name, out, dirty in zip(Draft._fields, draft, bad_draft):
        assert_bitwise(dirty, out, name)
    for pool in pools:
        pool[row] = 0
    assert_bitwise(pools[1], pools[0], "pool")


def rejected_tokens_do_not_matter(backend: OpsBackend, call: RecurrentCall, accepted: Sequence[int]) -> None:
    """Neither to the outputs of the accepted ones nor to the committed state, even when they are NaN."""
    bad = call._replace(**{name: getattr(call, name).clone() for name in call._fields[:5]})
    for n, count in enumerate(accepted):
        for t in bad[:5]:
            t[n, count:] = math.nan
    draft, bad_draft = verify(backend, call), verify(backend, bad)
    for n, count in enumerate(accepted):
        for name, out, dirty in zip(Draft._fields, draft, bad_draft):
            assert_bitwise(dirty[n, :count], out[n, :count], name)
    assert_bitwise(commit(backend, bad, bad_draft, accepted), commit(backend, call, draft, accepted), "pool")


def rows_do_not_depend_on_others(backend: OpsBackend, call: RecurrentCall, accepted: Sequence[int]) -> None:
    draft = verify(backend, call)
    pool = commit(backend, call, draft, accepted)
    for n, row in enumerate(rows_of(call)):
        alone = with_rows(call._replace(**{name: getattr(call, name)[n : n + 1] for name in call._fields[:5]}), [row])
        one = verify(backend, alone)
        for name, out, whole in zip(Draft._fields, one, draft):
            assert_error(name, out, whole[n : n + 1], TOLERANCE[out.dtype].output)
        assert_error("pool", commit(backend, alone, one, [accepted[n]])[row], pool[row], TOLERANCE[pool.dtype].state)


def repeated_runs_are_equal(backend: OpsBackend, call: RecurrentCall, accepted: Sequence[int]) -> None:
    """Also with poisoned allocations: every element is written."""
    draft = verify(backend, call)
    pool = commit(backend, call, draft, accepted)
    with poisoned_allocations():
        for _ in range(2):
            again = verify(backend, call)
            for name, out, expected in zip(Draft._fields, again, draft):
                assert_bitwise(out, expected, name)
            assert_bitwise(commit(backend, call, again, accepted), pool, "pool")


def arguments_stay_as_they_are(backend: OpsBackend, call: RecurrentCall, accepted: Sequence[int]) -> None:
    """Only the buffers and the committed pool change; o shares memory with no argument."""
    before = [t.clone() for t in call if isinstance(t, Tensor)]
    draft = verify(backend, call)
    arguments = [t for t in (*call, draft.keys, draft.updates) if isinstance(t, Tensor)]
    assert draft.o.untyped_storage().data_ptr() not in [t.untyped_storage().data_ptr() for t in arguments]
    keys, updates = draft.keys.clone(), draft.updates.clone()
    commit(backend, call, draft, accepted)
    for t, old in zip(
        [t for t in call if isinstance(t, Tensor)] + [draft.keys, draft.updates], [*before, keys, updates]
    ):
        assert_bitwise(t, old, "argument")
