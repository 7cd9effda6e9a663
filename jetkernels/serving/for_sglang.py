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
from sglang.srt.layers.attention.linear.utils import select_verify_intermediate_state_indices
from sglang.srt.model_executor.forward_context import get_attn_backend
from torch import Tensor

from jetkernels.modules import JetBlockConfig, JetBlockState

from .batch import RaggedBatch
from .jet_block import forward_, verify_with_states_
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

        Of draft tokens the states behind each go where SGLang takes them from, when it knows how many count.

        Raises:
            NotImplementedError: draft tokens are a tree, of differing numbers, or to be kept as a buffer of updates.
        """
        mode = forward_batch.forward_mode
        backend = get_attn_backend().linear_attn_backend
        metadata = backend.forward_metadata
        held = backend.req_to_token_pool.mamba2_layer_cache(self.layer_id)
        pools = JetBlockState(held.conv[0], held.temporal)
        slots = metadata.mamba_cache_indices
        state_indices = torch.where(slots > 0, slots, -1)  # both 0 and -1 are padding
        if mode.is_target_verify():
            y = self._verify_(hidden_states, pools, held, state_indices, backend, forward_batch)
        elif mode.is_decode_or_idle():
            decodes = min(len(slots), len(hidden_states))
            y = forward_(self, hidden_states, pools, RaggedBatch(decodes, metadata.query_start_loc, state_indices))
        else:
            has = forward_batch.extend_prefix_lens > 0
            y = forward_(self, hidden_states, pools, RaggedBatch(0, metadata.query_start_loc, state_indices, has))
        return tensor_model_parallel_all_reduce(y) if self.ranks > 1 else y

    def _verify_(
        self, x: Tensor, pools: JetBlockState, held: Any, state_indices: Tensor, backend: Any, batch: Any
    ) -> Tensor:
        for refused, what in (
            (backend.topk > 1, "trees of drafts (--speculative-eagle-topk above 1)"),
            (batch.spec_info.ragged_verify_layout is not None, "drafts of differing numbers in one step"),
            (held.intermediate_ssm is None, "drafts kept as updates (--enable-linear-replayssm-spec)"),
        ):
            if refused:
                raise NotImplementedError(f"jetkernels: JetBlocks in SGLang do not verify {what}")
        T = batch.spec_info.draft_token_num
        state_indices = state_indices[: len(x) // T]
        rows = select_verify_intermediate_state_indices(
            backend.verify_intermediate_state_indices,
            batch.req_pool_indices,
            state_indices >= 0,
            backend.req_to_token_pool.size,
        )
        after = JetBlockState(held.intermediate_conv_window[0], held.intermediate_ssm)
        x = x.view(-1, T, x.shape[1])
        return verify_with_states_(self, x, pools, after, state_indices, rows[: len(x)]).flatten(0, 1)
