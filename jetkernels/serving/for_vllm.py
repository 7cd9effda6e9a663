"""Jet-Nemotron in vLLM (0.33): the model of its parallel layers, with this library's JetBlock on pools of its pages."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any, cast

import torch
import vllm.model_executor.layers.mamba.gdn.olmo_gdn_linear_attn  # noqa: F401  (registers the op that is called below)
from torch import Tensor, nn
from vllm.config import VllmConfig, get_current_vllm_config
from vllm.distributed import (
    get_tensor_model_parallel_rank,
    get_tensor_model_parallel_world_size,
    tensor_model_parallel_all_reduce,
)
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.activation import SiluAndMul
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.layers.linear import MergedColumnParallelLinear, QKVParallelLinear, RowParallelLinear
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.layers.mamba.abstract import MambaBase
from vllm.model_executor.layers.mamba.mamba_utils import get_temporal_copy_spec
from vllm.model_executor.layers.rotary_embedding import get_rope
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding
from vllm.model_executor.model_loader.weight_utils import default_weight_loader
from vllm.model_executor.models.interfaces import HasInnerState, IsHybrid
from vllm.v1.attention.backends.registry import MambaAttentionBackendEnum

from jetkernels.model import JetNemotronConfig
from jetkernels.modules import JetBlockState

from .batch import RaggedBatch, rows_of
from .jet_block import DraftPools, commit_, forward_, put_, take, verify_
from .shares import JetBlockOfRank

# What an attention layer and an MLP keep as one parameter: name in the checkpoint -> (parameter, part).
_Packed = dict[str, tuple[str, Any]]
_ATTENTION: _Packed = {"q_proj": ("qkv_proj", "q"), "k_proj": ("qkv_proj", "k"), "v_proj": ("qkv_proj", "v")}
_MLP: _Packed = {"gate_proj": ("gate_up_proj", 0), "up_proj": ("gate_up_proj", 1)}

Shapes = tuple[tuple[int, ...], ...]


def _sizes(vllm_config: VllmConfig) -> JetNemotronConfig:
    """The checkpoint's config, as this library reads it."""
    return vllm_config.model_config.hf_config.network_config()


def _draft_tokens(vllm_config: VllmConfig) -> int:
    """The most tokens that a request has in a step that verifies: one that is sure, and the drafts. 0: no drafts."""
    return 0 if vllm_config.speculative_config is None else vllm_config.num_speculative_tokens + 1


def _state_shapes(config: JetNemotronConfig, ranks: int, tokens: int) -> Shapes:
    """The convolution's state and the rule's; with drafts the fields of `DraftPools`, and how many tokens they have."""
    jet = config.jet
    H, K, V = jet.num_heads // ranks, jet.head_dim, jet.head_v_dim
    states = ((H * V, jet.conv_size - 1), (H, K, V))
    drafts = ((tokens, H * V), (tokens, H, K), (tokens, H, V), (tokens, H), (1,))
    return states + drafts if tokens else states


def _state_dtypes(vllm_config: VllmConfig) -> tuple[torch.dtype, ...]:
    dtype, wide = vllm_config.model_config.dtype, torch.float32
    drafts = (dtype, wide, wide, wide, torch.int32)
    return (dtype, wide, *drafts) if _draft_tokens(vllm_config) else (dtype, wide)


