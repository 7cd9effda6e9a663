"""Calls that change a state in place and may be run a second time by activation checkpointing.

`torch.utils.checkpoint` runs a layer again in the backward pass, when its state already holds what came later. The
second run must start from the state as the first found it, and must not change it. So a call that may be repeated keeps
a copy of what it started from, and a run inside a backward pass looks for the call that it repeats: the one of the same
state with the same input.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

# How many elements of an input are kept to recognise it, and how far a second run's may be from them, relative to their
# norm.
SAMPLE_SIZE = 256
TOLERANCE = 1e-2


def in_backward() -> bool:
    """Whether this thread is inside a backward pass, as a layer that is run again for its gradients is."""
    return torch._C._current_graph_task_id() != -1


def may_be_repeated(x: Tensor) -> bool:
    """Whether a call on x can be run again in a backward pass. Reentrant checkpointing first runs without gradients."""
    return torch.is_grad_enabled() or x.requires_grad


class RepeatableCall:
    """One call's use of a state, where `may_be_repeated`. Made before the state is read; `finish` ends it.

    Attributes:
        before: what the call has to start from.
        repeats: it is a second run, so the state must stay as it is.

    Raises:
        RuntimeError: this is a second run, and which call it repeats cannot be told.
    """

    def __init__(self, layer: str, state: Sequence[Tensor], x: Tensor):
        if torch.compiler.is_compiling():
            torch._dynamo.graph_break(
                f"{layer}: training with a state is not compiled; call it without a state, or without gradients"
            )
        self.state, self.x = state, x
        self.sample = _sample(x)
        self.history = _histories.setdefault(state[0], _History())
        earlier = self.history.find(layer, state, x, self.sample)
        self.repeats = earlier is not None
        before = earlier.before if earlier is not None else tuple(tensor.clone() for tensor in state)
        assert before is not None  # a call that has ended is not found
        self.before = before

    def finish(self, after: Sequence[Tensor], output: Tensor) -> None:
        """Writes the state `after` the call, unless it is a second run; `output` is a result with its gradient."""
        if self.repeats:
            return
        for old, new in zip(self.state, after):
            old.copy_(new.detach())
        self.history.add(_Call(self.before, self.x.shape, self.sample), output, self.x)


class _Call:
    """What a call started from, and by what it is recognised. Lives as long as it can be repeated."""

    def __init__(self, before: Sequence[Tensor], shape: torch.Size, sample: Tensor):
        self.before: Sequence[Tensor] | None = before
        self.shape = shape
        self.sample = sample

    def distance(self, x: Tensor, sample: Tensor) -> float:
        """Of two inputs, relative; a NaN equals a NaN."""
        if self.before is None or self.shape != x.shape or self.sample.device != sample.device:
            return float("inf")
        if not torch.equal(self.sample.isnan(), sample.isnan()):
            return float("inf")
        mine, other = (s.nan_to_num(0.0, 0.0, 0.0) for s in (self.sample, sample))
        norm = mine.norm().item()
        return (mine - other).norm().item() / norm if norm else other.norm().item()

    def end(self) -> None:
        self.before = None

    def end_with_backward(self, *_: object) -> None:
        """After a backward pass that frees the graph nothing is run again."""
        if not torch._C._autograd._get_current_graph_task_keep_graph():
            torch.autograd.Variable._execution_engine.queue_callback(self.end)


class _History:
    """The calls of one state that can still be repeated, owned by what would repeat them.

    Attributes:
        calls: that can still be repeated.
        made_in_backward: the state belongs to a function that is being run again, so its calls are first ones.
    """

    def __init__(self) -> None:
        self.calls: list[weakref.ref[_Call]] = []
        self.made_in_backward = False

    def add(self, call: _Call, output: Tensor, x: Tensor) -> None:
        if output.grad_fn is not None:
            # The graph owns the call through its hook.
            output.grad_fn.register_hook(call.end_with_backward)
        elif x.requires_grad:
            # Reentrant checkpointing owns the input.
            _owned_by_input.setdefault(x, []).append(call)
        self.calls = [ref for ref in self.calls if (kept := ref()) is not None and kept.before is not None]
        self.calls.append(weakref.ref(call))

    def find(self, layer: str, state: Sequence[Tensor], x: Tensor, sample: Tensor) -> _Call | None:
        """The call that a run on x repeats; None if it is a first one."""
        if not in_backward():
            self.made_in_backward = False
            return None
        calls = [call for ref in self.calls if (call := ref()) is not None]
        # Every call changes its state: one that nothing has changed was made just now.
        self.made_in_backward |= not self.calls and state[0]._version == 0
        distances = [(call.distance(x, sample), call) for call in calls]
        near = [call for distance, call in distances if distance <= TOLERANCE]
        found = [call for distance, call in distances if distance == 0] or near
        if self.made_in_backward and not found:
            return None
        if self.made_in_backward or len(found) != 1:
            raise RuntimeError(
                f"{layer}: this call runs in a backward pass, as activation checkpointing does, and the call it "
                f"repeats cannot be told: {len(found)} calls on this state kept such an input. Checkpoint with "
                "use_reentrant=False, without a second checkpoint inside; give each call of a state another input; and "
                "make a state that belongs to the checkpointed function there, with its final values. Or do not "
                "checkpoint calls with a state."
            )
        # One that no graph owns has no hook that would end it.
        found[0].end_with_backward()
        return found[0]


_histories = WeakTensorKeyDictionary()
_owned_by_input = WeakTensorKeyDictionary()


def _sample(x: Tensor) -> Tensor:
    """Some elements of x, evenly spaced, in fp32 or fp64."""
    flat = x.detach().reshape(-1)
    return flat[:: max(1, flat.numel() // SAMPLE_SIZE)].to(torch.promote_types(x.dtype, torch.float32), copy=True)
