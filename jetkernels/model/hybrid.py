"""The hybrid decoder: layers with different token mixers under one pre-norm residual stream."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.types import Device
from torch.utils.checkpoint import checkpoint as recompute

from jetkernels.modules import RMSNorm
from jetkernels.modules.initialization import init_weight_
from jetkernels.modules.linear import computing_device, floating_weight, has_hooks
from jetkernels.modules.padding import Unpadding, find_padding

from . import checkpoint, generation
from .attention import rotary_table
from .cache import JetNemotronCache
from .config import JetNemotronConfig
from .layout import TokenLayout
from .mixers import MIXERS
from .token_mixer import Rotary, State, TokenMixer

Progress = Callable[[list], Iterable]
M = TypeVar("M", bound=nn.Module)


class CausalLMOutput(dict):
    """What a call of the model gives: loss, logits and cache, in this order, those that are not None.

    Each is read as an attribute, by name or, as the outputs of transformers' models, by position among those that are
    there: [0] is the loss of a call with labels and the logits of one without. `to_tuple` unpacks.
    """

    def __init__(self, *args: Any, **fields: Any):
        super().__init__({name: value for name, value in dict(*args, **fields).items() if value is not None})

    def __getitem__(self, key: str | int | slice) -> Any:
        return super().__getitem__(key) if isinstance(key, str) else self.to_tuple()[key]

    def to_tuple(self) -> tuple:
        """What there is, in order."""
        return tuple(self.values())

    @property
    def loss(self) -> Tensor | None:
        """A scalar, if labels were given."""
        return self.get("loss")

    @property
    def logits(self) -> Tensor:
        """[B, T, vocab]; [N, 1, vocab] with last_logits_only."""
        return self["logits"]

    @property
    def cache(self) -> JetNemotronCache | None:
        """The one that was given."""
        return self.get("cache")


class MLP(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x)), no biases."""

    def __init__(self, config: JetNemotronConfig, *, device: Device = None, dtype: torch.dtype | None = None):
        super().__init__()
        C, width = config.hidden_size, config.intermediate_size
        self.initializer_range = config.initializer_range
        self.gate_proj = nn.Linear(C, width, bias=False, device=device, dtype=dtype)
        self.up_proj = nn.Linear(C, width, bias=False, device=device, dtype=dtype)
        self.down_proj = nn.Linear(width, C, bias=False, device=device, dtype=dtype)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws every parameter anew."""
        for projection in (self.gate_proj, self.up_proj, self.down_proj):
            init_weight_(projection.weight, self.initializer_range)

    def forward(self, x: Tensor) -> Tensor:
        """Hidden states [..., C] -> [..., C]."""
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class DecoderLayer(nn.Module):
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
        h = h + self.self_attn(self.input_layernorm(h), layout=layout, rotary=rotary, state=state)
        return h + self.mlp(self.post_attention_layernorm(h))


class JetNemotronModel(nn.Module):
    """Embedding, decoder layers and final norm.

    Attributes:
        recompute_layers: when gradients are computed, keep only the layers' inputs and compute the rest again in the
            backward pass.
    """

    recompute_layers = False

    def __init__(self, config: JetNemotronConfig, *, device: Device = None, dtype: torch.dtype | None = None):
        super().__init__()
        self.config = config
        options: dict[str, Any] = {"device": device, "dtype": dtype}
        # An explicit weight keeps the default initialisation from running before ours.
        weight = torch.empty(config.vocab_size, config.hidden_size, **options)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, _weight=weight)
        self.layers = nn.ModuleList(DecoderLayer(config, kind, **options) for kind in config.layer_types)
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps, **options)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws the embedding anew; the layers draw theirs."""
        init_weight_(self.embed_tokens.weight, self.config.initializer_range)

    def forward(
        self,
        input_ids: Tensor,
        layout: TokenLayout,
        cache: JetNemotronCache | None = None,
        features: list[Tensor] | None = None,
    ) -> Tensor:
        """Runs tokens through the layers.

        Args:
            input_ids: arranged as `layout` says.
            layout: where each token belongs.
            cache: states of the layers, read and updated in place.
            features: the residual stream behind each layer is appended to it.

        Returns: the final hidden states, arranged alike.
        """
        h = self.embed_tokens(input_ids)
        rotary = None
        # What stands in a mixer's place, such as a wrapper, may not say what the mixer wants.
        if any(getattr(layer.self_attn, "uses_rotary", True) for layer in self.layers):
            rotary = rotary_table(layout.positions, self.config.head_size, self.config.rope_theta)
        if cache is not None:
            cache.begin()
        for i, layer in enumerate(self.layers):
            if self.recompute_layers and cache is None and torch.is_grad_enabled():
                h = recompute(layer, h, layout, rotary, None, use_reentrant=False)
            else:
                h = layer(h, layout, rotary, None if cache is None else cache.layers[i])
            if features is not None:
                features.append(h)
        return self.norm(h)

    def with_mixers(self, config: JetNemotronConfig, mixers: Sequence[TokenMixer]) -> JetNemotronModel:
        """A model of `config` that shares every module with this one but the token mixers: those are `mixers`."""
        model = _shallow_copy(self)
        model.config = config
        model.layers = nn.ModuleList(map(_shallow_copy, self.layers))
        for layer, mixer in zip(model.layers, mixers, strict=True):
            layer.self_attn = mixer
        return model


