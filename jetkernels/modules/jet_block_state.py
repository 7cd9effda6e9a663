"""What a JetBlock remembers of the tokens it has seen, and of draft tokens until it is known which are accepted."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor
from torch.types import Device

from jetkernels.ops import recurrent_gated_delta_rule_commit_, recurrent_gated_delta_rule_verify

from .dynamic_conv import commit_conv_state_

if TYPE_CHECKING:
    from .jet_block_config import JetBlockConfig


class JetBlockState(NamedTuple):
    """What a JetBlock remembers of N sequences.

    Attributes:
        conv_state: [N, D, W-1], the last inputs of the convolution, oldest first; in the layer's dtype.
        recurrent_state: [N, H, K, V], fp32 (fp64 in an fp64 layer).
    """

    conv_state: Tensor
    recurrent_state: Tensor

    @classmethod
    def zeros(
        cls, config: JetBlockConfig, batch_size: int, *, device: Device = None, dtype: torch.dtype | None = None
    ) -> JetBlockState:
        """Of sequences that have seen nothing. `dtype` is the layer's; the recurrent state is fp32 (fp64 if it is)."""
        if not isinstance(batch_size, int) or batch_size < 0:
            raise ValueError(f"JetBlockState: batch_size must be an integer from 0, got {batch_size!r}")
        dtype = dtype or torch.get_default_dtype()
        H, K, V = config.num_heads, config.head_dim, config.head_v_dim
        return cls(
            torch.zeros(batch_size, H * V, config.conv_size - 1, device=device, dtype=dtype),
            torch.zeros(batch_size, H, K, V, device=device, dtype=torch.promote_types(dtype, torch.float32)),
        )


class JetBlockDraft:
    """Stands for a state in a call of a JetBlock whose T tokens are drafts: any prefix of them may be accepted later.

    The layer reads the state and leaves it as it is; what `commit` needs of each token is kept here: an input of the
    convolution, a key and an update of the delta rule (`recurrent_gated_delta_rule_verify`), a decay.

    Args:
        state: of the N sequences.
    """

    def __init__(self, state: JetBlockState):
        self.state = state
        self._kept: tuple[Tensor, Tensor, Tensor, Tensor] | None = None

    def verify(self, x: Tensor, tokens: tuple[Tensor, Tensor, Tensor, Tensor, Tensor]) -> Tensor:
        """The delta rule's outputs [N, T, H, V] of draft tokens.

        Args:
            x: [N, T, D], the convolution's inputs.
            tokens: the first five arguments of `recurrent_gated_delta_rule_verify`, q and k not normalised.
        """
        _, k, v, g, _ = tokens
        recurrent_state = self.state.recurrent_state
        wide = torch.promote_types(recurrent_state.dtype, torch.float32)
        keys, updates = (torch.empty(t.shape, dtype=wide, device=t.device) for t in (k, v))
        o = recurrent_gated_delta_rule_verify(*tokens, recurrent_state, keys, updates, use_qk_l2norm_in_kernel=True)
        self._kept = x, keys, updates, g
        return o

    def commit(self, num_accepted: Tensor) -> None:
        """Advances the state by the first tokens of each sequence, as a call of them alone would have.

        Args:
            num_accepted: [N] int64, each 0..T, on the device.

        Raises:
            RuntimeError: no call has verified draft tokens.
        """
        if self._kept is None:
            raise RuntimeError("JetBlockDraft: no call has verified draft tokens that could be committed")
        x, keys, updates, g = self._kept
        commit_conv_state_(self.state.conv_state, x, num_accepted)
        recurrent_gated_delta_rule_commit_(keys, updates, g, num_accepted, self.state.recurrent_state)
