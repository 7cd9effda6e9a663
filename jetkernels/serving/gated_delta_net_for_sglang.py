"""The gated delta rule of Qwen3-Next and Qwen3.5 in SGLang (0.5.23), in the place of its Triton kernels."""

from __future__ import annotations

from typing import Any

import torch
from sglang.srt.layers.attention.linear.kernels.gdn_triton import TritonGDNKernel
from sglang.srt.layers.attention.linear.kernels.kernel_backend import LinearAttnKernelBase
from torch import Tensor

from .gated_delta_net import decode_, prefill_, split_heads


def _rows(slots: Tensor) -> Tensor:
    """Of requests that decode: both 0 and -1 are padding."""
    return torch.where(slots > 0, slots, -1)


class GatedDeltaRuleKernel(LinearAttnKernelBase):
    """Prefill and decode on pools [slots, H, V, K], in place; drafts stay SGLang's."""

    supports_packed_decode = True
    supports_track_state_snapshot = True

    def decode(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        a: Tensor,
        b: Tensor,
        *,
        A_log: Tensor,
        dt_bias: Tensor,
        ssm_states: Tensor,
        cache_indices: Tensor,
        query_start_loc: Tensor,
        **kwargs: Any,
    ) -> Tensor:
        """q, k [1, N, Hk, K], v [1, N, H, V], a, b [N, H] -> [1, N, H, V]."""
        gates: dict[str, Tensor] = {
            "A_log": A_log,
            "dt_bias": dt_bias,
            "pool": ssm_states,
            "state_indices": _rows(cache_indices),
        }
        return decode_(q[0], k[0], v[0], a, b, **gates).unsqueeze(0)

    def packed_decode(
        self,
        mixed_qkv: Tensor,
        a: Tensor,
        b: Tensor,
        *,
        A_log: Tensor,
        dt_bias: Tensor,
        scale: float,
        ssm_states: Tensor,
        cache_indices: Tensor,
        num_v_heads: int,
        head_v_dim: int,
        **kwargs: Any,
    ) -> Tensor:
        """The same for q, k and v side by side, [N, 2 Hk K + H V].

        Raises:
            NotImplementedError: states are kept as a buffer of updates (--enable-linear-replayssm).
        """
        if all(kwargs.get(f"replayssm_{name}") is not None for name in ("d", "k", "g", "write_pos")):
            raise NotImplementedError("jetkernels: --enable-linear-replayssm is not served")
        gates: dict[str, Tensor] = {
            "A_log": A_log,
            "dt_bias": dt_bias,
            "pool": ssm_states,
            "state_indices": _rows(cache_indices),
        }
        return decode_(*split_heads(mixed_qkv, ssm_states), a, b, **gates).unsqueeze(0)

    def extend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        g: Tensor,
        beta: Tensor,
        *,
        ssm_states: Tensor,
        cache_indices: Tensor,
        query_start_loc: Tensor,
        inplace_update: bool = True,
        track_state: Tensor | None = None,
        track_chunk_idx: Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, None, None]:
        """q, k [1, total, Hk, K], v [1, total, H, V], g, beta [1, total, H] -> [1, total, H, V]; slots are in place."""
        # Prompts are not padded, and where the pool's slots are copied together first, the first one is a request's.
        rows, pool = cache_indices, ssm_states
        if not inplace_update:
            pool, rows = ssm_states[cache_indices], torch.arange(len(cache_indices), device=q.device)
        o = prefill_(
            (q, k, v, g, beta),
            pool=pool,
            cu_seqlens=query_start_loc,
            state_indices=rows,
            track_state=track_state,
            track_chunk_idx=track_chunk_idx,
        )
        return o, None, None


def take_the_place_of_triton(result: None, dispatcher: Any, *args: Any, **kwargs: Any) -> None:
    """Behind GDNKernelDispatcher.__init__: other kernels than Triton's stay."""
    kernel = GatedDeltaRuleKernel()
    if isinstance(dispatcher.decode_kernel, TritonGDNKernel):
        dispatcher.decode_kernel, dispatcher.supports_packed_decode = kernel, True
    if isinstance(dispatcher.extend_kernel, TritonGDNKernel):
        dispatcher.extend_kernel = kernel
