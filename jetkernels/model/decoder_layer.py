"""One layer of the decoder: a token mixer and an MLP, each behind a norm, on the residual stream."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.types import Device

from jetkernels.modules import RMSNorm
from jetkernels.modules.fused import fusible
from jetkernels.modules.initialization import init_weight_
from jetkernels.modules.norm import add_norm
from jetkernels.modules.projections import FusedProjections, apply, project
from jetkernels.modules.stand_in import HasStandIn, may_step
from jetkernels.ops import swiglu

from .config import JetNemotronConfig
from .layout import TokenLayout
from .mixers import MIXERS
from .token_mixer import Rotary, State, TokenMixer


class MLP(FusedProjections):
    """SwiGLU: down(silu(gate(x)) * up(x)), no biases."""

    def __init__(self, config: JetNemotronConfig, *, device: Device = None, dtype: torch.dtype | None = None):
        super().__init__()
        C, width = config.hidden_size, config.intermediate_size
        self.initializer_range = config.initializer_range
        self.gate_proj = nn.Linear(C, width, bias=False, device=device, dtype=dtype)
        self.up_proj = nn.Linear(C, width, bias=False, device=device, dtype=dtype)
        self.down_proj = nn.Linear(width, C, bias=False, device=device, dtype=dtype)
        self.reset_parameters()
        self.fuse()

    def reset_parameters(self) -> None:
        """Draws every parameter anew."""
        for projection in (self.gate_proj, self.up_proj, self.down_proj):
            init_weight_(projection.weight, self.initializer_range)

    def forward(self, x: Tensor) -> Tensor:
        """Hidden states [..., C] -> [..., C]."""
        gate, up = project(self.projections(), x)
        return apply(self.down_proj, "down_proj", swiglu(gate, up) if fusible(gate, up) else F.silu(gate) * up)

    def projections(self) -> dict[str, nn.Module]:
        """gate_proj and up_proj."""
        return {"gate_proj": self.gate_proj, "up_proj": self.up_proj}


class DecoderLayer(HasStandIn):
    """h += mixer(RMSNorm(h)); h += MLP(RMSNorm(h)). The mixer is called self_attn whatever it is, as in checkpoints."""

    def __init__(
        self, config: JetNemotronConfig, kind: str, *, device: Device = None, dtype: torch.dtype | None = None
    ):
        super().__init__()
        options: dict[str, Any] = {"device": device, "dtype": dtype}
        self.self_attn = MIXERS[kind](config, **options)
        self.mlp = MLP(config, **options)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps, **options)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps, **options)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Reads also a layer that was pickled when it knew its kind and its mixer did not."""
        super().__setstate__(state)
        kind = self.__dict__.pop("kind", None)
        if kind is not None:
            self.self_attn.__class__ = MIXERS[kind]

    def forward(self, h: Tensor, layout: TokenLayout, rotary: Rotary | None, state: State | None) -> Tensor:
        """The residual stream before the layer, arranged as `layout` says -> the one behind it."""
        mixed = self.self_attn(self.input_layernorm(h), layout=layout, rotary=rotary, state=state)
        x, h = add_norm(self.post_attention_layernorm, mixed, h)
        return h + self.mlp(x)

    def step(
        self, h: Tensor, more: Tensor | None, state: State, *, lengths: Tensor, rotary: Rotary | None
    ) -> tuple[Tensor, Tensor]:
        """`forward` of one new token of each sequence, without a gradient.

        Args:
            h: [N, C]; the residual stream before the layer is h + more.
            more: [N, C]; None for nothing.
            state: of the mixer, updated in place.
            lengths: [N] int64, tokens that came before in each sequence, on the device.
            rotary: cos and sin [N, head_dim].

        Returns: the residual stream behind the layer, as two parts of which it is the sum.
        """
        x, h = add_norm(self.input_layernorm, more, h)
        mixer = self.self_attn
        # Who wraps a mixer, hooks onto it or overrides its forward waits for a call.
        step = mixer.step if isinstance(mixer, TokenMixer) and may_step(mixer) else partial(TokenMixer.step, mixer)
        x, h = add_norm(self.post_attention_layernorm, step(x, state, lengths=lengths, rotary=rotary), h)
        return h, self.mlp(x)

    @property
    def has_device_step(self) -> bool:
        """Whether `step` reads nothing on the host."""
        return isinstance(self.self_attn, TokenMixer) and may_step(self.self_attn)
