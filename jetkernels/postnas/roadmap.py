"""The way from the base to the hybrid: one quality and one generation speed behind each stage."""

from __future__ import annotations

from typing import NamedTuple

from jetkernels.model import JetNemotronForCausalLM
from jetkernels.model.speed import decode_speed

from .linear_path import LinearPath
from .super_network import Placement, SuperNetwork


class Milestone(NamedTuple):
    """A model on the way.

    Attributes:
        stage: behind which it stands.
        what: it is, in words.
        quality: the objective by which candidates are compared, more is better.
        tokens_per_second: that it decodes.
    """

    stage: str
    what: str
    quality: float
    tokens_per_second: float


def speed_of(
    base: JetNemotronForCausalLM, path: LinearPath | None, placement: Placement, window_size: int, context: int
) -> float:
    """Decode tokens per second of a hybrid (`decode_speed`); what its weights are makes no difference.

    Args:
        base: whose layers stay where they are not replaced.
        path: what is in the `jet` layers; None: the base itself is timed.
        placement: kind of each layer.
        window_size: of the windowed layers.
        context: tokens before the first step.
    """
    model = base if path is None else SuperNetwork(base, path.paths(), window_size).assemble(placement)
    return decode_speed(model, context)[0]
