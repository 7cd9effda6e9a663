"""Stage 3: the design of the JetBlock, taken apart: which convolution, on what, and what its generator reads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from jetkernels.modules import DynamicShortConvolution, GatedRMSNorm

from .blocks import NORM_EPS, LinearBlock, decay_parameters, gated_delta_rule
from .shapes import Shape
from .short_convolution import ShortConvolution, init_static_taps_


@dataclass(frozen=True)
class Design:
    """A JetBlock with these choices changed; the defaults are JetBlock's own.

    Attributes:
        convolution: "dynamic" (taps generated per token) or "static".
        on: which of q, k, v are convolved; the others only pass SiLU, v nothing.
        generator_input: "layer" (the layer's input) or "projection" (what is convolved).
        reduction: R = channels // reduction.
        kernel_size: W, 2 to 4.
    """

    convolution: str = "dynamic"
    on: str = "v"
    generator_input: str = "layer"
    reduction: int = 8
    kernel_size: int = 4

    def __post_init__(self) -> None:
        for name, allowed in (("convolution", ("dynamic", "static")), ("generator_input", ("layer", "projection"))):
            if getattr(self, name) not in allowed:
                raise ValueError(f"design: {name} must be one of {', '.join(allowed)}, got {getattr(self, name)!r}")
        if not self.on or set(self.on) - set("qkv") or len(set(self.on)) != len(self.on):
            raise ValueError(f"design: on must name some of q, k and v, got {self.on!r}")


DESIGNS: dict[str, Design] = {
    "JetBlock": Design(),
    "static, v": Design(convolution="static"),
    "static, qkv": Design(convolution="static", on="qkv"),
    "dynamic, q": Design(on="q"),
    "dynamic, k": Design(on="k"),
    "dynamic, qkv": Design(on="qkv"),
    "generator reads v": Design(generator_input="projection"),
    "reduction 2": Design(reduction=2),
    "reduction 32": Design(reduction=32),
    "kernel size 2": Design(kernel_size=2),
    "kernel size 3": Design(kernel_size=3),
}


class DesignedBlock(LinearBlock):
    """The JetBlock of a design. With the default design it computes what `jetkernels.modules.JetBlock` does.

    Projections, gates and norm are named as there.

    Args:
        hidden_size: C.
        shape: K, V, H.
        design: what differs from the JetBlock.

    Attributes:
        convolutions: one for each of q, k, v that has one, by that letter.
    """

    g_proj: nn.Linear
    a_proj: nn.Linear
    b_proj: nn.Linear

    def __init__(self, hidden_size: int, shape: Shape, design: Design = Design()):
        self.design = design  # first: `build` reads it
        super().__init__(hidden_size, shape)

    def build(self, K: int, V: int, H: int) -> None:
        """See `LinearBlock.build`."""
        self.channels = {"q": H * K, "k": H * K, "v": H * V}
        for name, width in {**self.channels, "g": H * V, "a": H, "b": H}.items():
            setattr(self, f"{name}_proj", self.linear(width))
        self.o_proj = self.linear(self.hidden_size, H * V)
        self.A_log, self.dt_bias = decay_parameters(H)
        self.o_norm = GatedRMSNorm(V, NORM_EPS)
        self.convolutions = nn.ModuleDict({name: self._convolution(self.channels[name]) for name in self.design.on})

    def _convolution(self, channels: int) -> nn.Module:
        design = self.design
        if design.convolution == "static":
            return ShortConvolution(channels, design.kernel_size)
        reads = self.hidden_size if design.generator_input == "layer" else channels
        convolution = DynamicShortConvolution(
            channels, design.kernel_size, reads, design.reduction, initializer_range=reads**-0.5
        )
        init_static_taps_(convolution)
        if design.generator_input == "layer":
            self.of_input.append(convolution.kernel_generator.w1)
        return convolution

    def memory(self) -> list[Sequence[int]]:
        """The recurrent state, and what each convolution has seen last."""
        return [*super().memory(), *((self.design.kernel_size - 1, self.channels[name]) for name in self.design.on)]

    def _convolve(self, name: str, x: Tensor, projected: Tensor, before: Tensor) -> tuple[Tensor, Tensor]:
        """The projection [B, T, D], convolved, and the inputs to remember; before: those in front [B, W-1, D]."""
        convolution = self.convolutions[name]
        if isinstance(convolution, ShortConvolution):
            return convolution(projected, before)
        assert isinstance(convolution, DynamicShortConvolution)
        reads = x if self.design.generator_input == "layer" else projected
        context = before.mT.contiguous()
        if x.shape[1] == 1 and not torch.is_grad_enabled():
            return convolution.step_(projected[:, 0], reads[:, 0], context)[:, None], context.mT
        y, after = convolution(projected, reads, context, output_final_state=True)
        return y, after.mT

    def log_decay(self, x: Tensor) -> Tensor:
        """[B, T, H]."""
        return -self.A_log.exp() * F.softplus(self.a_proj(x) + self.dt_bias)

    def mix(self, x: Tensor, state: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """As `LinearBlock.mix` says: from x and the state before to y and the state after."""
        before = dict(zip(self.design.on, state[1:]))
        after, mixed = {}, {}
        for name in "qkv":
            projected = getattr(self, f"{name}_proj")(x)
            if name in before:
                mixed[name], after[name] = self._convolve(name, x, projected, before[name])
            else:
                mixed[name] = projected if name == "v" else F.silu(projected)
        q, k, v = (self.heads(mixed[name]) for name in "qkv")
        o, S = gated_delta_rule(q, k, v, self.log_decay(x), torch.sigmoid(self.b_proj(x)), state[0])
        y = self.o_proj(self.o_norm(o, self.heads(self.g_proj(x))).flatten(-2))
        return y, [S, *(after[name] for name in self.design.on)]