class JetNemotronForCausalLM(nn.Module):
    """The Jet-Nemotron language model (arXiv 2508.15884); parameters named as in the published checkpoints.

    The head shares the embedding's weight unless config.tie_word_embeddings is false. A_log and dt_bias of the
    JetBlock layers are fp32 whatever `dtype` is.
    """

    def __init__(self, config: JetNemotronConfig, *, device: Device = None, dtype: torch.dtype | None = None):
        super().__init__()
        self.config = config
        # Name -> content of the small files that lay beside the weights; see `checkpoint.COMPANIONS`.
        self.companions: dict[str, bytes] = {}
        self.model = JetNemotronModel(config, device=device, dtype=dtype)
        if not config.tie_word_embeddings:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False, device=device, dtype=dtype)
            init_weight_(self.lm_head.weight, config.initializer_range)

    @property
    def head_weight(self) -> Tensor:
        """[vocab, C]."""
        return self.model.embed_tokens.weight if self.config.tie_word_embeddings else self.lm_head.weight

    def head(self, h: Tensor) -> Tensor:
        """Final hidden states [..., C] -> logits [..., vocab]."""
        if not self.config.tie_word_embeddings:
            return self.lm_head(h)
        weight = self.model.embed_tokens.weight
        if not isinstance(weight, Tensor) or weight.device != h.device:
            got = (
                f"on {weight.device}"
                if isinstance(weight, Tensor)
                else f"{type(weight).__name__} (a quantised module?)"
            )
            raise RuntimeError(
                f"the head is tied to embed_tokens, whose weight must be a tensor on {h.device}, got {got}: leave "
                "embed_tokens out of offloading and quantisation, or give the head a weight of its own "
                "(tie_word_embeddings=False)"
            )
        return F.linear(h, weight)

    @property
    def device(self) -> torch.device:
        """Where the model computes."""
        embedding = self.model.embed_tokens
        return computing_device(embedding, floating_weight(embedding, self.model.norm))

    @property
    def dtype(self) -> torch.dtype:
        """That of its weights; A_log and dt_bias of JetBlock layers are fp32 at least."""
        return floating_weight(self.model.embed_tokens, self.model.norm).dtype

    def new_cache(self, batch_size: int, max_length: int) -> JetNemotronCache:
        """An empty cache for `batch_size` sequences of up to `max_length` tokens."""
        mixers = [
            layer.self_attn if isinstance(layer.self_attn, TokenMixer) else MIXERS[kind]
            for layer, kind in zip(self.model.layers, self.config.layer_types, strict=True)
        ]
        return JetNemotronCache(
            self.config, batch_size, max_length, device=self.device, dtype=self.dtype, mixers=mixers
        )

    def with_mixers(self, config: JetNemotronConfig, mixers: Sequence[TokenMixer]) -> JetNemotronForCausalLM:
        """A model of `config` that shares every module with this one but the token mixers: those are `mixers`.

        The configs may differ in the layers alone. Nothing is copied: a change of a parameter is a change of both.
        """
        model = _shallow_copy(self)
        model.config = config
        model.model = self.model.with_mixers(config, mixers)
        return model

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        cache: JetNemotronCache | None = None,
        *,
        cu_seqlens: Tensor | None = None,
        labels: Tensor | None = None,
        last_logits_only: bool = False,
    ) -> CausalLMOutput:
        """Runs new tokens through the model.

        Args:
            input_ids: [B, T] int64, T >= 0.
            attention_mask: [B, T] or longer (the last T columns count), zero at padding, on either side. Padded
                positions have zero logits and influence nothing; positions count real tokens only.
            cache: memory of earlier tokens of each row (`new_cache`); read, and extended in place. A call with a
                cache computes no gradient.
            cu_seqlens: [N+1] boundaries of N sequences packed into one row (B = 1); the cache then has N rows.
            labels: [B, T], -100 where there is none; the loss is the mean cross-entropy (natural log, fp32) of each
                token's successor in its own sequence, 0 if there is none.
            last_logits_only: logits of the last new token of each sequence, [N, 1, vocab]; zeros where there is none.

        Returns: the logits, and the loss and the cache where there are any.

        Raises:
            ValueError: an argument is wrong; nothing has been computed.
            RuntimeError: the cache or the head cannot be used for this call.
        """
        _check_ids(input_ids, self.config.vocab_size)
        self._check_place(input_ids, cache)
        if labels is not None:
            _check_labels(labels, input_ids, self.config.vocab_size)
        layout, padding = self._arrange(input_ids, attention_mask, cache, cu_seqlens)
        with torch.set_grad_enabled(torch.is_grad_enabled() and cache is None):
            h = self.model(input_ids if padding is None else padding.pack(input_ids), layout, cache)
            loss = None
            if last_logits_only and labels is None:
                logits = self.head(layout.last(h))
            else:
                logits = self.head(h)
                loss = None if labels is None else _mean_cross_entropy(logits, layout.next_labels(labels, padding))
                if last_logits_only:
                    logits = layout.last(logits)
                elif padding is not None:
                    logits = padding.restore(logits)
            if cache is not None:
                # Last: who gets no logits should not go on as if the tokens had been read.
                cache.advance(layout)
            return CausalLMOutput(loss=loss, logits=logits, cache=cache)

    def _check_place(self, input_ids: Tensor, cache: JetNemotronCache | None) -> None:
        embedding = self.model.embed_tokens
        # A hook may bring the ids to the weight, or the weight to the ids.
        if type(embedding) is nn.Embedding and embedding.weight.device != input_ids.device and not has_hooks(embedding):
            raise ValueError(f"input_ids must be on {embedding.weight.device}, like the model, got {input_ids.device}")
        if cache is not None and not isinstance(cache, JetNemotronCache):
            raise ValueError(f"cache must be a JetNemotronCache (new_cache makes one), got {type(cache).__name__}")
        if cache is not None:
            cache.check_model(self.config)
        if self.config.tie_word_embeddings and "lm_head" in self._modules:
            raise RuntimeError(
                "the head is tied to embed_tokens, so the model's lm_head would not be used: set "
                "config.tie_word_embeddings = False to use it, or delete it"
            )

    def _arrange(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        cache: JetNemotronCache | None,
        cu_seqlens: Tensor | None,
    ) -> tuple[TokenLayout, Unpadding | None]:
        """Checks the call and finds out where each token belongs; a padded batch becomes a packed one."""
        B, T = input_ids.shape
        padding = None
        if cu_seqlens is not None:
            if attention_mask is not None:
                raise ValueError("attention_mask and cu_seqlens exclude each other; got both")
            if (
                not isinstance(cu_seqlens, Tensor)
                or cu_seqlens.dim() != 1
                or cu_seqlens.dtype not in (torch.int64, torch.int32)
            ):
                got = (
                    f"{cu_seqlens.dtype} {list(cu_seqlens.shape)}"
                    if isinstance(cu_seqlens, Tensor)
                    else type(cu_seqlens).__name__
                )
                raise ValueError(f"cu_seqlens must be a tensor [N+1] of int64 or int32, got {got}")
            if cu_seqlens.device != input_ids.device:
                raise ValueError(f"cu_seqlens must be on {input_ids.device}, like input_ids, got {cu_seqlens.device}")
            bounds = cu_seqlens.tolist()
            new = [b - a for a, b in zip(bounds, bounds[1:])]
            if B != 1 or not bounds or bounds[0] != 0 or bounds[-1] != T or min(new, default=0) < 0:
                raise ValueError(f"cu_seqlens must rise from 0 to T = {T} with B = 1, got {bounds} with B = {B}")
        else:
            new = [T] * B
            if attention_mask is not None:
                padding = find_padding(attention_mask, B, T, input_ids.device)
            if padding is not None:
                new, cu_seqlens = padding.lengths, padding.cu_seqlens
        past, past_device = [0] * len(new), None
        if cache is not None:
            cache.check(new)
            past, past_device = list(cache.lengths), cache.lengths_device
        if cu_seqlens is not None:
            return TokenLayout.packed(new, cu_seqlens, past, past_device), padding
        return TokenLayout.dense(B, T, past, past_device, input_ids.device), None

    @torch.no_grad()
    def generate(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, max_new_tokens: int = 128, **options: Any
    ) -> Tensor:
        """Continues each row; see `jetkernels.model.generation.generate` for the options. Greedy by default."""
        return generation.generate(self, input_ids, attention_mask, max_new_tokens, **options)

    @classmethod
    def from_pretrained(
        cls,
        folder: str | Path,
        *,
        dtype: torch.dtype | str | None = None,
        device: Device = None,
        progress: Progress = iter,
    ) -> JetNemotronForCausalLM:
        """Loads config.json and safetensors weights from a local folder; see `checkpoint.load` for what is refused.

        All files are of one save, even if others save into the folder meanwhile. The tokenizer's files, chat template
        and generation_config.json that lie beside the weights are kept for `save_pretrained`.

        Args:
            folder: with config.json and model.safetensors, or shards of it and their index.
            dtype: of the loaded model, a floating one or its name; None and "auto": the config's torch_dtype.
            device: of the loaded model; the CPU by default.
            progress: wraps the list of tensors, as tqdm does.

        Raises:
            OSError: the folder or a file in it is missing or cannot be opened.
            ValueError: a file is damaged, or does not fit the others; or dtype is no floating one.
        """
        read = JetNemotronConfig.from_dict
        return checkpoint.load_folder(cls, folder, read, dtype=dtype, device=device, progress=progress)

    def save_pretrained(self, folder: str | Path, max_shard_bytes: int = checkpoint.MAX_SHARD_BYTES) -> None:
        """Writes config.json and safetensors weights into a local folder; see `checkpoint.save`."""
        checkpoint.save(self, folder, max_shard_bytes)

    @classmethod
    def empty(
        cls, config: JetNemotronConfig, *, device: Device = None, dtype: torch.dtype | str | None = None
    ) -> JetNemotronForCausalLM:
        """A model whose parameters are allocated, in their dtype, but hold no values yet."""
        return checkpoint.allocate(cls(config, device="meta", dtype=checkpoint.chosen_dtype(dtype, config)), device)

    @classmethod
    def random(
        cls,
        config: JetNemotronConfig,
        *,
        device: Device = None,
        dtype: torch.dtype | str | None = None,
        seed: int = 0,
        progress: Progress = iter,
    ) -> JetNemotronForCausalLM:
        """A freshly initialised model; a seed gives the same one each time and leaves the global generators alone.

        The parameters are drawn directly in their dtype, so nothing is ever held twice.

        Args:
            config: of the model.
            device: of the model; the CPU by default.
            dtype: of the model, a floating one or its name; the config's by default.
            seed: of the values.
            progress: wraps the list of modules, as tqdm does.
        """
        model = cls.empty(config, device=device, dtype=dtype)
        devices = [model.device] if model.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(seed)
            model.reset_parameters(progress)
        return model

    def reset_parameters(self, progress: Progress = iter) -> None:
        """Draws every parameter anew."""
        # The linear layers are filled by the module that owns them.
        owners = (JetNemotronModel, TokenMixer, MLP, RMSNorm)
        for module in progress([module for module in self.modules() if isinstance(module, owners)]):
            module.reset_parameters()
        if not self.config.tie_word_embeddings:
            init_weight_(self.lm_head.weight, self.config.initializer_range)


