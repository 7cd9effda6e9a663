"""The properties that every op over whole sequences must have, written once for the delta rule and both convolutions.

A property takes a backend, the name of an op and its inputs (a named tuple of `arguments`).
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from support.arguments import TOKENS, DeltaInputs, cotangents, floating
from support.backends import OpsBackend, check_gradients, check_outputs, dg_floor
from support.comparison import ZERO, assert_bitwise, assert_gradients, assert_outputs
from support.layouts import far_apart
from support.memory import poisoned_allocations
from torch import Tensor


def state_name(inputs: NamedTuple) -> str:
    return "initial_state" if isinstance(inputs, DeltaInputs) else "conv_state"


def state_of(inputs: NamedTuple) -> Tensor | None:
    return getattr(inputs, state_name(inputs))


def on_tokens(inputs: NamedTuple, change) -> NamedTuple:
    return inputs._replace(**{name: change(t) for name, t in inputs._asdict().items() if name in TOKENS})


def part(inputs: NamedTuple, begin: int, end: int, state: Tensor | None) -> NamedTuple:
    """Tokens begin to end of every row, with another state and no cu_seqlens."""
    return on_tokens(inputs, lambda t: t[:, begin:end])._replace(**{state_name(inputs): state, "cu_seqlens": None})


def sequences(inputs: NamedTuple) -> Iterator[tuple[int, slice, NamedTuple]]:
    """Each packed sequence n, its tokens, and the inputs of a call with it alone."""
    bounds, S = inputs.cu_seqlens.tolist(), state_of(inputs)
    for n, (begin, end) in enumerate(zip(bounds[:-1], bounds[1:])):
        yield n, slice(begin, end), part(inputs, begin, end, None if S is None else S[n : n + 1])


def any_split_equals_one_call(backend: OpsBackend, op: str, inputs: NamedTuple, lengths: list[int]) -> None:
    whole = backend(op, *inputs)
    S, parts, begin = state_of(inputs), [], 0
    for length in lengths:
        out, S = backend(op, *part(inputs, begin, begin + length, S))
        parts.append(out)
        begin += length
    assert_outputs((torch.cat(parts, 1), S), whole, inputs[0].dtype)


def packed_equals_separate(backend: OpsBackend, op: str, inputs: NamedTuple) -> None:
    """Forward and backward of each sequence alone."""
    dtype, grads = inputs[0].dtype, cotangents(inputs)
    outs, packed = backend(op, *inputs), backend.gradients(op, inputs, grads)
    shared = {
        name: torch.zeros_like(t, dtype=torch.float64) for name, t in packed.items() if name in ("weight", "bias")
    }
    for n, here, alone in sequences(inputs):
        alone_grads = (grads[0][:, here], grads[1][n : n + 1])
        alone_outs = backend(op, *alone)
        assert_outputs((outs[0][:, here], outs[1][n : n + 1]), alone_outs, dtype)
        separate = backend.gradients(op, alone, alone_grads)
        for name in shared:
            shared[name] += separate.pop(name)
        cut = {name: packed[name][:, here] if name in TOKENS else packed[name][n : n + 1] for name in separate}
        floor = dg_floor(alone_outs, alone_grads) if isinstance(inputs, DeltaInputs) else ZERO
        assert_gradients(cut, separate, dtype, floor)
    assert_gradients({name: packed[name] for name in shared}, shared, dtype)


def rows_do_not_depend_on_others(backend: OpsBackend, op: str, inputs: NamedTuple) -> None:
    outs, S = backend(op, *inputs), state_of(inputs)
    for b in range(inputs[0].shape[0]):
        alone = on_tokens(inputs, lambda t: t[b : b + 1])._replace(
            **{state_name(inputs): None if S is None else S[b : b + 1]}
        )
        assert_outputs([out[b : b + 1] for out in outs], backend(op, *alone), inputs[0].dtype)


def repeated_runs_are_equal(backend: OpsBackend, op: str, inputs: NamedTuple) -> None:
    """Bitwise, forward and backward."""
    grads = cotangents(inputs)
    first, first_grads = backend(op, *inputs), backend.gradients(op, inputs, grads)
    for _ in range(3):
        for out, again in zip(first, backend(op, *inputs)):
            assert_bitwise(again, out, op)
        for name, again in backend.gradients(op, inputs, grads).items():
            assert_bitwise(again, first_grads[name], f"d{name}")


def nan_stays_in_its_sequence(backend: OpsBackend, op: str, inputs: NamedTuple, n: int, value: float) -> None:
    """``value`` (NaN or inf) all over sequence n, its state and its cotangents changes no bit of another sequence."""
    packed = inputs.cu_seqlens is not None
    names = [name for name in floating(inputs) if name in TOKENS] + (
        [state_name(inputs)] if state_of(inputs) is not None else []
    )
    grads = cotangents(inputs)
    poison = {name: getattr(inputs, name).clone() for name in names}
    bad_grads = tuple(grad.clone() for grad in grads)
    here = (0, slice(*inputs.cu_seqlens[n : n + 2].tolist())) if packed else (n,)
    for name in names:
        # a g above 0 is refused
        poison[name][here if name in TOKENS else (n,)] = -abs(value) if name == "g" else value
    bad_grads[0][here], bad_grads[1][n] = value, value
    bad = inputs._replace(**poison)

    def others(t: Tensor, by_token: bool) -> Tensor:
        t = t.detach().clone()
        t[here if by_token else (n,)] = 0
        return t

    for out, dirty, by_token in zip(backend(op, *inputs), backend(op, *bad), (True, False)):
        assert_bitwise(others(dirty, by_token), others(out, by_token), "output" if by_token else "state")
    clean = backend.gradients(op, inputs, grads)
    for name, dirty in backend.gradients(op, bad, bad_grads).items():
        if name in names:
            assert_bitwise(others(dirty, name in TOKENS), others(clean[name], name in TOKENS), f"d{name}")


def every_element_is_written(backend: OpsBackend, op: str, inputs: NamedTuple) -> None:
    grads = cotangents(inputs)
    expected, expected_grads = backend(op, *inputs), backend.gradients(op, inputs, grads)
    with poisoned_allocations():
        for what, out, ref in zip(("output", "state"), backend(op, *inputs), expected):
            assert_bitwise(out, ref, what)
        for name, grad in backend.gradients(op, inputs, grads).items():
            assert_bitwise(grad, expected_grads[name], f"d{name}")


def nothing_to_do(backend: OpsBackend, op: str, inputs: NamedTuple) -> None:
    """No tokens or no sequences: empty outputs, states handed through, zero gradients of what is shared."""
    check_outputs(backend, op, inputs)
    check_gradients(backend, op, inputs)


def strides_beyond_32_bits(backend: OpsBackend, op: str, inputs: NamedTuple, dim: int) -> None:
    """dim 0: between rows; dim 1: between tokens. Each argument in turn, and the cotangent."""
    outs, grads = backend(op, *inputs), cotangents(inputs)
    expected = backend.gradients(op, inputs, grads)
    for name in (name for name in floating(inputs) if name in TOKENS or (dim == 0 and name == state_name(inputs))):
        far = inputs._replace(**{name: far_apart(getattr(inputs, name), dim)})
        for out, ref in zip(backend(op, *far), outs):
            assert_bitwise(out, ref, f"{name} far apart")
        del far
    far_grad = far_apart(grads[0], dim)
    for name, grad in backward(backend, op, inputs, (far_grad, grads[1])).items():
        assert_bitwise(grad, expected[name], f"d{name} with the cotangent far apart")


def backward(backend: OpsBackend, op: str, inputs: NamedTuple, grads: tuple[Tensor | None, ...]) -> dict[str, Tensor]:
    """The backward op itself, without autograd."""
    found = backend(op + "_backward", *grads, *inputs)
    return {name: grad for name, value, grad in zip(inputs._fields, inputs, found) if value is not None}


def arguments_stay_as_they_are(backend: OpsBackend, op: str, inputs: NamedTuple) -> None:
    before = inputs._replace(**{name: t.clone() for name, t in floating(inputs).items()})
    backend(op, *inputs)
    backend.gradients(op, inputs, cotangents(inputs))
    for name, t in floating(before).items():
        assert_bitwise(getattr(inputs, name), t, name)
