"""Which parameters an optimiser should let decay."""

from collections.abc import Iterable

from torch import nn


def parameter_groups(parameters: Iterable[nn.Parameter], weight_decay: float) -> list[dict]:
    """Groups for an optimiser: matrices decay, vectors (norms, biases) and what has `_no_weight_decay` do not.

    Args:
        parameters: of a model.
        weight_decay: of the matrices.

    Returns: one or two groups, each with "params" and "weight_decay"; none is empty.
    """
    groups: tuple[list, list] = ([], [])
    for parameter in parameters:
        groups[parameter.dim() >= 2 and not getattr(parameter, "_no_weight_decay", False)].append(parameter)
    rest, decaying = groups
    both = {"params": decaying, "weight_decay": weight_decay}, {"params": rest, "weight_decay": 0.0}
    return [group for group in both if group["params"]]


def exempt_from_weight_decay(parameter: nn.Parameter) -> None:
    """Marks a parameter that should not decay, as flash-linear-attention does."""
    parameter._no_weight_decay = True  # type: ignore[attr-defined]  # none of torch's, `parameter_groups` reads it
