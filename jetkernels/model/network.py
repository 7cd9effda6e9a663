"""The hybrid decoder: layers with different token mixers under one pre-norm residual stream."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.types import Device
from torch.utils.checkpoint import checkpoint as recompute

from jetkernels.modules import RMSNorm
from jetkernels.modules.initialization import init_weight_
from jetkernels.modules.linear import computing_device, floating_weight
from jetkernels.modules.norm import add_norm
from jetkernels.modules.stand_in import HasStandIn, may_step

from .attention import rotary_table
from .cache import JetNemotronCache
from .config import JetNemotronConfig
from .decoder_layer import DecoderLayer
from .layout import TokenLayout
from .mixers import MIXERS
from .token_mixer import Draft, Rotary, State, TokenMixer, draft_types, rotary_of_tokens

M = TypeVar("M", bound=nn.Module)


class JetNemotronModel(HasStandIn):
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
        input_ids: Tensor | None,
        layout: TokenLayout,
        cache: JetNemotronCache | None = None,
        features: list[Tensor] | None = None,
        inputs_embeds: Tensor | None = None,
    ) -> Tensor:
        """Runs tokens through the layers.

        Args:
            input_ids: arranged as `layout` says; not read where there are inputs_embeds.
            layout: where each token belongs.
            cache: states of the layers, read and updated in place.
            features: the residual stream behind each layer is appended to it.
            inputs_embeds: what stands for the embeddings of the tokens, arranged alike.

        Returns: the final hidden states, arranged alike.
        """
        h = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        rotary = self._rotary(layout.positions)
        if cache is not None:
            cache.begin()
        for i, layer in enumerate(self.layers):
            if self.recompute_layers and cache is None and torch.is_grad_enabled():
                h = recompute(layer, h, layout, rotary, None, use_reentrant=False)
            else:
                h = layer(h, layout, rotary, None if cache is None else cache.states[i])
            if features is not None:
                features.append(h)
        return self.norm(h)

    def step(self, tokens: Tensor, lengths: Tensor, states: Sequence[State]) -> Tensor:
        """`forward` of one new token of each sequence, without a gradient: a function of tensors on the device.

        Args:
            tokens: [N].
            lengths: [N] int64, tokens that came before in each sequence, on the device.
            states: of the layers, updated in place.

        Returns: the final hidden states [N, C].
        """
        h, more = self.embed_tokens(tokens), None
        rotary = self._rotary(lengths)
        if rotary is not None:
            rotary = rotary[0].squeeze(-2), rotary[1].squeeze(-2)
        for layer, state in zip(self.layers, states, strict=True):
            if isinstance(layer, DecoderLayer) and may_step(layer):
                h, more = layer.step(h, more, state, lengths=lengths, rotary=rotary)
            else:
                h = (h if more is None else h + more)[:, None]
                h, more = layer(h, TokenLayout.of_step(lengths), rotary_of_tokens(rotary), state)[:, 0], None
        return add_norm(self.norm, more, h)[0]

    @property
    def device(self) -> torch.device:
        """Where the model computes."""
        embedding = self.embed_tokens
        return computing_device(embedding, floating_weight(embedding, self.norm))

    @property
    def dtype(self) -> torch.dtype:
        """That of its weights; A_log and dt_bias of JetBlock layers are fp32 at least."""
        return floating_weight(self.embed_tokens, self.norm).dtype

    def new_cache(self, batch_size: int, max_length: int) -> JetNemotronCache:
        """An empty cache for `batch_size` sequences of up to `max_length` tokens."""
        return JetNemotronCache(
            self.config, batch_size, max_length, device=self.device, dtype=self.dtype, mixers=self._mixers()
        )

    def draft_types(self) -> list[type[Draft]]:
        """The `TokenMixer.draft_type` of each layer.

        Raises:
            ValueError: a layer has none.
        """
        return draft_types(self._mixers())

    def _mixers(self) -> list[TokenMixer | type[TokenMixer]]:
        """Those of the layers; the kind that the config names where something else stands in the place of one."""
        return [
            mixer if isinstance(mixer := _mixer(layer), TokenMixer) else MIXERS[kind]
            for layer, kind in zip(self.layers, self.config.layer_types, strict=True)
        ]

    @property
    def has_device_steps(self) -> bool:
        """Whether `step` reads nothing on the host."""
        return all(
            isinstance(layer, DecoderLayer) and may_step(layer) and layer.has_device_step for layer in self.layers
        )

    def _rotary(self, positions: Tensor) -> Rotary | None:
        # What stands in the place of a layer or a mixer, such as a wrapper, may not say what the mixer wants.
        if any(getattr(_mixer(layer), "uses_rotary", True) for layer in self.layers):
            config = self.config
            return rotary_table(positions, config.head_size, config.rope_theta, config.rotary_scaling)
        return None

    def with_mixers(self, config: JetNemotronConfig, mixers: Sequence[TokenMixer]) -> JetNemotronModel:
        """A model of `config` that shares every module with this one but the token mixers: those are `mixers`."""
        model = shallow_copy(self)
        model.config = config
        model.layers = nn.ModuleList(map(shallow_copy, self.layers))
        for i, (layer, mixer) in enumerate(zip(model.layers, mixers, strict=True)):
            if _mixer(layer) is None:
                raise ValueError(f"layers[{i}] must have a self_attn to be replaced, got {type(layer).__name__}")
            layer.self_attn = mixer
        return model


def _mixer(layer: nn.Module) -> object:
    """The token mixer of a layer, or what stands in its place; None for a wrapper round the layer."""
    return getattr(layer, "self_attn", None)


def shallow_copy(module: M) -> M:
    """The same parameters and submodules, in a module in which the latter can be replaced."""
    copied = copy.copy(module)
    copied._modules = dict(module._modules)
    return copied
