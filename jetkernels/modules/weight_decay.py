"""Which parameters an optimiser should let decay."""

from collections.abc import Iterable

from torch import nn


def parameter_groups(parameters: Iterable[nn.Parameter], weight_decay: float) -> list[dict]:
    """Groups for an optimiser: matrices decay, vectors (norms, biases) and what is marked `_no_weight_decay` do not. No
    group is empty.
    """
    groups: tuple[list, list] = ([], [])
    for parameter in parameters:
        groups[parameter.dim() >= 2 and not getattr(parameter, "_no_weight_decay", False)].append(parameter)
    rest, decaying = groups
    both = {"params": decaying, "weight_decay": weight_decay}, {"params": rest, "weight_decay": 0.0}
    return [group for group in both if group["params"]]