class JetBlockLayer(JetBlockOfRank, MambaBase):
    """A JetBlock whose states are in vLLM's pages, and with drafts also what commits them.

    Raises:
        NotImplementedError: weights are quantised, or prefixes are cached where there are drafts.
    """

    def __init__(self, vllm_config: VllmConfig, prefix: str = ""):
        if vllm_config.quant_config is not None:
            raise NotImplementedError("jetkernels: JetBlocks in vLLM take no quantised weights")
        self.tokens = _draft_tokens(vllm_config)
        if self.tokens and vllm_config.cache_config.mamba_cache_mode == "align":
            raise NotImplementedError(
                "jetkernels: vLLM cannot cache prefixes of a JetBlock where there are drafts: add "
                "--no-enable-prefix-caching"
            )
        # Captured graphs are then replayed with other lengths than they were captured with.
        self.even = not getattr(vllm_config.speculative_config, "enable_adaptive_verification", False)
        config, self.ranks = _sizes(vllm_config), get_tensor_model_parallel_world_size()
        self.shapes = _state_shapes(config, self.ranks, self.tokens)
        self.dtypes = _state_dtypes(vllm_config)
        super().__init__(config.hidden_size, config.jet, get_tensor_model_parallel_rank(), self.ranks)
        self.prefix = prefix
        layers = get_current_vllm_config().compilation_config.static_forward_context
        if prefix in layers:
            raise ValueError(f"jetkernels: the layer {prefix} must be made once, got another one of this name")
        layers[prefix] = self

    @property
    def mamba_type(self) -> MambaAttentionBackendEnum:
        """The metadata that it wants are those of gated delta nets."""
        return MambaAttentionBackendEnum.GDN_ATTN

    def get_state_shape(self) -> Shapes:
        """(D, W-1) and (H, K, V), K first as the kernels want it; with drafts what `_state_shapes` says."""
        return self.shapes

    def get_state_dtype(self) -> tuple[torch.dtype, ...]:
        """Of the states, in the same order."""
        return self.dtypes

    def get_kv_cache_spec(self, vllm_config: VllmConfig) -> Any:
        """A block holds the drafts of a request: they need no blocks of their own."""
        return replace(super().get_kv_cache_spec(vllm_config), num_speculative_blocks=0)

    def forward(self, hidden_states: Tensor) -> Tensor:  # type: ignore[override]
        """[total, C] -> [total, C]."""
        output = torch.empty_like(hidden_states)
        # The compiler splits its graphs at this op, which calls `_full_forward` of the layer of this name.
        torch.ops.vllm.olmo_hybrid_gdn_full_forward(hidden_states, output, self.prefix)
        return output

    def _full_forward(self, hidden_states: Tensor, output: Tensor) -> None:
        """Writes the layer's output; rows of tokens that are none become zero."""
        metadata = get_forward_context().attn_metadata
        mine: Any = metadata.get(self.prefix) if isinstance(metadata, dict) else None
        if mine is None:  # memory is being measured
            output.zero_()
            return
        if mine.spec_sequence_masks is None:
            total = mine.num_actual_tokens
            if not mine.num_prefills:
                # All are decodes; a captured graph has more of them than there are, on block 0.
                total = min(total, len(mine.non_spec_state_indices_tensor))
            output[:total] = self._read(hidden_states[:total], mine)
        else:
            total = len(mine.spec_token_indx) + len(mine.non_spec_token_indx)
            for at, compute in ((mine.non_spec_token_indx, self._read), (mine.spec_token_indx, self._verify)):
                if len(at):
                    output[at] = compute(hidden_states[at], mine)
        output[total:].zero_()

    def _read(self, x: Tensor, mine: Any) -> Tensor:
        """Requests without drafts."""
        rows, starts = rows_of(mine.non_spec_state_indices_tensor), mine.non_spec_query_start_loc
        if mine.num_prefills:
            batch = RaggedBatch(mine.num_decodes, starts, rows, mine.has_initial_state)
        else:
            rows = rows[: len(x)]
            batch = RaggedBatch(len(x), starts[: len(x) + 1], rows)
        pools, kept = self._pools()
        if kept is not None:
            # The last token of a prompt that came alone was verified, and counts; drafts behind it would not.
            drafts, pending = kept
            accepted = take(pending, rows)[:, 0].clamp(max=1)
            goes_on = rows >= 0 if batch.has_initial_state is None else (rows >= 0) & batch.has_initial_state
            commit_(pools, drafts, rows, torch.where(goes_on, accepted, 0).to(torch.int64))
            put_(pending, rows, torch.zeros_like(rows)[:, None])
        return self._reduced(forward_(self, x, pools, batch))

    def _verify(self, x: Tensor, mine: Any) -> Tensor:
        """Requests whose tokens may be drafts: those of the step before are committed first."""
        pools, kept = self._pools()
        assert kept is not None
        drafts, pending = kept
        starts, rows = mine.spec_query_start_loc, rows_of(mine.spec_state_indices_tensor[:, 0])
        # After a prompt nothing is pending, whatever vLLM counts as accepted.
        accepted = torch.minimum(mine.num_accepted_tokens, take(pending, rows)[:, 0]).to(torch.int64)
        commit_(pools, drafts, rows, torch.where(rows >= 0, accepted, 0))
        tokens = (self.even and mine.uniform_spec_sequence_length) or self.tokens
        steps = torch.arange(tokens, device=x.device)
        y = verify_(self, x[(starts[:-1, None] + steps).clamp(max=len(x) - 1)], pools, drafts, rows)
        put_(pending, rows, starts.diff()[:, None])
        place = torch.arange(len(x), device=x.device)
        n = (torch.searchsorted(starts, place, right=True) - 1).clamp(max=len(rows) - 1)
        return self._reduced(y[n, (place - starts[n]).clamp(max=tokens - 1)])

    def _pools(self) -> tuple[JetBlockState, tuple[DraftPools, Tensor] | None]:
        conv_state, recurrent_state, *kept = cast(tuple[Tensor, ...], self.kv_cache)
        pools = JetBlockState(conv_state, recurrent_state)
        return pools, (DraftPools(*kept[:4]), kept[4]) if kept else None

    def _reduced(self, y: Tensor) -> Tensor:
        return tensor_model_parallel_all_reduce(y) if self.ranks > 1 else y


