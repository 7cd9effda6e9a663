"""What must be true of a case: its values, its bits, and the memory around them."""

import math
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from support import draft_properties, pool_properties, prefill_properties
from support import sequence_properties as properties
from support.arguments import SEQUENCE_OPS, TOKENS, DeltaInputs, PrefillCall, accumulator, floating, with_pool
from support.backends import REFERENCE, OpsBackend
from support.comparison import GATES, TOLERANCE, ZERO, assert_bitwise, assert_error, rms
from support.device_backends import CHUNK_STATE_CEILING
from support.memory import poisoned_allocations
from torch import Tensor

from jetkernels.plain._chunks import CHUNK
from reference.recurrent_gated_delta_rule_commit import recurrent_gated_delta_rule_commit
from reference.recurrent_gated_delta_rule_verify import recurrent_gated_delta_rule_verify

from .backends import set_threads, takes_kernels_only
from .draw import Case

PERTURBATIONS = 3
# How many threads a case's second call has: our kernels' bits depend neither on them nor on the call.
_OTHER = {1: 3, 2: 1, 4: 2}


class Measured(NamedTuple):
    """An error against the definition; ``ill`` where the definition itself moves more than the ceiling when its inputs
    are rounded.
    """

    name: str
    dtype: torch.dtype
    error: float
    ceiling: float
    ill: bool


def _set_other_threads(case: Case, backend: OpsBackend) -> None:
    # The products that the plain path calls promise their bits for one number of threads only.
    set_threads(case.threads if backend.name == "plain" else _OTHER[case.threads])


def check(case: Case, backend: OpsBackend, values: bool = True) -> list[Measured]:
    """Raises AssertionError where something is wrong. Without ``values`` only bits are looked at, and no definition is
    computed.
    """
    set_threads(case.threads)
    if case.op in SEQUENCE_OPS:
        return _check_sequences(case, backend, values)
    return _check_pool(case, backend, values)


# ---- memory


def _storage(t: Tensor) -> Tensor:
    """All bytes of the storage that ``t`` looks at, also those between and around its elements."""
    return torch.tensor([], dtype=torch.uint8).set_(t.untyped_storage())


def _twin(t: Tensor) -> Tensor:
    """A copy of ``t`` with its strides, and with what lies around its elements."""
    return torch.tensor([], dtype=t.dtype).set_(
        _storage(t).clone().untyped_storage(), t.storage_offset(), t.shape, t.stride()
    )


def _tensors(values: Sequence) -> list[Tensor]:
    return [t for t in values if isinstance(t, Tensor)]


class _Unchanged:
    """The storages of ``tensors`` keep every bit; ``outs`` share memory with none of them."""

    def __init__(self, tensors: Sequence):
        self.tensors = _tensors(tensors)
        self.before = [_storage(t).clone() for t in self.tensors]

    def check(self, outs: Sequence[Tensor] = ()) -> None:
        for t, before in zip(self.tensors, self.before):
            assert torch.equal(_storage(t), before), f"the call wrote into an argument of shape {list(t.shape)}"
        mine = {t.untyped_storage().data_ptr() for t in self.tensors if t.numel()}
        assert not [out for out in outs if out.numel() and out.untyped_storage().data_ptr() in mine], (
            "an output shares an argument's memory"
        )


# ---- values


def _groups(name: str, t: Tensor, inputs: NamedTuple) -> Iterator[Tensor]:
    """The part of ``t`` that each sequence has; all of it where sequences share it."""
    if name in ("dweight", "dbias"):
        yield t
    elif getattr(inputs, "cu_seqlens", None) is not None and (name == "output" or name[1:] in TOKENS):
        bounds = inputs.cu_seqlens.tolist()
        yield from (t[:, begin:end] for begin, end in zip(bounds[:-1], bounds[1:]))
    else:
        yield from t.split(1)


def _by_chunked_kernels(case: Case, backend: OpsBackend) -> bool:
    """Whether operands are fp16."""
    return isinstance(case.inputs, (DeltaInputs, PrefillCall)) and takes_kernels_only(backend.name)


def _ceiling(name: str, out: Tensor, case: Case, backend: OpsBackend) -> float:
    """By the op's dtype; where a result is stored in a narrower one, by that."""
    if name == "state" and _by_chunked_kernels(case, backend):
        return max(CHUNK_STATE_CEILING, TOLERANCE[out.dtype].state)
    kind = {"output": "output", "keys": "output", "updates": "output", "state": "state"}.get(name)
    kind = kind or ("gate_gradient" if name[1:] in GATES else "gradient")
    stored = getattr(TOLERANCE[out.dtype], kind)
    return (
        stored if kind == "state" or name in ("keys", "updates") else max(stored, getattr(TOLERANCE[case.dtype], kind))
    )


