"""Layers that are divided over ranks, of which each way of dividing changes the class."""

from __future__ import annotations

from torch import nn

from jetkernels.modules.stand_in import HasStandIn


class Divided(HasStandIn):
    """Comes in front of the class of a module that ranks share."""


def refuse_divided(what: str, model: nn.Module) -> None:
    """Raises ValueError where a module is divided by heads or along the sequence: these two do not go together.

    Args:
        what: is asked for, for people.
        model: all of it.
    """
    for name, module in model.named_modules():
        if isinstance(module, Divided):
            raise ValueError(f"{what}: the model must not be divided yet, got a {type(module).__name__} at {name}")