def _shallow_copy(module: M) -> M:
    """The same parameters and submodules, in a module in which the latter can be replaced."""
    copied = copy.copy(module)
    copied._modules = dict(module._modules)
    return copied


def _check_ids(input_ids: Tensor, vocab_size: int) -> None:
    if not isinstance(input_ids, Tensor):
        raise ValueError(f"input_ids must be a tensor, got {type(input_ids).__name__}")
    if input_ids.dim() != 2:
        raise ValueError(f"input_ids must be [B, T], got {list(input_ids.shape)}")
    if input_ids.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"input_ids must be int64 or int32, got {input_ids.dtype}")
    if _values_at_hand(input_ids):
        for value in map(int, input_ids.aminmax()):
            if not 0 <= value < vocab_size:
                raise ValueError(f"input_ids must be in 0..{vocab_size - 1}, got {value}")


def _values_at_hand(x: Tensor) -> bool:
    """Whether there are values to look at, without waiting for a device.

    There are none in a compiled program, under vmap or torch.func.grad.
    """
    return (
        x.device.type == "cpu"
        and x.numel() > 0
        and not torch.compiler.is_compiling()
        and not torch._C._functorch.is_functorch_wrapped_tensor(x)
    )


def _check_labels(labels: Tensor, input_ids: Tensor, vocab_size: int) -> None:
    if not isinstance(labels, Tensor):
        raise ValueError(f"labels must be a tensor, got {type(labels).__name__}")
    if labels.device != input_ids.device:
        raise ValueError(f"labels must be on {input_ids.device}, like input_ids, got {labels.device}")
    if labels.shape != input_ids.shape:
        raise ValueError(f"labels must be {list(input_ids.shape)}, got {list(labels.shape)}")
    if labels.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"labels must be int64 or int32, got {labels.dtype}")
    if _values_at_hand(labels):
        wrong = labels[(labels != -100) & ((labels < 0) | (labels >= vocab_size))]
        if wrong.numel():
            raise ValueError(f"labels must be in 0..{vocab_size - 1}, or -100 for none, got {wrong[0].item()}")


def _mean_cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean over the targets that are not -100, in fp32; 0 if all are."""
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    total = F.cross_entropy(wide.flatten(0, 1), targets.flatten().to(torch.int64), ignore_index=-100, reduction="sum")
    return total / (targets != -100).sum().clamp(min=1)