def compare(
    case: Case,
    backend: OpsBackend,
    outs: dict[str, Tensor],
    define: Callable[[Callable[[Tensor], Tensor]], dict[str, Tensor]],
) -> list[Measured]:
    """``outs`` within the tolerances of ``define(change)``, the fp64 definition of the inputs after ``change``,
    sequence by sequence.

    Where a true result is what little large terms leave of each other no arithmetic can be within the table. There the
    ceiling is what the definition itself moves when every input moves by at most half of the table's ceiling, relative
    to itself.
    """
    set_threads(1)  # its many small steps are no work for several
    refs = define(lambda t: t.double())
    assert outs.keys() == refs.keys()
    moved: dict[float, list[dict[str, Tensor]]] = {}

    def movement(name: str, number: int, ceiling: float) -> float:
        if ceiling not in moved:
            generator = torch.Generator().manual_seed(case.number)

            def change(t: Tensor) -> Tensor:
                return t.double() * (
                    1 + ceiling / 2 * (2 * torch.rand(t.shape, dtype=torch.float64, generator=generator) - 1)
                )

            moved[ceiling] = [define(change) for _ in range(PERTURBATIONS)]
        true = list(_groups(name, refs[name], case.inputs))[number]
        return max(
            rms(list(_groups(name, refs_moved[name], case.inputs))[number] - true) for refs_moved in moved[ceiling]
        )

    found = []
    for name, out in outs.items():
        ref, ceiling = refs[name], _ceiling(name, out, case, backend)
        assert out.shape == ref.shape, f"{name} has shape {list(out.shape)}, not {list(ref.shape)}"
        worst, ill = 0.0, False
        # fp16 below its normal numbers: rounding alone is more than the ceiling.
        floor = max(ZERO, torch.finfo(out.dtype).tiny if out.dtype == torch.float16 else 0)
        if _by_chunked_kernels(case, backend):
            floor = max(floor, 1e-4)  # the documented limit
        for number, (mine, true) in enumerate(
            zip(_groups(name, out.detach().double(), case.inputs), _groups(name, ref, case.inputs))
        ):
            size, difference = max(rms(true), floor), rms(mine - true) if mine.numel() else 0.0
            if true.numel() and true.abs().max() > torch.finfo(out.dtype).max / 2:
                continue  # beyond what the dtype holds
            if difference <= ceiling * size:
                worst = max(worst, difference / size)
                continue
            allowed = movement(name, number, ceiling)
            assert difference <= allowed, (
                f"{name}, sequence {number}: RMS error {difference / size:.2e}, ceiling {ceiling:.0e} "
                f"({allowed / size:.1e} for inputs that move as much)"
            )
            ill = True
        found.append(Measured(name, out.dtype, worst, ceiling, ill))
    set_threads(case.threads)
    return found


# The properties compare a call with one on copies. Copies have other strides, which may decide in which order a product
# is summed: both calls get copies then.
def _changed(inputs: NamedTuple, change: Callable[[Tensor], Tensor]) -> NamedTuple:
    return inputs._replace(**{name: change(t) for name, t in floating(inputs).items()})


# ---- ops over sequences


