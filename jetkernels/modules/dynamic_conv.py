"""The dynamic short convolution of JetBlock: a causal depthwise convolution whose taps are generated per token."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.types import Device

from jetkernels.ops import apply_dynamic_conv, dynamic_conv, dynamic_conv_step_

from .initialization import init_weight_
from .linear import plain_weights
from .stand_in import HasStandIn


class KernelGenerator(HasStandIn):
    """The two matrices that turn a layer input into convolution taps: kernel = w2 silu(w1 x) + bias.

    w1.weight [R, C]; w2.weight [D*W, R] and w2.bias [D*W], row d*W+w for tap w of channel d. Only `w1` runs here: the
    product with w2 is part of the convolution op, so that the taps [B, T, D, W] never exist in memory. Where w2 is not
    a plain Linear (an adapter, a hook, ...: `plain_weights`) it is called and they do.
    """

    def __init__(
        self, input_size: int, width: int, outputs: int, *, device: Device = None, dtype: torch.dtype | None = None
    ):
        super().__init__()
        self.w1 = nn.Linear(input_size, width, bias=False, device=device, dtype=dtype)
        self.w2 = nn.Linear(width, outputs, bias=True, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        """Layer input [..., C] -> the generator's hidden activations [..., R]."""
        return F.silu(self.w1(x))


