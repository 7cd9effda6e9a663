"""What stands in a layer in the place of its attention: a block, its design, its sizes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

from jetkernels.modules import JetBlockConfig

from .blocks import BLOCKS
from .design import DESIGNS, Design, DesignedBlock
from .shapes import Shape

JET = "JetBlock"  # the block of this name in BLOCKS, and its own design in DESIGNS


@dataclass(frozen=True)
class LinearPath:
    """A linear block, of one kind for every layer.

    Attributes:
        shape: K, V, H.
        block: a name of BLOCKS.
        design: a name of DESIGNS, of a JetBlock.

    Raises:
        ValueError: there is no such block or design, or another block has a design.
    """

    shape: Shape
    block: str = JET
    design: str = JET

    def __post_init__(self) -> None:
        for what, names in (("block", BLOCKS), ("design", DESIGNS)):
            if getattr(self, what) not in names:
                raise ValueError(f"{what} must be one of {', '.join(names)}, got {getattr(self, what)!r}")
        if self.block != JET and self.design != JET:
            raise ValueError(f"design must be of a JetBlock, got {self.design!r} of a {self.block}")

    def __str__(self) -> str:
        return self.block if self.design == JET else f"{self.block} ({self.design})"

    def config(self) -> JetBlockConfig | None:
        """The sizes as a config of the model has them; None where no config can say what the block is."""
        design = DESIGNS[self.design]
        sizes = Design(kernel_size=design.kernel_size, reduction=design.reduction)
        if self.block != JET or design != sizes:
            return None
        return self.shape.config(
            JetBlockConfig(conv_size=design.kernel_size, dconv_generator_reduction=design.reduction)
        )

    def paths(self) -> JetBlockConfig | Callable[[int], nn.Module]:
        """What `SuperNetwork` takes as its linear paths."""
        if (config := self.config()) is not None:
            return config
        if self.block == JET:
            return lambda size: DesignedBlock(size, self.shape, DESIGNS[self.design])
        return lambda size: BLOCKS[self.block](size, self.shape)
