"""Jet-Nemotron in SGLang (0.5.23): this library's JetBlock in the place of its own.

A prompt is read in chunks and not token by token, tensor parallel divides the heads, padding touches no state, and the
pool of the convolution has the rows of v alone.
"""

from __future__ import annotations

from typing import Any

import torch
from sglang.srt.configs.jet_nemotron import JetNemotronConfig
from sglang.srt.configs.mamba_utils import Mamba2CacheParams, Mamba2StateShape, mamba2_state_dtype
from sglang.srt.distributed import (
    get_tensor_model_parallel_rank,
    get_tensor_model_parallel_world_size,
    tensor_model_parallel_all_reduce,
)
from sglang.srt.model_executor.forward_context import get_attn_backend
from torch import Tensor

from jetkernels.modules import JetBlockConfig, JetBlockState

from .batch import RaggedBatch
from .jet_block import forward_
from .shares import JetBlockOfRank


def _sizes(config: JetNemotronConfig) -> JetBlockConfig:
    return JetBlockConfig.from_dict(config.efficient_attention_config["jet"])


def describe_states() -> None:
    """Lets SGLang's config say what the pools hold: (D, W-1) and, K first, (H, K, V), of one rank."""

    def params(config: JetNemotronConfig) -> Mamba2CacheParams:
        sizes, ranks = _sizes(config), get_tensor_model_parallel_world_size()
        H, K, V, W = sizes.num_heads // ranks, sizes.head_dim, sizes.head_v_dim, sizes.conv_size
        shape = Mamba2StateShape(
            conv=[(H * V, W - 1)],
            temporal=(H, K, V),
            intermediate_size=H * V,
            conv_dim=H * V,
            ssm_state_size=K,
            num_heads=H,
            head_dim=V,
            state_size=K,
            conv_kernel=W,
            num_k_heads_per_tp=H,
        )
        return Mamba2CacheParams(shape=shape, layers=config.linear_layer_ids, dtype=mamba2_state_dtype(config))

    JetNemotronConfig.mamba2_cache_params = property(params)


class JetBlockLayer(JetBlockOfRank):
    """Called and built as sglang.srt.models.jet_nemotron.JetBlock; its weights load by their published names.

    Raises:
        NotImplementedError: weights are quantised.
    """

    def __init__(self, config: JetNemotronConfig, layer_id: int, quant_config: object = None, prefix: str = ""):
        if quant_config is not None:
            raise NotImplementedError("jetkernels: JetBlocks in SGLang take no quantised weights")
        ranks = get_tensor_model_parallel_world_size()
        super().__init__(config.hidden_size, _sizes(config), get_tensor_model_parallel_rank(), ranks)
        self.layer_id, self.ranks = layer_id, ranks

    def forward(self, positions: Tensor, hidden_states: Tensor, forward_batch: Any) -> Tensor:  # type: ignore[override]
        """[total, C] -> [total, C]; the states are those of the engine's pools.

        Raises:
            NotImplementedError: the tokens are drafts.
        """
        mode = forward_batch.forward_mode
        if mode.is_target_verify():
            raise NotImplementedError("jetkernels: drafts are not verified in SGLang")
        backend = get_attn_backend().linear_attn_backend
        metadata = backend.forward_metadata
        held = backend.req_to_token_pool.mamba2_layer_cache(self.layer_id)
        pools = JetBlockState(held.conv[0], held.temporal)
        slots = metadata.mamba_cache_indices
        rows = torch.where(slots > 0, slots, -1)  # both 0 and -1 are padding
        N = len(slots)
        if mode.is_decode_or_idle():
            batch = RaggedBatch(min(N, len(hidden_states)), metadata.query_start_loc, rows)
        else:
            batch = RaggedBatch(0, metadata.query_start_loc, rows, forward_batch.extend_prefix_lens > 0)
        y = forward_(self, hidden_states, pools, batch)
        return tensor_model_parallel_all_reduce(y) if self.ranks > 1 else y
