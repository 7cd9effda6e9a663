"""What `jetkernels.serving` uses of vLLM 0.33.0 and SGLang 0.5.23, with the signatures that these have, for one rank.

The engines cannot be installed beside a CPU build of PyTorch in the time of a test. Names, arguments and layouts are
those of the published wheels (vllm/config, vllm/model_executor, vllm/v1/attention/backends/gdn_attn.py;
sglang/srt/models/jet_nemotron.py, sglang/srt/configs/mamba_utils.py, sglang/srt/plugins/hook_registry.py); what they do
is the least that serves.
"""

from __future__ import annotations

import enum
import sys
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from math import prod
from types import ModuleType, SimpleNamespace
from typing import Any, Protocol

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import jetkernels.serving
from jetkernels.model.attention import causal_attention, rotary_table, rotate

CONTEXT = SimpleNamespace(attn_metadata=None, no_compile_layers={}, rank=0, ranks=1, rows_by_request=False)


def module(monkeypatch: pytest.MonkeyPatch, name: str, **members: Any) -> ModuleType:
    """Puts a module of these members in the place of one, and empty packages above it."""
    for end in range(1, name.count(".") + 2):
        path = ".".join(name.split(".")[:end])
        if path not in sys.modules:
            monkeypatch.setitem(sys.modules, path, ModuleType(path))
            sys.modules[path].__path__ = []
            above, _, last = path.rpartition(".")
            if above:
                setattr(sys.modules[above], last, sys.modules[path])
    found = sys.modules[name]
    for member, value in members.items():
        setattr(found, member, value)
    return found


