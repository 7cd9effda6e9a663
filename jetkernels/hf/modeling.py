"""The models of transformers around the network of `jetkernels.model`."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

from jetkernels.model import JetNemotronCache
from jetkernels.model.inputs import check_ids, check_labels
from jetkernels.model.layout import TokenLayout, arrange
from jetkernels.model.network import JetNemotronModel as Network
from jetkernels.model.token_mixer import TokenMixer
from jetkernels.modules.padding import Unpadding
from jetkernels.modules.projections import FusedProjections, apply

from .cache import PastKeyValues, check_cache
from .config import JetNemotronConfig


class JetNemotronPreTrainedModel(PreTrainedModel):
    """What transformers asks about both models."""

    config: JetNemotronConfig
    config_class = JetNemotronConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["DecoderLayer"]
    _skip_keys_device_placement = ["past_key_values"]
    _keep_in_fp32_modules_strict = {"A_log", "dt_bias"}
    _supports_sdpa = True

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """See `PreTrainedModel.from_pretrained`, whose arguments these are."""
        loaded = super().from_pretrained(*args, **kwargs)
        for module in (loaded[0] if isinstance(loaded, tuple) else loaded).modules():
            if isinstance(module, FusedProjections):
                module.fuse()  # the weights came one by one
        return loaded

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Draws the parameters that a checkpoint did not have."""
        super()._init_weights(module)
        if isinstance(module, TokenMixer):
            loaded = [p for p in module.parameters() if getattr(p, "_is_hf_initialized", False)]
            values = [parameter.clone() for parameter in loaded]
            module.reset_parameters()
            for parameter, value in zip(loaded, values):
                parameter.copy_(value)

    def _set_gradient_checkpointing(
        self, enable: bool = True, gradient_checkpointing_func: Callable = checkpoint, every_n_layers: int = 1
    ) -> None:
        options = getattr(gradient_checkpointing_func, "keywords", {})
        other = {name: value for name, value in options.items() if (name, value) != ("use_reentrant", False)}
        if enable and (other or every_n_layers != 1):
            got = other | ({} if every_n_layers == 1 else {"every_n_layers": every_n_layers})
            raise ValueError(
                "activation checkpointing must be use_reentrant=False and of every layer, "
                f"got {', '.join(f'{name}={value}' for name, value in got.items())}"
            )
        super()._set_gradient_checkpointing(enable, gradient_checkpointing_func)

    def _check_devices(self) -> None:
        """Raises ValueError where device_map spread the layers over several accelerators."""
        devices = {str(d) for d in getattr(self, "hf_device_map", {}).values()} - {"cpu", "disk"}
        if len(devices) > 1:
            raise ValueError(
                f"device_map must have one accelerator, got {', '.join(sorted(devices))}: "
                'give its name, such as device_map="cuda:0"'
            )