def _sequence_definition(case: Case, change: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
    inputs = _changed(case.inputs, change)
    leaves = {name: t.requires_grad_(case.grads is not None) for name, t in floating(inputs).items()}
    outs = REFERENCE[case.op](*inputs)
    result = {"output": outs[0].detach(), "state": outs[1].detach()}
    if case.grads is None:
        return result
    pairs = [(out, change(grad)) for out, grad in zip(outs, case.grads) if grad is not None and out.requires_grad]
    grads = [torch.zeros_like(leaf) for leaf in leaves.values()]
    if pairs:
        outputs, cotangents = zip(*pairs)
        grads = torch.autograd.grad(
            outputs, list(leaves.values()), cotangents, allow_unused=True, materialize_grads=True
        )
    return result | {f"d{name}": grad for name, grad in zip(leaves, grads)}


def _run_sequences(case: Case, backend: OpsBackend, autograd: bool) -> dict[str, Tensor]:
    """Every result by name; through autograd or by a call of the backward op."""
    outs = backend(case.op, *case.inputs)
    result = {"output": outs[0], "state": outs[1]}
    if case.grads is None:
        return result
    found = (backend.gradients if autograd else lambda *args: properties.backward(backend, *args))(
        case.op, case.inputs, case.grads
    )
    return result | {f"d{name}": grad for name, grad in found.items() if name in floating(case.inputs)}


def _check_sequences(case: Case, backend: OpsBackend, values: bool) -> list[Measured]:
    arguments = _Unchanged([*case.inputs, *(case.grads or ())])
    autograd = case.choice.random() < 0.5
    outs = _run_sequences(case, backend, autograd)
    arguments.check(outs.values())
    _set_other_threads(case, backend)
    with poisoned_allocations():
        for name, again in _run_sequences(case, backend, autograd).items():
            assert_bitwise(again, outs[name], f"{name} of a second call, into memory that was NaN,")
    arguments.check()
    dtypes = {"output": case.dtype, "state": accumulator(case.dtype) if case.op.startswith("chunk") else case.dtype}
    dtypes |= {f"d{name}": t.dtype for name, t in floating(case.inputs).items()}
    for name, out in outs.items():
        assert out.dtype == dtypes[name], f"{name} is {out.dtype}, not {dtypes[name]}"
    measured = compare(case, backend, outs, lambda change: _sequence_definition(case, change)) if values else []
    N = outs["state"].shape[0]
    if N and case.choice.random() < 0.25:
        n, value = case.choice.randrange(N), case.choice.choice((math.nan, math.inf))
        properties.nan_stays_in_its_sequence(backend, case.op, _changed(case.inputs, Tensor.clone), n, value)
    if case.choice.random() < 0.25:
        _later_tokens_do_not_matter(case, backend)
    if case.choice.random() < 0.1:
        _calls_at_once(lambda: list(_run_sequences(case, backend, False).values()), backend)
    return measured


def _later_tokens_do_not_matter(case: Case, backend: OpsBackend) -> None:
    """NaN at a token leaves every bit of earlier outputs, and a NaN cotangent every bit of later gradients.

    The chunked kernels leave the values of earlier outputs. They and the plain path of the chunked rule multiply the
    cotangents of a chunk by triangles whose zeros a NaN gets through: there the tokens of later chunks are looked at.
    """
    cu = case.inputs.cu_seqlens
    bounds = [(0, case.inputs[0].shape[1])] if cu is None else list(zip(cu.tolist()[:-1], cu.tolist()[1:]))
    begin, end = case.choice.choice(bounds) if bounds else (0, 0)
    if end - begin < 2 or not case.inputs[0].shape[0]:
        return
    row, t = case.choice.randrange(case.inputs[0].shape[0]), case.choice.randrange(begin + 1, end)
    tokens = {name: x.clone() for name, x in floating(case.inputs).items() if name in TOKENS}
    inputs = case.inputs._replace(**tokens)  # in the layout of the copies, which may decide how a product is summed
    expected = backend(case.op, *inputs)[0]
    for x in tokens.values():
        x[row, t] = math.nan
    out = backend(case.op, *inputs)[0]
    before = f"outputs before a NaN at token {t} of row {row}"
    if _by_chunked_kernels(case, backend):
        # The kernels make such a column again, in another order of summation; infinities of the inputs may be among
        # them.
        known = expected[row, begin:t].isfinite()
        assert_error(before, out[row, begin:t][known], expected[row, begin:t][known], 2 * TOLERANCE[case.dtype].output)
    else:
        assert_bitwise(out[row, begin:t], expected[row, begin:t], before)
    if case.grads is None:
        return
    later = t + 1
    if case.op.startswith("chunk") and backend.name != "cpu":
        later = min(begin + ((t - begin) // CHUNK + 1) * CHUNK, end)
    grad = case.grads[0].clone()
    clean = properties.backward(backend, case.op, case.inputs, (grad, case.grads[1]))
    grad = grad.clone()
    grad[row, t] = math.nan
    for name, dirty in properties.backward(backend, case.op, case.inputs, (grad, case.grads[1])).items():
        if name in TOKENS:
            assert_bitwise(
                dirty[row, later:end],
                clean[name][row, later:end],
                f"d{name} after a NaN cotangent at token {t} of row {row}",
            )


def _calls_at_once(call: Callable[[], list[Tensor]], backend: OpsBackend) -> None:
    """Two threads that call the op get the bits that one gets."""
    if backend.name not in ("cpu", "plain"):
        return
    expected, found = call(), {}

    def work(i: int) -> None:
        found[i] = [call() for _ in range(2)]

    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 2, "a call in a thread of its own raised"
    for results in found.values():
        for outs in results:
            for out, ref in zip(outs, expected):
                assert_bitwise(out, ref, "a call beside another")


# ---- ops on a pool of states


def _pool_define(case: Case, rows: list[int], change: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
    x = _changed(case.inputs, change)
    if case.op == "recurrent_gated_delta_rule_commit":
        return {"state": recurrent_gated_delta_rule_commit(*x)[rows]}
    if case.op == "recurrent_gated_delta_rule_verify":
        o, keys, updates = recurrent_gated_delta_rule_verify(*x)
        number = torch.tensor(case.accepted, dtype=torch.int64)
        pool = recurrent_gated_delta_rule_commit(keys, updates, x.g, number, x.state, x.state_indices)
        return {"output": o, "keys": keys, "updates": updates, "state": pool[rows]}
    out, pool = REFERENCE[case.op](*x)
    return {"output": out, "state": pool[rows]}


def _run_pool(case: Case, backend: OpsBackend) -> tuple[dict[str, Tensor], Tensor]:
    """Results by name, and a pool in the layout of the case's after the call."""
    x, pool = case.inputs, _twin(case.inputs.pool)
    if case.op == "recurrent_gated_delta_rule_commit":
        backend(case.op, *with_pool(x, pool))
        return {}, pool
    if case.op == "recurrent_gated_delta_rule_verify":
        draft = draft_properties.verify(backend, x)
        number = torch.tensor(case.accepted, dtype=torch.int64)
        backend("recurrent_gated_delta_rule_commit", *draft[1:], x.g, number, pool, x.state_indices)
        return {"output": draft.o, "keys": draft.keys, "updates": draft.updates}, pool
    return {"output": backend(case.op, *with_pool(x, pool))}, pool


def _rows(case: Case) -> list[int]:
    """The row of the pool that each sequence has."""
    x = case.inputs
    return prefill_properties.rows_of(x) if isinstance(x, PrefillCall) else pool_properties.rows_of(x)


def _moved(case: Case) -> list[int]:
    """The rows of the pool that may have other bits after the call."""
    x = case.inputs
    if isinstance(x, PrefillCall):
        return prefill_properties.written_rows(x)
    rows = _rows(case)
    moves = {
        "recurrent_gated_delta_rule_verify": case.accepted,
        "recurrent_gated_delta_rule_commit": getattr(x, "num_accepted", None),
    }
    return [row for row, number in zip(rows, moves.get(case.op, [1] * len(rows))) if row >= 0 and number]


def _check_nan(case: Case, backend: OpsBackend, rows: list[int]) -> None:
    """In one sequence that has a row, and tokens."""
    x = case.inputs
    filled = [n for n, part in zip(range(len(rows)), _groups("output", x[0], x)) if rows[n] >= 0 and part.numel()]
    if case.op == "recurrent_gated_delta_rule_commit" or not filled or case.choice.random() >= 0.25:
        return
    n, value = case.choice.choice(filled), case.choice.choice((math.nan, math.inf))
    properties_of = {
        "recurrent_gated_delta_rule_verify": draft_properties,
        "prefill_gated_delta_rule": prefill_properties,
    }
    properties_of.get(case.op, pool_properties).nan_stays_in_its_sequence(backend, _changed(x, Tensor.clone), n, value)


def _has_the_bits_of_the_op_without_a_pool(case: Case, backend: OpsBackend) -> bool:
    """In plain PyTorch only nearly. Kernels make columns with numbers beyond fp16 again, in whole sequences: a mark's
    differ from those of a sequence that ends there.
    """
    x = case.inputs
    if not isinstance(x, PrefillCall) or x.cu_seqlens.shape[0] == 1 or backend.name == "plain":
        return False
    return not (_by_chunked_kernels(case, backend) and any((t.abs() > 8192).any() for t in (x.v, x.state)))


def _check_pool(case: Case, backend: OpsBackend, values: bool) -> list[Measured]:
    x = case.inputs
    arguments = _Unchanged(x)
    outs, pool = _run_pool(case, backend)
    arguments.check(outs.values())
    _set_other_threads(case, backend)
    with poisoned_allocations():
        outs_again, pool_again = _run_pool(case, backend)
    for (name, out), again in zip(outs.items(), outs_again.values()):
        assert_bitwise(again, out, f"{name} of a second call, into memory that was NaN,")
    assert torch.equal(_storage(pool_again), _storage(pool)), "the pool after a second call"
    arguments.check()

    rows, moved = _rows(case), _moved(case)
    expected = _twin(x.pool)
    expected[moved] = pool[moved]
    assert torch.equal(_storage(pool), _storage(expected)), (
        "rows of the pool that no sequence moves, or what lies between its elements"
    )
    for name, out in outs.items():
        dtype = case.dtype if name == "output" else accumulator(case.dtype)
        assert out.dtype == dtype, f"{name} is {out.dtype}, not {dtype}"
        for row, part in zip(rows, _groups(name, out, x)):
            if row < 0:
                assert_bitwise(part, torch.zeros_like(part), f"{name} of a negative index")

    # Rows that nobody has hold NaN: the definition is asked for the others only.
    outs["state"] = pool[moved]
    measured = compare(case, backend, outs, lambda change: _pool_define(case, moved, change)) if values else []
    _check_nan(case, backend, rows)
    if _has_the_bits_of_the_op_without_a_pool(case, backend) and case.choice.random() < 0.5:
        prefill_properties.equals_the_op_without_a_pool(backend, x)
    if case.choice.random() < 0.1:
        _calls_at_once(lambda: [*(results := _run_pool(case, backend))[0].values(), results[1]], backend)
    return measured