class AttentionLayer(nn.Module):
    """Grouped-query attention, full or over a window."""

    def __init__(self, vllm_config: VllmConfig, kind: str, prefix: str):
        super().__init__()
        config, quant_config = _sizes(vllm_config), vllm_config.quant_config
        H, Hkv, d, ranks = (
            config.num_attention_heads,
            config.num_key_value_heads,
            config.head_size,
            get_tensor_model_parallel_world_size(),
        )
        self.head_dim = d
        self.qkv_proj = QKVParallelLinear(
            config.hidden_size,
            d,
            H,
            Hkv,
            bias=config.attention_bias,
            quant_config=quant_config,
            prefix=f"{prefix}.qkv_proj",
        )
        self.o_proj = RowParallelLinear(
            H * d, config.hidden_size, bias=False, quant_config=quant_config, prefix=f"{prefix}.o_proj"
        )
        self.has_qk_norm = config.use_qk_norm
        if self.has_qk_norm:
            self.q_norm, self.k_norm = (RMSNorm(d, eps=config.rms_norm_eps) for _ in range(2))
        rope = {"rope_theta": config.rope_theta, "rope_type": "default"} | dict(config.rope_scaling or {})
        self.rotary_emb = get_rope(d, max_position=config.max_position_embeddings, rope_parameters=rope)
        self.sizes = [H // ranks * d, max(1, Hkv // ranks) * d, max(1, Hkv // ranks) * d]
        self.attn = Attention(
            H // ranks,
            d,
            d**-0.5,
            num_kv_heads=max(1, Hkv // ranks),
            cache_config=vllm_config.cache_config,
            quant_config=quant_config,
            per_layer_sliding_window=config.window_size if kind == "swa" else None,
            prefix=f"{prefix}.attn",
        )

    def forward(self, positions: Tensor, hidden_states: Tensor) -> Tensor:
        """[total, C] -> [total, C]."""
        qkv, _ = self.qkv_proj(hidden_states)
        q, k, v = qkv.split(self.sizes, dim=-1)
        if self.has_qk_norm:
            q = self.q_norm(q.unflatten(-1, (-1, self.head_dim))).flatten(-2)
            k = self.k_norm(k.unflatten(-1, (-1, self.head_dim))).flatten(-2)
        q, k = self.rotary_emb(positions, q, k)
        y, _ = self.o_proj(self.attn(q, k, v))
        return y


class MLPLayer(nn.Module):
    """SwiGLU."""

    def __init__(self, vllm_config: VllmConfig, prefix: str):
        super().__init__()
        config, quant_config = _sizes(vllm_config), vllm_config.quant_config
        C, width = config.hidden_size, config.intermediate_size
        self.gate_up_proj = MergedColumnParallelLinear(
            C, [width, width], bias=False, quant_config=quant_config, prefix=f"{prefix}.gate_up_proj"
        )
        self.down_proj = RowParallelLinear(
            width, C, bias=False, quant_config=quant_config, prefix=f"{prefix}.down_proj"
        )
        self.activation = SiluAndMul()

    def forward(self, x: Tensor) -> Tensor:
        """[total, C] -> [total, C]."""
        both, _ = self.gate_up_proj(x)
        y, _ = self.down_proj(self.activation(both))
        return y


class DecoderLayer(nn.Module):
    """h += mixer(RMSNorm(h)); h += MLP(RMSNorm(h))."""

    def __init__(self, vllm_config: VllmConfig, kind: str, prefix: str):
        super().__init__()
        config = _sizes(vllm_config)
        self.is_jet = kind == "jet"
        name = f"{prefix}.self_attn"
        self.self_attn = JetBlockLayer(vllm_config, name) if self.is_jet else AttentionLayer(vllm_config, kind, name)
        self.mlp = MLPLayer(vllm_config, f"{prefix}.mlp")
        self.input_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(self, positions: Tensor, h: Tensor) -> Tensor:
        """The residual stream [total, C] before the layer -> the one behind it."""
        x = self.input_layernorm(h)
        h = h + (self.self_attn(x) if self.is_jet else self.self_attn(positions, x))
        return h + self.mlp(self.post_attention_layernorm(h))


class JetNemotronModel(nn.Module):
    """Embedding, layers, final norm."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = ""):
        super().__init__()
        config = _sizes(vllm_config)
        self.embed_tokens = VocabParallelEmbedding(
            config.vocab_size, config.hidden_size, prefix=f"{prefix}.embed_tokens"
        )
        self.layers = nn.ModuleList(
            DecoderLayer(vllm_config, kind, f"{prefix}.layers.{i}") for i, kind in enumerate(config.layer_types)
        )
        self.norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(self, input_ids: Tensor | None, positions: Tensor, inputs_embeds: Tensor | None = None) -> Tensor:
        """Token ids [total] -> final hidden states [total, C]."""
        h = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        for layer in self.layers:
            h = layer(positions, h)
        return self.norm(h)


class JetNemotronForCausalLM(nn.Module, HasInnerState, IsHybrid):
    """The model that vLLM runs where a config.json names this architecture."""

    packed_modules_mapping = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = ""):
        super().__init__()
        config = _sizes(vllm_config)
        self.layer_types = list(config.layer_types)
        inner = f"{prefix}.model" if prefix else "model"
        self.model = JetNemotronModel(vllm_config=vllm_config, prefix=inner)
        self.tied = config.tie_word_embeddings
        head = ParallelLMHead(
            config.vocab_size,
            config.hidden_size,
            quant_config=vllm_config.quant_config,
            prefix=f"{prefix}.lm_head" if prefix else "lm_head",
        )
        self.lm_head = head.tie_weights(self.model.embed_tokens) if self.tied else head
        self.logits_processor = LogitsProcessor(config.vocab_size)

    def embed_input_ids(self, input_ids: Tensor) -> Tensor:
        """[total] -> [total, C]."""
        return self.model.embed_tokens(input_ids)

    def forward(
        self, input_ids: Tensor | None, positions: Tensor, intermediate_tensors: None = None, inputs_embeds: Any = None
    ) -> Tensor:
        """Token ids [total] and their positions -> final hidden states [total, C]."""
        return self.model(input_ids, positions, inputs_embeds)

    def compute_logits(self, hidden_states: Tensor) -> Tensor | None:
        """[N, C] -> [N, vocab], on the rank that samples."""
        return self.logits_processor(self.lm_head, hidden_states)

    @classmethod
    def get_mamba_state_shape_from_config(cls, vllm_config: VllmConfig) -> Shapes:
        """Of one rank, without the dimension of the blocks."""
        ranks = vllm_config.parallel_config.tensor_parallel_size
        return _state_shapes(_sizes(vllm_config), ranks, _draft_tokens(vllm_config))

    @classmethod
    def get_mamba_state_dtype_from_config(cls, vllm_config: VllmConfig) -> tuple[torch.dtype, ...]:
        """In the same order."""
        return _state_dtypes(vllm_config)

    @classmethod
    def get_mamba_state_copy_func(cls) -> tuple[Any, Any]:
        """In the same order, for prefix caching: both are copied whole, as there are no drafts then."""
        return get_temporal_copy_spec, get_temporal_copy_spec

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Takes the tensors of a published checkpoint; returns the names of the parameters that have been filled."""
        parameters, loaded = dict(self.named_parameters()), set()
        for name, whole in weights:
            if self.tied and name == "lm_head.weight":
                continue
            *way, module, what = name.split(".")
            packed = _MLP.get(module)
            if module in _ATTENTION and self.layer_types[int(way[2])] != "jet":
                packed = _ATTENTION[module]
            if packed is not None:
                parameter = parameters[name := ".".join([*way, packed[0], what])]
                cast(Any, parameter).weight_loader(parameter, whole, packed[1])
            else:
                parameter = parameters[name]
                getattr(parameter, "weight_loader", default_weight_loader)(parameter, whole)
            loaded.add(name)
        return loaded