class JetNemotronModel(JetNemotronPreTrainedModel):
    """Embedding, decoder layers and final norm.

    Its modules are those of a `jetkernels.model.network.JetNemotronModel`, `network`, which computes.
    """

    def __init__(self, config: JetNemotronConfig):
        super().__init__(config)
        self.gradient_checkpointing = False
        network = Network(config.network_config())
        for name, module in network.named_children():
            self.add_module(name, module)
            if not network.norm.weight.is_meta:  # they have been drawn
                for part in module.modules():
                    part.__dict__["_is_hf_initialized"] = True
        network._modules = self._modules
        self.__dict__["_network"] = network  # not a submodule: the parameters have one name each
        self.post_init()

    @property
    def network(self) -> Network:
        """The modules of this model, as `jetkernels.model` calls them."""
        network = self.__dict__["_network"]
        if network._modules is not self._modules:  # a shallow copy, as nn.DataParallel makes
            network = self.__dict__["_network"] = copy.copy(network)
            network._modules = self._modules
        return network

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: PastKeyValues | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> BaseModelOutputWithPast | tuple:
        """Runs new tokens through the layers.

        Args:
            input_ids: [B, T] int64.
            attention_mask: [B, T] or longer (the last T columns count), zero at padding, on either side. Padded
                positions have zero hidden states and influence nothing.
            position_ids: [B, T] or [1, T]: what follows from the mask and the cache anyway, the number of each token
                in its row, padding not counted; at padding anything.
            past_key_values: memory of the earlier tokens of each row, extended in place. A call with one computes no
                gradient.
            inputs_embeds: [B, T, C], instead of input_ids.
            use_cache: whether a call without past_key_values makes them; by default what the config says, but not
                where gradients are on.
            output_attentions: must not be true: the weights of the attention are not kept.
            output_hidden_states: whether to return the embeddings, what comes out of each layer but the last, and the
                final hidden states.
            return_dict: false gives a tuple.

        Returns: last_hidden_state [B, T, C], past_key_values, hidden_states; those that there are.

        Raises:
            ValueError: an argument is wrong; nothing has been computed.
        """
        self._check_devices()
        tokens = self._checked(input_ids, inputs_embeds, output_attentions)
        check_cache(past_key_values)
        rows, width = tokens.shape[:2]
        if use_cache is None:
            use_cache = self.config.use_cache and not torch.is_grad_enabled()
        if use_cache and past_key_values is None:
            past_key_values = PastKeyValues()
        memory = None
        if past_key_values is not None:
            memory = past_key_values.reserve(self.network, rows, width)
        layout, padding = arrange(tokens, attention_mask, memory)
        if position_ids is not None:
            _check_positions(position_ids, layout, padding, rows, width)
        wanted = self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        features: list[Tensor] | None = [] if wanted else None
        records = past_key_values is not None and past_key_values.is_recording
        drafting = memory.drafting(self.network.draft_types()) if memory is not None and records else nullcontext()
        with drafting, torch.set_grad_enabled(torch.is_grad_enabled() and memory is None):
            h = self._run(input_ids, inputs_embeds, layout, padding, memory, features)
        if past_key_values is not None:
            past_key_values.count(width, layout.new)
        states = None
        if features is not None:
            states = tuple(f if padding is None else padding.restore(f) for f in features[:-1]) + (h,)
        output = BaseModelOutputWithPast(last_hidden_state=h, past_key_values=past_key_values, hidden_states=states)
        return output if _as_dict(return_dict, self.config) else output.to_tuple()

    def _checked(
        self, input_ids: Tensor | None, inputs_embeds: Tensor | None, output_attentions: bool | None
    ) -> Tensor:
        """The one of the first two that is given. Raises ValueError where a call cannot be served."""
        if output_attentions or (output_attentions is None and self.config.output_attentions):
            raise ValueError("output_attentions must not be true: the weights of the attention are not kept")
        if inputs_embeds is None and input_ids is not None:
            check_ids(input_ids, self.config.vocab_size)
            return input_ids
        if inputs_embeds is None or input_ids is not None:
            raise ValueError(f"give input_ids or inputs_embeds, got {'none' if input_ids is None else 'both'}")
        if inputs_embeds.dim() != 3 or inputs_embeds.shape[2] != self.config.hidden_size:
            raise ValueError(
                f"inputs_embeds must be [B, T, {self.config.hidden_size}], got {list(inputs_embeds.shape)}"
            )
        return inputs_embeds

    def _run(
        self,
        input_ids: Tensor | None,
        inputs_embeds: Tensor | None,
        layout: TokenLayout,
        padding: Unpadding | None,
        memory: JetNemotronCache | None,
        features: list[Tensor] | None,
    ) -> Tensor:
        """The final hidden states [B, T, C]; `features` get embeddings and the stream behind each layer."""
        network = self.network
        is_step = layout.is_dense and layout.max_new == 1 and features is None
        if memory is not None and not memory.is_drafting and is_step and input_ids is not None:
            memory.begin()
            h = network.step(input_ids[:, 0], memory.lengths_device, memory.layers)[:, None]
            memory.lengths_device += 1
            memory.count_step()
            return h
        embeds = inputs_embeds
        if embeds is None:
            assert input_ids is not None
            embeds = network.embed_tokens(input_ids if padding is None else padding.pack(input_ids))
        elif padding is not None:
            embeds = padding.pack(embeds)
        if features is not None:
            features.append(embeds)
        network.recompute_layers = self.gradient_checkpointing and self.training
        h = network(None, layout, memory, features, inputs_embeds=embeds)
        if memory is not None:
            memory.advance(layout)
        return h if padding is None else padding.restore(h)