def forget(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Lets a module of `jetkernels.serving` be imported anew, with what then stands for its engine."""
    monkeypatch.delitem(sys.modules, f"jetkernels.serving.{name}", raising=False)
    monkeypatch.delattr(jetkernels.serving, name, raising=False)


@dataclass(frozen=True)
class MambaSpec:
    """Of vllm.v1.kv_cache_interface, a few fields."""

    shapes: tuple[tuple[int, ...], ...]
    dtypes: tuple[torch.dtype, ...]
    num_speculative_blocks: int = 0


class MambaBase:
    """Of vllm.model_executor.layers.mamba.abstract."""

    def bind_kv_cache(self, kv_cache: Tensor) -> None:
        """[blocks, 1, 1, bytes] int8: the states of a block lie one behind the other."""
        pages, states, offset = kv_cache.squeeze(dim=(1, 2)), [], 0
        for shape, dtype in zip(self.get_state_shape(), self.get_state_dtype()):
            nbytes = prod(shape) * dtype.itemsize
            states.append(pages[:, offset : offset + nbytes].view(dtype).view(-1, *shape))
            offset += nbytes
        self.kv_cache = tuple(states)

    def get_kv_cache_spec(self, vllm_config: Any) -> MambaSpec:
        return MambaSpec(tuple(self.get_state_shape()), self.get_state_dtype(), vllm_config.num_speculative_tokens)


def _loads(parameter: nn.Parameter, sizes: dict) -> nn.Parameter:
    """A parameter whose `weight_loader(parameter, whole, part)` fills the rows of a part."""
    starts, start = {}, 0
    for part, size in sizes.items():
        starts[part], start = slice(start, start + size), start + size

    def load(into: nn.Parameter, whole: Tensor, part: Any) -> None:
        into.data[starts[part]].copy_(whole)

    parameter.weight_loader = load
    return parameter


class _Packed(nn.Module):
    def __init__(self, inputs: int, sizes: dict, bias: bool):
        super().__init__()
        rows = sum(sizes.values())
        self.weight = _loads(nn.Parameter(torch.full((rows, inputs), torch.nan)), sizes)
        self.bias = _loads(nn.Parameter(torch.full((rows,), torch.nan)), sizes) if bias else None

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        return F.linear(x, self.weight, self.bias), None


class QKVParallelLinear(_Packed):
    def __init__(
        self, hidden_size, head_size, total_num_heads, total_num_kv_heads, bias=True, quant_config=None, prefix=""
    ):
        kv = total_num_kv_heads * head_size
        super().__init__(hidden_size, {"q": total_num_heads * head_size, "k": kv, "v": kv}, bias)


class MergedColumnParallelLinear(_Packed):
    def __init__(self, input_size, output_sizes, bias=True, quant_config=None, prefix=""):
        super().__init__(input_size, dict(enumerate(output_sizes)), bias)


class RowParallelLinear(nn.Linear):
    def __init__(self, input_size, output_size, bias=True, quant_config=None, prefix=""):
        super().__init__(input_size, output_size, bias=bias)

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        return super().forward(x), None


class RMSNorm(nn.Module):
    def __init__(self, hidden_size, eps=1e-6):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.full((hidden_size,), torch.nan)), eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, x.shape[-1:], self.weight, self.eps)


class SiluAndMul(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        gate, up = x.chunk(2, -1)
        return F.silu(gate) * up


class Rotary(nn.Module):
    """Of get_rope(head_size, max_position, rope_parameters=): turns q, k [total, heads * head_size]."""

    def __init__(self, head_size, max_position, is_neox_style=True, rope_parameters=None):
        super().__init__()
        assert rope_parameters["rope_type"] == "default"
        self.head_size, self.theta = head_size, rope_parameters["rope_theta"]

    def forward(self, positions: Tensor, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        table = rotary_table(positions, self.head_size, self.theta)
        return tuple(rotate(x.unflatten(-1, (-1, self.head_size)), *table).to(x.dtype).flatten(-2) for x in (q, k))


class Attention(nn.Module):
    """Keeps keys and values of each sequence of CONTEXT.sequences: (name, tokens) in the order of the batch."""

    def __init__(
        self,
        num_heads,
        head_size,
        scale,
        num_kv_heads=None,
        cache_config=None,
        quant_config=None,
        per_layer_sliding_window=None,
        prefix="",
    ):
        super().__init__()
        assert scale == head_size**-0.5
        self.size, self.window, self.kept = head_size, per_layer_sliding_window, {}

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        outputs = []
        sizes = [n for _, n in CONTEXT.sequences]
        for (name, _), *new in zip(CONTEXT.sequences, *(t.split(sizes) for t in (q, k, v))):
            q1, *kv = (t.unflatten(-1, (-1, self.size)).transpose(0, 1)[None] for t in new)
            kv = [torch.cat(pair, 2) for pair in zip(self.kept[name], kv)] if name in self.kept else kv
            self.kept[name] = kv
            outputs.append(causal_attention(q1, *kv, self.window)[0].transpose(0, 1).flatten(-2))
        return torch.cat(outputs)


class VocabParallelEmbedding(nn.Embedding):
    def __init__(self, num_embeddings, embedding_dim, quant_config=None, prefix=""):
        super().__init__(num_embeddings, embedding_dim)


class ParallelLMHead(VocabParallelEmbedding):
    def tie_weights(self, embed_tokens):
        return embed_tokens


class LogitsProcessor(nn.Module):
    def __init__(self, vocab_size):
        super().__init__()

    def forward(self, lm_head: nn.Embedding, hidden_states: Tensor) -> Tensor:
        return F.linear(hidden_states, lm_head.weight)


@dataclass
class GDNAttentionMetadata:
    """Of vllm.v1.attention.backends.gdn_attn, the fields that are read."""

    num_prefills: int
    num_decodes: int
    num_actual_tokens: int
    has_initial_state: Tensor | None = None
    non_spec_query_start_loc: Tensor | None = None
    non_spec_state_indices_tensor: Tensor | None = None
    num_decode_tokens: int = 0
    prefill_query_start_loc: Tensor | None = None
    prefill_state_indices: Tensor | None = None
    prefill_has_initial_state: Tensor | None = None
    spec_sequence_masks: Tensor | None = None
    spec_query_start_loc: Tensor | None = None
    spec_state_indices_tensor: Tensor | None = None
    spec_token_indx: Tensor | None = None
    non_spec_token_indx: Tensor | None = None
    num_accepted_tokens: Tensor | None = None
    uniform_spec_sequence_length: int | None = None
    flashinfer_checkpoint_plan: Any = None


class QwenGatedDeltaNetAttention(nn.Module):
    """Of vllm.model_executor.layers.mamba.gdn.qwen_gdn_linear_attn, what `_forward_core` uses."""

    def __init__(self, prefix: str, Hk: int, H: int, K: int, V: int, blocks: int):
        super().__init__()
        self.prefix, self.activation = prefix, "silu"
        D = 2 * Hk * K + H * V
        self.conv1d = nn.Conv1d(D, D, 4, groups=D, bias=False)
        self.A_log, self.dt_bias = (nn.Parameter(torch.randn(H)) for _ in range(2))
        # Pages: the convolution's state [W-1, D] in front of the other one.
        pages = torch.full((blocks, 3 * D + H * V * K + 7), torch.nan)
        conv, rule = pages[:, : 3 * D], pages[:, 3 * D : 3 * D + H * V * K]
        self.kv_cache = (conv.unflatten(1, (3, D)), rule.unflatten(1, (H, V, K)))

    def _forward_core(self, mixed_qkv, b, a, core_attn_out) -> None:
        raise AssertionError("vLLM's own")


def _causal_conv(x: Tensor, weight: Tensor, state: Tensor) -> Tensor:
    """[T, D] behind [D, W-1], which is updated -> [T, D]."""
    padded = torch.cat([state.mT, x])
    state.copy_(padded[-state.shape[1] :].mT)
    return F.silu(sum(padded[j : j + len(x)] * weight[:, j] for j in range(weight.shape[1])))


def causal_conv1d_fn(
    x,
    weight,
    bias,
    conv_states,
    query_start_loc,
    cache_indices=None,
    has_initial_state=None,
    activation="silu",
    metadata=None,
):
    out, bounds = torch.empty_like(x), query_start_loc.tolist()
    for n, (begin, end) in enumerate(zip(bounds[:-1], bounds[1:])):
        state = conv_states[int(cache_indices[n])]
        if not has_initial_state[n]:
            state.zero_()
        out[:, begin:end] = _causal_conv(x[:, begin:end].mT, weight, state).mT
    return out


def causal_conv1d_update(
    x, conv_state, weight, bias=None, activation=None, conv_state_indices=None, validate_data=False
):
    rows = conv_state_indices.tolist()
    return torch.stack(
        [_causal_conv(x[n : n + 1], weight, conv_state[row])[0] if row else x[n] for n, row in enumerate(rows)]
    )


def get_temporal_copy_spec(state, block_ids, cur_block_idx, num_accepted_tokens):
    """Of vllm.model_executor.layers.mamba.mamba_utils; its runner knows the function by its identity."""
    raise AssertionError("vLLM's own")


class HasInnerState(Protocol):
    has_inner_state = True


class IsHybrid(Protocol):
    is_hybrid = True


def default_weight_loader(parameter: nn.Parameter, whole: Tensor) -> None:
    assert parameter.shape == whole.shape
    parameter.data.copy_(whole)


def vllm_config(hf_config: Any, dtype: torch.dtype = torch.float32) -> SimpleNamespace:
    return SimpleNamespace(
        model_config=SimpleNamespace(hf_config=hf_config, dtype=dtype),
        parallel_config=SimpleNamespace(tensor_parallel_size=CONTEXT.ranks),
        cache_config=SimpleNamespace(mamba_cache_mode="none"),
        num_speculative_tokens=0,
        quant_config=None,
        speculative_config=None,
        compilation_config=SimpleNamespace(static_forward_context=CONTEXT.no_compile_layers),
    )


def install_vllm(monkeypatch: pytest.MonkeyPatch) -> type:
    """Puts the stand-ins in the place of vLLM; returns its model registry."""
    monkeypatch.setattr(CONTEXT, "no_compile_layers", {})

    class ModelRegistry:
        models: dict[str, str] = {}

        @classmethod
        def register_model(cls, architecture: str, model: str) -> None:
            cls.models[architecture] = model

    layers, put = "vllm.model_executor.layers", lambda name, **members: module(monkeypatch, name, **members)
    put("vllm", ModelRegistry=ModelRegistry)
    current = lambda: SimpleNamespace(
        compilation_config=SimpleNamespace(static_forward_context=CONTEXT.no_compile_layers)
    )
    put("vllm.config", VllmConfig=SimpleNamespace, get_current_vllm_config=current)
    put(
        "vllm.distributed",
        get_tensor_model_parallel_rank=lambda: CONTEXT.rank,
        get_tensor_model_parallel_world_size=lambda: CONTEXT.ranks,
        tensor_model_parallel_all_reduce=lambda x: x,
    )
    put("vllm.forward_context", get_forward_context=lambda: CONTEXT)
    put(f"{layers}.activation", SiluAndMul=SiluAndMul)
    put(f"{layers}.attention", Attention=Attention)
    put(f"{layers}.layernorm", RMSNorm=RMSNorm)
    put(
        f"{layers}.linear",
        **{c.__name__: c for c in (QKVParallelLinear, MergedColumnParallelLinear, RowParallelLinear)},
    )
    put(f"{layers}.logits_processor", LogitsProcessor=LogitsProcessor)
    put(f"{layers}.mamba.abstract", MambaBase=MambaBase)
    put(f"{layers}.mamba.mamba_utils", get_temporal_copy_spec=get_temporal_copy_spec)
    put(f"{layers}.mamba.gdn.olmo_gdn_linear_attn")
    put(f"{layers}.rotary_embedding", get_rope=Rotary)
    put(
        f"{layers}.vocab_parallel_embedding",
        ParallelLMHead=ParallelLMHead,
        VocabParallelEmbedding=VocabParallelEmbedding,
    )
    put("vllm.model_executor.model_loader.weight_utils", default_weight_loader=default_weight_loader)
    put("vllm.model_executor.models.interfaces", HasInnerState=HasInnerState, IsHybrid=IsHybrid)
    kinds = enum.Enum("MambaAttentionBackendEnum", ["GDN_ATTN"])
    put("vllm.v1.attention.backends.registry", MambaAttentionBackendEnum=kinds)

    def full_forward(hidden_states: Tensor, output: Tensor, layer_name: str) -> None:
        CONTEXT.no_compile_layers[layer_name]._full_forward(hidden_states=hidden_states, output=output)

    monkeypatch.setattr(torch.ops, "vllm", SimpleNamespace(olmo_hybrid_gdn_full_forward=full_forward), raising=False)

    class PluggableLayer(nn.Module):
        @classmethod
        def register_oot(cls, layer: type, name: str) -> None:
            assert name not in replaced
            replaced[name] = layer

    replaced: dict[str, type] = {}
    put("vllm.model_executor.custom_op", PluggableLayer=PluggableLayer, op_registry_oot=replaced)
    put(
        f"{layers}.mamba.gdn.qwen_gdn_linear_attn",
        QwenGatedDeltaNetAttention=QwenGatedDeltaNetAttention,
    )
    put(f"{layers}.mamba.mamba_utils", is_conv_state_dim_first=lambda: False)
    put(
        f"{layers}.mamba.ops.causal_conv1d",
        causal_conv1d_fn=causal_conv1d_fn,
        causal_conv1d_update=causal_conv1d_update,
    )
    for name in ("for_vllm", "gated_delta_net_for_vllm"):
        forget(monkeypatch, name)
    return ModelRegistry


@dataclass(kw_only=True, frozen=True)
class Mamba2StateShape:
    """Of sglang.srt.configs.mamba_utils."""

    conv: list[tuple[int, int]]
    temporal: tuple[int, int, int]
    disable_conv_window_dedup: bool = False
    intermediate_size: int
    conv_dim: int
    ssm_state_size: int
    num_heads: int
    head_dim: int
    state_size: int
    conv_kernel: int
    num_k_heads_per_tp: int = 1
    conv_shard_groups: list[int] | None = None


@dataclass(kw_only=True, frozen=True)
class Mamba2CacheParams:
    dtype: Any
    layers: list[int]
    shape: Mamba2StateShape


@dataclass
class SglangConfig:
    """Of sglang.srt.configs.jet_nemotron."""

    hidden_size: int
    layer_types: list[str]
    efficient_attention_config: dict = field(default_factory=dict)

    @property
    def linear_layer_ids(self) -> list[int]:
        return [i for i, kind in enumerate(self.layer_types) if kind == "jet"]

    @property
    def mamba2_cache_params(self) -> None:
        raise AssertionError("SGLang's own")


def select_verify_intermediate_state_indices(default_indices, req_pool_indices, valid, pool_size):
    """Of sglang.srt.layers.attention.linear.utils: rows for the states behind drafts, by place or by request."""
    if not CONTEXT.rows_by_request:
        return default_indices
    requests = req_pool_indices[: valid.shape[0]]
    return torch.where(valid, requests, torch.full_like(requests, pool_size)).to(torch.int32)


class LinearAttnKernelBase(ABC):
    """Of sglang.srt.layers.attention.linear.kernels.kernel_backend."""

    uses_state_checkpoints: bool = False
    supports_track_state_snapshot: bool = False

    @abstractmethod
    def decode(self, q, k, v, a, b, *, A_log, dt_bias, ssm_states, cache_indices, query_start_loc, **kwargs): ...

    @abstractmethod
    def extend(self, q, k, v, g, beta, *, ssm_states, cache_indices, query_start_loc, **kwargs): ...


class HookType(enum.Enum):
    AFTER = "after"
    REPLACE = "replace"


def install_sglang(monkeypatch: pytest.MonkeyPatch) -> type:
    """Puts the stand-ins in the place of SGLang; returns its registry of hooks."""
    from collections import defaultdict

    class HookRegistry:
        _hooks: dict[str, list] = defaultdict(list)

        @classmethod
        def register(cls, target: str, hook: Any, hook_type: HookType = HookType.AFTER, *, source: Any = None) -> None:
            cls._hooks[target].append((hook_type, hook, source))

    put = lambda name, **members: module(monkeypatch, name, **members)
    own = type("JetNemotronConfig", (SglangConfig,), {})
    put("sglang.srt.configs.jet_nemotron", JetNemotronConfig=own)
    put(
        "sglang.srt.configs.mamba_utils",
        Mamba2CacheParams=Mamba2CacheParams,
        Mamba2StateShape=Mamba2StateShape,
        mamba2_state_dtype=lambda config: SimpleNamespace(conv=torch.bfloat16, temporal=torch.float32),
    )
    put(
        "sglang.srt.distributed",
        get_tensor_model_parallel_rank=lambda: CONTEXT.rank,
        get_tensor_model_parallel_world_size=lambda: CONTEXT.ranks,
        tensor_model_parallel_all_reduce=lambda x: x,
    )
    put(
        "sglang.srt.layers.attention.linear.utils",
        select_verify_intermediate_state_indices=select_verify_intermediate_state_indices,
    )
    put("sglang.srt.model_executor.forward_context", get_attn_backend=lambda: CONTEXT.backend)
    put("sglang.srt.plugins.hook_registry", HookRegistry=HookRegistry, HookType=HookType)
    kernels = "sglang.srt.layers.attention.linear.kernels"
    put(f"{kernels}.kernel_backend", LinearAttnKernelBase=LinearAttnKernelBase)
    put(f"{kernels}.gdn_triton", TritonGDNKernel=type("TritonGDNKernel", (), {}))
    for name in ("for_sglang", "gated_delta_net_for_sglang"):
        forget(monkeypatch, name)
    return HookRegistry
