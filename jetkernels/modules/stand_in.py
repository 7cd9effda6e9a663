"""Whether something may stand for the call of a module: its `step`, or a fused op that takes its weights.

It stands for the forward that it was written beside. Where a hook, a subclass or a function put in that forward's place
wants to be called, nothing does.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

from torch import nn

from .linear import has_hooks

_Forwards = tuple[tuple[type, Callable], ...]


class HasStandIn(nn.Module):
    """A module that knows the `forward` with which its class was made, and those of the classes it is derived from."""

    _forwards: ClassVar[_Forwards] = ()
    _step_is_of_forward: ClassVar[bool] = False

    def __init_subclass__(cls, **options: Any):
        super().__init_subclass__(**options)
        classes: list[Any] = list(cls.__mro__)
        # Those of older classes as they were then: somebody may have replaced one since.
        known = dict(pair for c in classes for pair in c.__dict__.get("_forwards", ()))
        forwards: list[tuple[type, Any]] = [(c, known.get(c, getattr(c, "forward", None))) for c in classes]
        cls._forwards = tuple((c, f) for c, f in forwards if not _is_abstract(f))
        newest = next(c for c in classes if "forward" in c.__dict__ or "step" in c.__dict__)
        cls._step_is_of_forward = "step" in newest.__dict__


def _is_abstract(forward: object) -> bool:
    return forward in (None, nn.Module.forward) or getattr(forward, "__isabstractmethod__", False)


def is_as_written(module: HasStandIn) -> bool:
    """Whether a call runs the forwards with which its classes were made, and nothing beside them."""
    # On the path of every decoded token.
    for cls, forward in module._forwards:
        if cls.forward is not forward:  # type: ignore[attr-defined]  # `type` has no forward, these have
            return False
    return not has_hooks(module)


def may_step(module: HasStandIn) -> bool:
    """Whether its `step` does for one new token of each sequence what a call would do."""
    return module._step_is_of_forward and is_as_written(module)


def runs_own_code(module: nn.Module) -> bool:
    """Whether a call runs code of this library or of PyTorch and nothing else."""
    cls = type(module)
    forward = getattr(cls.forward, "__globals__", {}).get("__name__", "")
    own = all(name.startswith(("jetkernels.", "torch.nn.")) for name in (cls.__module__, forward))
    return own and not has_hooks(module)