class JetNemotronForCausalLM(JetNemotronPreTrainedModel, GenerationMixin):
    """The language model; parameters named as in the published checkpoints."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}
    accepts_loss_kwargs = True  # forward takes num_items_in_batch

    def __init__(self, config: JetNemotronConfig):
        super().__init__(config)
        self.model = JetNemotronModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: PastKeyValues | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        return_dict: bool | None = None,
        num_items_in_batch: int | Tensor | None = None,
    ) -> CausalLMOutputWithPast | tuple:
        """Runs new tokens through the model; see `JetNemotronModel.forward` for the arguments that are not here.

        Args:
            input_ids: [B, T] int64.
            attention_mask: [B, T] or longer.
            position_ids: [B, T] or [1, T].
            past_key_values: memory of the earlier tokens.
            inputs_embeds: [B, T, C], instead of input_ids.
            labels: [B, T], those of the tokens themselves, -100 where there is none. The loss is the cross-entropy of
                each token's successor in its own row, padding left out, in fp32.
            use_cache: whether to make past_key_values.
            output_attentions: must not be true.
            output_hidden_states: whether to return hidden_states.
            logits_to_keep: logits of so many last columns, 0 for all of them; or the indices of columns.
            return_dict: false gives a tuple.
            num_items_in_batch: labels of all the batches of a step, by which the loss is divided; by default by those
                of this call.

        Returns: loss, logits [B, T, vocab], past_key_values, hidden_states; those that there are.

        Raises:
            ValueError: an argument is wrong; nothing has been computed.
        """
        self._check_devices()
        targets = None if labels is None else self._targets(input_ids, inputs_embeds, attention_mask, labels)
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        tokens: dict[str, Any] = {
            "input_ids": input_ids,
            "inputs_embeds": inputs_embeds,
            "position_ids": position_ids,
            "attention_mask": attention_mask,
            "past_key_values": past_key_values,
        }
        if isinstance(logits_to_keep, int) and logits_to_keep and labels is None and not output_hidden_states:
            self._read_front(tokens, logits_to_keep)
        outputs = self.model(
            **tokens,
            use_cache=use_cache,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
            return_dict=True,
        )
        h, loss = outputs.last_hidden_state, None
        # A gradient of the head alone would look like one of the model.
        with torch.set_grad_enabled(torch.is_grad_enabled() and outputs.past_key_values is None):
            if targets is None:
                logits = apply(self.lm_head, "lm_head", h[:, kept])
            else:
                logits = apply(self.lm_head, "lm_head", h)
                loss = self.loss_function(
                    logits, labels, logits.shape[-1], num_items_in_batch=num_items_in_batch, shift_labels=targets
                )
                logits = logits[:, kept]
        output = CausalLMOutputWithPast(
            loss=loss, logits=logits, past_key_values=outputs.past_key_values, hidden_states=outputs.hidden_states
        )
        return output if _as_dict(return_dict, self.config) else output.to_tuple()

    def _read_front(self, tokens: dict[str, Any], last: int) -> None:
        """Leaves the `last` columns of a call that is recorded: what is in front of them is read, for good.

        Drafts take memory, and all that `generate` may take back is among the columns whose logits it wants.
        """
        past = tokens["past_key_values"]
        names = [name for name in ("input_ids", "inputs_embeds", "position_ids") if tokens[name] is not None]
        if not isinstance(past, PastKeyValues) or not past.is_recording or not names:
            return
        if last < tokens[names[0]].shape[1]:
            mask = tokens["attention_mask"]
            front = {name: tokens[name][:, :-last] for name in names}
            past.is_recording = False
            try:
                self.model(**front, attention_mask=None if mask is None else mask[:, :-last], past_key_values=past)
            finally:
                past.is_recording = True
            tokens |= {name: tokens[name][:, -last:] for name in names}

    def _targets(
        self, input_ids: Tensor | None, inputs_embeds: Tensor | None, attention_mask: Tensor | None, labels: Tensor
    ) -> Tensor:
        """What each position should predict [B, T]: the label of the next token of its row, -100 for none."""
        tokens = input_ids if inputs_embeds is None else inputs_embeds[..., 0]
        if tokens is not None:
            check_labels(labels, tokens, self.config.vocab_size)
        layout, padding = arrange(labels, attention_mask)
        targets = layout.next_labels(labels, padding).to(torch.int64)
        if padding is None:
            return targets
        return (
            torch.full_like(labels, -100, dtype=torch.int64)
            .flatten()
            .index_copy(0, padding.indices, targets[0])
            .view_as(labels)
        )

    def prepare_inputs_for_generation(  # type: ignore[override]  # `generate` looks for inputs_embeds in the signature
        self, input_ids: Any, inputs_embeds: Tensor | None = None, **kwargs: Any
    ) -> dict[str, Any]:
        """See `GenerationMixin`; what it hands on beside the arguments of `forward` is left out."""
        for name in ("tokenizer", "assistant_tokenizer"):  # of stop_strings
            kwargs.pop(name, None)
        return super().prepare_inputs_for_generation(input_ids, inputs_embeds=inputs_embeds, **kwargs)  # type: ignore[misc]

    def _prepare_cache_for_generation(
        self,
        generation_config: Any,
        model_kwargs: dict[str, Any],
        generation_mode: Any,
        batch_size: int,
        max_cache_length: int,
    ) -> bool:
        kind = generation_config.cache_implementation
        if kind not in (None, "dynamic"):
            raise ValueError(f"cache_implementation must be None: the model has a cache of its own, got {kind!r}")
        check_cache(given := model_kwargs.get("past_key_values"))
        if given is not None:
            given._is_user_defined = True
        elif generation_config.is_assistant:
            raise ValueError("this model cannot be the assistant of another: it takes back tokens of one call only")
        elif generation_config.use_cache:
            model_kwargs["past_key_values"] = PastKeyValues(max_cache_length)
        return True  # nobody reads it


def _as_dict(return_dict: bool | None, config: JetNemotronConfig) -> bool:
    return bool(config.return_dict if return_dict is None else return_dict)


def _check_positions(
    position_ids: Tensor, layout: TokenLayout, padding: Unpadding | None, rows: int, width: int
) -> None:
    """Raises ValueError where they are not the positions that mask and cache give."""
    if position_ids.dim() != 2 or position_ids.shape[0] not in (1, rows) or position_ids.shape[1] != width:
        raise ValueError(f"position_ids must be [{rows}, {width}] or [1, {width}], got {list(position_ids.shape)}")
    if torch.compiler.is_compiling():
        return
    given = position_ids.expand(rows, width)
    if not bool(((given if padding is None else padding.pack(given)) == layout.positions).all()):
        raise ValueError(
            "position_ids must be those that attention_mask and past_key_values give, the number of each token in its "
            "row: leave them out. In generate: pad on the left, keep a token of every row, go on from past_key_values "
            "with a text that continues theirs, and start prompt lookup and assistants without them. Rows that hold "
            "several texts are not served here; jetkernels.model.JetNemotronForCausalLM takes their boundaries as "
            "cu_seqlens"
        )
