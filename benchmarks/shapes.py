"""The shapes that are measured, and random inputs of them.

JetBlock, MLP and attention of the published 2B and 4B models (arXiv 2508.15884, table 9), and 128/128, the heads of
Qwen3-Next's linear layers.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class Shape(NamedTuple):
    name: str
    H: int  # value heads
    Hk: int  # query/key heads
    K: int
    V: int
    D: int  # convolution channels, H * V
    R: int  # generator width
    W: int  # taps
    F: int = 0  # width of the MLP; 0: no model with these heads has one
    A: tuple[int, int, int] | None = None  # attention: query heads, key heads, head dimension; None as F


SHAPES = (
    Shape("2b", H=12, Hk=12, K=96, V=256, D=3072, R=384, W=4, F=8960, A=(12, 2, 128)),
    Shape("4b", H=16, Hk=16, K=128, V=256, D=4096, R=512, W=4, F=11008, A=(16, 2, 128)),
    Shape("128/128", H=32, Hk=16, K=128, V=128, D=4096, R=512, W=4),
)


def chosen_shapes(name: str) -> list[Shape]:
    """The shapes that a command line's ``--shape`` names: one of them, or all."""
    return [shape for shape in SHAPES if name in (shape.name, "all")]


def few_heads(shape: Shape) -> Shape:
    """Two value heads of a shape and a narrow generator: the same head sizes, little enough work for a simulator."""
    attention = shape.A and (4, 2, shape.A[2])
    return shape._replace(H=2, Hk=2 * shape.Hk // shape.H, D=2 * shape.V, R=shape.R // 4, A=attention)


class Draw:
    """Random tensors of one seed; drawn on the device, because the host would need minutes for the largest."""

    def __init__(self, device: torch.device | str = "cpu", seed: int = 0):
        self.device = torch.device(device)
        self.generator = torch.Generator(self.device).manual_seed(seed)

    def normal(self, *size: int, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> Tensor:
        x = torch.randn(size, generator=self.generator, device=self.device)
        return x.mul_(scale).to(dtype)

    def integers(self, low: int, high: int, size: int) -> Tensor:
        return torch.randint(low, high, (size,), generator=self.generator, device=self.device, dtype=torch.int32)


def delta_rule_inputs(shape: Shape, B: int, T: int, dtype: torch.dtype, draw: Draw | None = None) -> dict[str, Tensor]:
    """q, k, v, g, beta by name. g and beta are fp32, as JetBlock computes them."""
    draw = draw or Draw()
    return {
        "q": draw.normal(B, T, shape.Hk, shape.K, dtype=dtype),
        "k": draw.normal(B, T, shape.Hk, shape.K, dtype=dtype),
        "v": draw.normal(B, T, shape.H, shape.V, dtype=dtype),
        "g": -torch.nn.functional.softplus(draw.normal(B, T, shape.H)),
        "beta": draw.normal(B, T, shape.H).sigmoid(),
    }


def conv_inputs(shape: Shape, B: int, T: int, dtype: torch.dtype, draw: Draw | None = None) -> list[Tensor]:
    """x, hidden, weight, bias."""
    draw = draw or Draw()
    sizes = ((B, T, shape.D), (B, T, shape.R), (shape.D * shape.W, shape.R), (shape.D * shape.W,))
    scales = (1.0, 1.0, shape.R**-0.5, 0.02)
    return [draw.normal(*size, dtype=dtype, scale=scale) for size, scale in zip(sizes, scales)]