class DynamicShortConvolution(HasStandIn):
    """Causal depthwise convolution with taps generated from the layer input (Jet-Nemotron, arXiv 2508.15884, JetBlock).

    ::

        y[b,t,d] = silu(sum_w kernel[b,t,d,w] * x[b,t-(W-1)+w,d])
        kernel[b,t,d,w] = sum_r w2.weight[d*W+w,r] * silu(w1 u[b,t])[r] + w2.bias[d*W+w]

    x is what is convolved (the value projection), u the layer input; w2's bias is the static part of the kernel.
    At first w2 is zero and its bias N(0, 0.02): the layer starts as a static convolution. w1 is random, so w2 has a
    gradient from the first step and w1 from the second; with both at zero neither would ever move.

    Args:
        channels: D.
        kernel_size: W, 2 to 4.
        generator_input_size: C.
        generator_reduction: R = D // generator_reduction.
        activation: "silu" or None.
        initializer_range: standard deviation of w1 and of w2's bias.
        device: of the parameters.
        dtype: of the parameters.
    """

    def __init__(
        self,
        channels: int,
        kernel_size: int,
        generator_input_size: int,
        generator_reduction: int,
        activation: str | None = "silu",
        initializer_range: float = 0.02,
        *,
        device: Device = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        if not 2 <= kernel_size <= 4:
            raise ValueError(f"kernel_size must be 2, 3 or 4, got {kernel_size}")
        if not 1 <= generator_reduction <= channels:
            raise ValueError(
                f"generator_reduction must be between 1 and channels = {channels}, got {generator_reduction}"
            )
        self.channels = channels
        self.kernel_size = kernel_size
        self.activation = activation
        self.initializer_range = initializer_range
        self.kernel_generator = KernelGenerator(
            generator_input_size,
            channels // generator_reduction,
            channels * kernel_size,
            device=device,
            dtype=dtype,
        )
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws w1 and w2's bias anew, and sets w2 to zero."""
        init_weight_(self.kernel_generator.w1.weight, self.initializer_range)
        nn.init.zeros_(self.kernel_generator.w2.weight)
        init_weight_(self.kernel_generator.w2.bias, self.initializer_range)

    def forward(
        self,
        x: Tensor,
        generator_input: Tensor,
        conv_state: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        output_final_state: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Convolves whole sequences.

        Args:
            x: [B, T, D].
            generator_input: [B, T, C].
            conv_state: [N, D, W-1], the inputs in front of each sequence; zeros if None.
            cu_seqlens: [N+1] boundaries of sequences packed into one row (B = 1).
            output_final_state: whether the second result is wanted.

        Returns: y [B, T, D], and the state behind the last token of each sequence or None.
        """
        return self.convolve(x, self.kernel_generator(generator_input), conv_state, cu_seqlens, output_final_state)

    def convolve(
        self,
        x: Tensor,
        hidden: Tensor,
        conv_state: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        output_final_state: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """`forward` of the generator's hidden activations [B, T, R] in place of its input."""
        weights = self.plain_weights()
        if weights is None:
            kernels = self._kernels(hidden)
            return apply_dynamic_conv(x, kernels, conv_state, cu_seqlens, self.activation, output_final_state)
        return dynamic_conv(
            x,
            hidden,
            *weights,
            conv_state=conv_state,
            cu_seqlens=cu_seqlens,
            activation=self.activation,
            output_final_state=output_final_state,
        )

    def step_(
        self, x: Tensor, generator_input: Tensor, conv_state: Tensor, state_indices: Tensor | None = None
    ) -> Tensor:
        """Convolves one token of each sequence. Not differentiable: for inference, under `torch.no_grad()`.

        Args:
            x: [N, D].
            generator_input: [N, C].
            conv_state: [P, D, W-1], updated in place.
            state_indices: [N] rows of conv_state; a negative one touches none and gives zeros. None: row n for
                sequence n.

        Returns: y [N, D].
        """
        return self.convolve_step_(x, self.kernel_generator(generator_input), conv_state, state_indices)

    def convolve_step_(
        self, x: Tensor, hidden: Tensor, conv_state: Tensor, state_indices: Tensor | None = None
    ) -> Tensor:
        """`step_` of the generator's hidden activations [N, R] in place of its input."""
        weights = self.plain_weights()
        if weights is None:
            return self._step_with_kernels_(x, hidden, conv_state, state_indices)
        return dynamic_conv_step_(x, hidden, *weights, conv_state, state_indices, self.activation)

    def plain_weights(self) -> tuple[Tensor, Tensor | None] | None:
        """Weight and bias of w2, if it is a plain Linear."""
        return plain_weights(self.kernel_generator.w2, "kernel_generator.w2")

    def _kernels(self, hidden: Tensor) -> Tensor:
        """Taps [..., D, W] from w2 as a module."""
        return self.kernel_generator.w2(hidden).unflatten(-1, (self.channels, self.kernel_size))

    def _step_with_kernels_(
        self, x: Tensor, hidden: Tensor, conv_state: Tensor, state_indices: Tensor | None
    ) -> Tensor:
        kernels = self._kernels(hidden)
        if state_indices is None:
            y, after = apply_dynamic_conv(x[:, None], kernels[:, None], conv_state.clone(), None, self.activation, True)
            assert after is not None
            conv_state.copy_(after.detach())
            return y[:, 0]
        before = conv_state[state_indices.clamp(0, conv_state.shape[0] - 1)]
        # What the step op leaves in the pool depends on x and the indices alone, so it does the checks and the writing.
        weight = hidden.new_zeros(self.channels * self.kernel_size, hidden.shape[-1])
        dynamic_conv_step_(x, hidden, weight, None, conv_state, state_indices, self.activation)
        y, _ = apply_dynamic_conv(x[:, None], kernels[:, None], before, None, self.activation)
        return y[:, 0].masked_fill((state_indices < 0)[:, None], 0.0)

    def extra_repr(self) -> str:
        """What `print` says of it."""
        return f"{self.channels}, kernel_size={self.kernel_size}, activation={self.activation}"


def commit_conv_state_(conv_state: Tensor, x: Tensor, num_accepted: Tensor) -> None:
    """Advances a convolution's state in place by draft tokens that were accepted; nothing is read on the host.

    To verify drafts is to convolve them behind the state (`dynamic_conv`), which leaves it as it is. The state behind n
    of them is the last W - 1 of the old state's inputs and the first n of x.

    Args:
        conv_state: [N, D, W-1], oldest input first.
        x: [N, T, D], the convolution's inputs of the draft tokens.
        num_accepted: [N] int64, each 0..T.
    """
    (N, D, held), T = conv_state.shape, x.shape[1]
    # Not torch.cat: under fp16 autocast that refuses bf16.
    inputs = conv_state.new_empty(N, D, held + T)
    inputs[:, :, :held] = conv_state
    inputs[:, :, held:] = x.mT
    place = num_accepted[:, None] + torch.arange(held, device=x.device)
    conv_state.copy_(inputs.gather(2, place[:, None].expand(N, D, held)))
