"""What the trainings of a stage cost: kept in its folder, for the report over all stages."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from jetkernels.files import write_atomic

from .training import Losses

FILE = "cost.json"


class Cost(NamedTuple):
    """Of all trainings of a stage, those of earlier runs included.

    Attributes:
        tokens: that were trained on, over all ranks.
        seconds: that the steps took.
    """

    tokens: int
    seconds: float

    @property
    def tokens_per_second(self) -> float:
        """0 where no time was taken."""
        return self.tokens / self.seconds if self.seconds else 0.0


def cost_of(trainings: Sequence[Losses]) -> Cost:
    """Of several trainings."""
    return Cost(sum(losses.all_tokens for losses in trainings), sum(losses.seconds for losses in trainings))


def write_cost(folder: Path, cost: Cost) -> None:
    """Writes what the trainings of the stage in `folder` cost."""
    write_atomic(folder / FILE, (json.dumps(cost._asdict()) + "\n").encode())


def read_cost(folder: Path) -> Cost:
    """What `write_cost` wrote; nothing where no such file is: no training, or one of an earlier version."""
    path = folder / FILE
    if not path.is_file():
        return Cost(0, 0.0)
    return Cost(**json.loads(path.read_text(encoding="utf-8")))
