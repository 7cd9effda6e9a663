"""The kinds of layers that a model can have. A new kind is a TokenMixer and a line in MIXERS."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.types import Device

from jetkernels.modules import JetBlock, JetBlockDraft, JetBlockState

from .attention import Attention, SlidingWindowAttention
from .layout import TokenLayout
from .token_mixer import Rotary, TokenMixer

if TYPE_CHECKING:
    from .config import JetNemotronConfig


class JetMixer(JetBlock, TokenMixer):
    """A JetBlock with the sizes in `efficient_attention_config.jet`; also called as a JetBlock is, without a layout."""

    draft_type = JetBlockDraft

    def __init__(self, config: JetNemotronConfig, *, device: Device = None, dtype: torch.dtype | None = None):
        super().__init__(config.hidden_size, config.jet, config.initializer_range, device=device, dtype=dtype)

    @classmethod
    def sizes(cls, config: JetNemotronConfig) -> dict[str, object]:
        """H, K, V and W: those of a JetBlockState."""
        names = ("num_heads", "head_dim", "head_v_dim", "conv_size")
        return {f"jet.{name}": getattr(config.jet, name) for name in names}

    @classmethod
    def initial_state(
        cls,
        config: JetNemotronConfig,
        batch_size: int,
        max_length: int,
        *,
        device: Device = None,
        dtype: torch.dtype | None = None,
    ) -> JetBlockState:
        """A state of fixed size, whatever `max_length`."""
        return JetBlockState.zeros(config.jet, batch_size, device=device, dtype=dtype)

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        state: JetBlockState | JetBlockDraft | None = None,
        *,
        layout: TokenLayout | None = None,
        rotary: Rotary | None = None,
    ) -> Tensor:
        """See `TokenMixer.forward` and `JetBlock.forward`; a layout says what cu_seqlens says."""
        if layout is not None:
            cu_seqlens = layout.cu_seqlens
        return super().forward(hidden_states, attention_mask, cu_seqlens, state)

    def step(
        self,
        x: Tensor,
        state: JetBlockState,
        state_indices: Tensor | None = None,
        *,
        lengths: Tensor | None = None,
        rotary: Rotary | None = None,
    ) -> Tensor:
        """See `TokenMixer.step` and `JetBlock.step`; neither lengths nor rotary are used."""
        return super().step(x, state, state_indices)


# Kind of layer, as in `layer_types` of a config -> the class of its token mixer.
MIXERS: dict[str, type[TokenMixer]] = {
    "jet": JetMixer,
    "attn": Attention,
    "swa": SlidingWindowAttention,
}
