"""The language model: the network with a head, its calls, and its files."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.types import Device

from jetkernels.modules import RMSNorm
from jetkernels.modules.initialization import init_weight_
from jetkernels.modules.linear import has_hooks
from jetkernels.modules.projections import apply, linear
from jetkernels.modules.quantized import Quantized, QuantizedLinear, quantize_
from jetkernels.modules.stand_in import HasStandIn, may_step, runs_own_code

from . import checkpoint, generation
from .cache import JetNemotronCache
from .config import JetNemotronConfig
from .decoder_layer import MLP as MLP  # where pickled models look for it
from .decoder_layer import DecoderLayer as DecoderLayer
from .inputs import check_ids, check_labels
from .layout import arrange
from .network import JetNemotronModel, shallow_copy  # pickled models look for the first one here too
from .output import CausalLMOutput
from .token_mixer import Draft, TokenMixer

Progress = Callable[[list], Iterable]


class JetNemotronForCausalLM(HasStandIn):
    """The Jet-Nemotron language model (arXiv 2508.15884); parameters named as in the published checkpoints.

    The head shares the embedding's weight unless config.tie_word_embeddings is false. A_log and dt_bias of the
    JetBlock layers are fp32 whatever `dtype` is.
    """

    lm_head: nn.Linear | QuantizedLinear

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
            return apply(self.lm_head, "lm_head", h)
        weight = getattr(self.model.embed_tokens, "weight", None)
        if not isinstance(weight, Tensor) or weight.device != h.device:
            got = (
                f"on {weight.device}"
                if isinstance(weight, Tensor)
                else f"{type(weight).__name__} (a quantised or wrapped module?)"
            )
            raise RuntimeError(
                f"the head is tied to embed_tokens, whose weight must be a tensor on {h.device}, got {got}: leave "
                "embed_tokens out of offloading, quantisation and wrappers, or give the head a weight of its own "
                "(tie_word_embeddings=False)"
            )
        return F.linear(h, weight) if torch.is_grad_enabled() else linear(h, weight)

    @property
    def device(self) -> torch.device:
        """Where the model computes."""
        return self.model.device

    @property
    def dtype(self) -> torch.dtype:
        """That of its weights; A_log and dt_bias of JetBlock layers are fp32 at least."""
        return self.model.dtype

    def quantize_(self, bits: int, group_size: int | None = None, skip: Collection[str] = ()) -> Quantized:
        """Replaces the Linear layers, the head too, by ones whose weights have 8 or 4 bits, in place and one by one.

        A head that shares the embedding's weight becomes `lm_head`, a quantised copy of it, and the config says
        `tie_word_embeddings = False` from then on; the embedding stays as it is. Gradients go through the layers to
        what is still a parameter. `save_pretrained` refuses a quantised model.

        Args:
            bits: 8 or 4.
            group_size: columns that share a scale; see `QuantizedLinear`.
            skip: names of layers that stay, "lm_head" included; see `jetkernels.modules.quantize_`.

        Raises:
            ValueError: as `jetkernels.modules.quantize_`.
        """
        tied = self.config.tie_word_embeddings
        report = quantize_(self, bits, group_size, [name for name in skip if not (tied and name == "lm_head")])
        if tied and "lm_head" not in skip:
            weight = self.model.embed_tokens.weight
            head = QuantizedLinear(weight.shape[1], weight.shape[0], bits, group_size, device=weight.device)
            head.quantize_weight_(weight.detach())
            self.lm_head = head.train(self.training)
            self.register_load_state_dict_pre_hook(_find_head)
            # A copy: the config may be that of other models too.
            self.config = self.model.config = dataclasses.replace(self.config, tie_word_embeddings=False)
            report.replaced.append("lm_head")
        return report

    def new_cache(self, batch_size: int, max_length: int) -> JetNemotronCache:
        """An empty cache for `batch_size` sequences of up to `max_length` tokens."""
        return self.model.new_cache(batch_size, max_length)

    def with_mixers(self, config: JetNemotronConfig, mixers: Sequence[TokenMixer]) -> JetNemotronForCausalLM:
        """A model of `config` that shares every module with this one but the token mixers: those are `mixers`.

        The configs may differ in the layers alone. Nothing is copied: a change of a parameter is a change of both.
        """
        model = shallow_copy(self)
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
        check_ids(input_ids, self.config.vocab_size)
        self._check_place(input_ids, cache)
        if labels is not None:
            check_labels(labels, input_ids, self.config.vocab_size)
        layout, padding = arrange(input_ids, attention_mask, cache, cu_seqlens)
        is_step = layout.is_dense and input_ids.shape[1] == 1 and labels is None
        if cache is not None and not cache.is_drafting and is_step and self._model_may_step():
            with torch.no_grad():
                return CausalLMOutput(logits=self._step(input_ids[:, 0], cache)[:, None], cache=cache)
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

    @torch.no_grad()
    def step(self, tokens: Tensor, cache: JetNemotronCache) -> Tensor:
        """One more token of each sequence of a cache. Everything that depends on values happens on the device.

        Args:
            tokens: [N] int64.
            cache: memory of the earlier tokens; read, and extended in place.

        Returns: logits [N, vocab] of the tokens after these.

        Raises:
            ValueError: an argument is wrong; nothing has been computed.
            RuntimeError: the cache or the head cannot be used for this call.
        """
        if not isinstance(cache, JetNemotronCache):
            raise ValueError(f"cache must be a JetNemotronCache (new_cache makes one), got {type(cache).__name__}")
        if not isinstance(tokens, Tensor) or tokens.dim() != 1:
            got = list(tokens.shape) if isinstance(tokens, Tensor) else type(tokens).__name__
            raise ValueError(f"tokens must be a tensor [N], got {got}")
        check_ids(tokens[:, None], self.config.vocab_size)
        self._check_place(tokens, cache)
        if not (may_step(self) and self._model_may_step()):
            return self(tokens[:, None], cache=cache).logits[:, 0]
        cache.check([1] * len(tokens))
        return self._step(tokens, cache)

    @torch.no_grad()
    def verify(self, draft_ids: Tensor, cache: JetNemotronCache) -> Tensor:
        """Reads draft tokens of each sequence of a cache; which of them count is said later, by `cache.commit`.

        Until then the cache refuses other calls. The logits differ from those of steps by rounding alone.

        Args:
            draft_ids: [N, T] int64.
            cache: memory of the earlier tokens, which stays as it is.

        Returns: logits [N, T, vocab] of the tokens after these.

        Raises:
            ValueError: an argument is wrong, or a layer cannot verify drafts; nothing has been computed.
            RuntimeError: the cache or the head cannot be used for this call.
        """
        if not isinstance(cache, JetNemotronCache):
            raise ValueError(f"cache must be a JetNemotronCache (new_cache makes one), got {type(cache).__name__}")
        with cache.drafting(self.draft_types()):
            return self(draft_ids, cache=cache).logits

    def draft_types(self) -> list[type[Draft]]:
        """The `TokenMixer.draft_type` of each layer.

        Raises:
            ValueError: a layer has none.
        """
        return self.model.draft_types()

    def _model_may_step(self) -> bool:
        return isinstance(self.model, JetNemotronModel) and may_step(self.model)

    def _step(self, tokens: Tensor, cache: JetNemotronCache) -> Tensor:
        cache.begin()
        logits = self.compute_step(tokens, cache)
        cache.count_step()
        return logits

    def compute_step(self, tokens: Tensor, cache: JetNemotronCache) -> Tensor:
        """The part of `step` that is done by the device, without a check: what a CUDA graph can hold."""
        logits = self.head(self.model.step(tokens, cache.lengths_device, cache.layers))
        cache.lengths_device += 1
        return logits

    @property
    def has_device_steps(self) -> bool:
        """Whether `compute_step` is all there is to a step, and reads nothing on the host.

        It is so where the code of every module is this library's own or PyTorch's and no hook waits for a call: a CUDA
        graph does not call it again.
        """
        steps = may_step(self) and self._model_may_step() and self.model.has_device_steps
        return steps and all(map(runs_own_code, self.modules()))

    def _check_place(self, input_ids: Tensor, cache: JetNemotronCache | None) -> None:
        embedding = self.model.embed_tokens
        # A hook may bring the ids to the weight, or the weight to the ids.
        if type(embedding) is nn.Embedding and embedding.weight.device != input_ids.device and not has_hooks(embedding):
            raise ValueError(f"input_ids must be on {embedding.weight.device}, like the model, got {input_ids.device}")
        if cache is not None and not isinstance(cache, JetNemotronCache):
            raise ValueError(f"cache must be a JetNemotronCache (new_cache makes one), got {type(cache).__name__}")
        if cache is not None:
            cache.check_model(self.config, self.device, self.dtype)
        if self.config.tie_word_embeddings and "lm_head" in self._modules:
            raise RuntimeError(
                "the head is tied to embed_tokens, so the model's lm_head would not be used: set "
                "config.tie_word_embeddings = False to use it, or delete it"
            )

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
        quantize: int | None = None,
        progress: Progress = iter,
    ) -> JetNemotronForCausalLM:
        """Loads config.json and safetensors weights from a local folder; see `checkpoint.load` for what is refused.

        All files are of one save, even if others save into the folder meanwhile. The tokenizer's files, chat template
        and generation_config.json that lie beside the weights are kept for `save_pretrained`.

        Args:
            folder: with config.json and model.safetensors, or shards of it and their index.
            dtype: of the loaded model, a floating one or its name; None and "auto": the config's torch_dtype.
            device: of the loaded model; the CPU by default.
            quantize: bits, 8 or 4: the model is as after `quantize_`, but its weights are never there unquantised, all
                at once.
            progress: wraps the list of tensors, as tqdm does.

        Raises:
            OSError: the folder or a file in it is missing or cannot be opened.
            ValueError: a file is damaged, or does not fit the others; or dtype is no floating one.
        """
        read = JetNemotronConfig.from_dict
        return checkpoint.load_folder(
            cls, folder, read, dtype=dtype, device=device, quantize=quantize, progress=progress
        )

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
        quantize: int | None = None,
        progress: Progress = iter,
    ) -> JetNemotronForCausalLM:
        """A freshly initialised model; a seed gives the same one each time and leaves the global generators alone.

        The parameters are drawn directly in their dtype, so nothing is ever held twice.

        Args:
            config: of the model.
            device: of the model; the CPU by default.
            dtype: of the model, a floating one or its name; the config's by default.
            seed: of the values.
            quantize: bits, 8 or 4: the model is as after `quantize_`, but its weights are never there unquantised, all
                at once.
            progress: wraps the list of the model's parts, as tqdm does.
        """
        device = torch.device("cpu" if device is None else device)
        model = cls(config, device="meta", dtype=checkpoint.chosen_dtype(dtype, config))
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.manual_seed(seed)
            for part in progress(model._parts()):
                checkpoint.allocate(part, device)
                model._reset_part(part)
                if quantize is not None:
                    quantize_(part, quantize)
        if quantize is not None:
            model.quantize_(quantize)  # the head
        return model

    def reset_parameters(self, progress: Progress = iter) -> None:
        """Draws every parameter anew.

        Raises:
            ValueError: a layer is quantised; nothing has been drawn.
        """
        if quantized := [name for name, module in self.named_modules() if isinstance(module, QuantizedLinear)]:
            raise ValueError(f"reset_parameters: the model must not be quantised, got quantised {', '.join(quantized)}")
        for part in progress(self._parts()):
            self._reset_part(part)

    def _parts(self) -> list[nn.Module]:
        """What the model is made of, in the order in which it is drawn."""
        parts = [self.model.embed_tokens, *self.model.layers, self.model.norm]
        return parts if self.config.tie_word_embeddings else [*parts, self.lm_head]

    def _reset_part(self, part: nn.Module) -> None:
        if isinstance(part, (nn.Embedding, nn.Linear)):
            init_weight_(part.weight, self.config.initializer_range)
        for module in part.modules():
            # The linear layers are filled by the module that owns them.
            if isinstance(module, (TokenMixer, MLP, RMSNorm)):
                module.reset_parameters()


def _find_head(model: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    """The weights of a tied model have no head of their own."""
    embedding = state_dict.get(f"{prefix}model.embed_tokens.weight")
    if embedding is not None:
        state_dict.setdefault(f"{prefix}lm_head.weight", embedding)


def _mean_cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean over the targets that are not -100, in fp32; 0 if all are."""
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    total = F.cross_entropy(wide.flatten(0, 1), targets.flatten().to(torch.int64), ignore_index=-100, reduction="sum")
    return total / (targets != -100).sum().clamp(min=1)
