"""The gated delta rule of Qwen3-Next and Qwen3.5 in vLLM (0.33), on its own pages; the convolutions stay vLLM's.

vLLM imports this file for one of these models, and takes the model, which is its own, from here.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

import torch
from torch import Tensor
from vllm.forward_context import get_forward_context
from vllm.model_executor.custom_op import PluggableLayer, op_registry_oot
from vllm.model_executor.layers.mamba.gdn.qwen_gdn_linear_attn import QwenGatedDeltaNetAttention
from vllm.model_executor.layers.mamba.mamba_utils import is_conv_state_dim_first
from vllm.model_executor.layers.mamba.ops.causal_conv1d import causal_conv1d_fn, causal_conv1d_update

from jetkernels.ops import delta_gates

from .batch import rows_of
from .gated_delta_net import decode_, prefill_, split_heads
from .plugins import MODELS

NAME = "QwenGatedDeltaNetAttention"


class GatedDeltaNetLayer(QwenGatedDeltaNetAttention):
    """Prefill and decode by this library; drafts, and states that are kept inside a prompt, by vLLM."""

    def _forward_core(self, mixed_qkv: Tensor, b: Tensor, a: Tensor, core_attn_out: Tensor) -> None:
        """Writes what the rule reads, [total, H, V], behind the convolution of [total, 2 Hk K + H V]."""
        metadata = get_forward_context().attn_metadata
        mine: Any = metadata.get(self.prefix) if isinstance(metadata, dict) else None
        if mine is None or mine.spec_sequence_masks is not None or mine.flashinfer_checkpoint_plan is not None:
            return super()._forward_core(mixed_qkv, b, a, core_attn_out)
        if self.kv_cache[1].dtype == torch.float16:
            return super()._forward_core(mixed_qkv, b, a, core_attn_out)
        total, decodes = mine.num_actual_tokens, mine.num_decode_tokens
        mixed_qkv, b, a = mixed_qkv[:total], b[:total], a[:total]
        conv_state, pool = self.kv_cache[:2]
        mixed_qkv = self._convolve(mixed_qkv, conv_state, mine)
        if not mine.num_prefills:
            decodes = total  # with those that fill up a captured graph
        parts = []
        if decodes:
            parts.append(
                decode_(
                    *split_heads(mixed_qkv[:decodes], pool),
                    a[:decodes],
                    b[:decodes],
                    A_log=self.A_log,
                    dt_bias=self.dt_bias,
                    pool=pool,
                    state_indices=rows_of(mine.non_spec_state_indices_tensor[:decodes]),
                )
            )
        if mine.num_prefills:
            q, k, v = (t[None] for t in split_heads(mixed_qkv[decodes:], pool))
            g, beta = delta_gates(a[None, decodes:], b[None, decodes:], self.A_log, self.dt_bias)
            o = prefill_(
                (q, k, v, g, beta),
                pool=pool,
                cu_seqlens=mine.prefill_query_start_loc,
                state_indices=rows_of(mine.prefill_state_indices),
                has_initial_state=mine.prefill_has_initial_state,
            )
            parts.append(o[0])
        core_attn_out[:total] = parts[0] if len(parts) == 1 else torch.cat(parts)

    def _convolve(self, mixed_qkv: Tensor, conv_state: Tensor, mine: Any) -> Tensor:
        state = conv_state if is_conv_state_dim_first() else conv_state.transpose(-1, -2)
        weight, rows = self.conv1d.weight.squeeze(1), mine.non_spec_state_indices_tensor
        if not mine.num_prefills:
            return causal_conv1d_update(
                mixed_qkv,
                state,
                weight,
                self.conv1d.bias,
                self.activation,
                conv_state_indices=rows[: len(mixed_qkv)],
                validate_data=False,
            )
        return causal_conv1d_fn(
            mixed_qkv.transpose(0, 1),
            weight,
            self.conv1d.bias,
            activation=self.activation,
            conv_states=state,
            has_initial_state=mine.has_initial_state,
            cache_indices=rows,
            query_start_loc=mine.non_spec_query_start_loc,
            metadata=mine,
        ).transpose(0, 1)


if NAME not in op_registry_oot:
    PluggableLayer.register_oot(GatedDeltaNetLayer, name=NAME)


def __getattr__(name: str) -> Any:
    if name not in MODELS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"vllm.model_executor.models.{MODELS[name]}"), name)
