"""The published config.json as a config of transformers."""

from __future__ import annotations

from typing import Any, ClassVar

from transformers import PreTrainedConfig

from jetkernels.model import config as network
from jetkernels.model.rotary import rotary_fields

# Kind of layer in config.json -> its name in transformers, which knows no other.
LAYER_NAMES = {"jet": "linear_attention", "attn": "full_attention", "swa": "sliding_attention"}
_KINDS = {name: kind for kind, name in LAYER_NAMES.items()}
_DEFAULT = network.JetNemotronConfig  # its attributes are its defaults


class JetNemotronConfig(PreTrainedConfig):
    """The values of `jetkernels.model.JetNemotronConfig`, which checks them, and transformers' own.

    `layer_types` has transformers' names, linear_attention, full_attention and sliding_attention; the published ones,
    jet, attn and swa, are read too, and written. So are `rope_theta` and `rope_scaling`, which transformers keeps in
    `rope_parameters`.

    Attributes:
        sliding_window: tokens that a sliding_attention layer sees, of `efficient_attention_config.swa`; None where
            there is no such layer.

    Raises:
        ValueError: a value is not one that this model can have.
        TypeError: a value is missing.
    """

    model_type: ClassVar[str] = "jet_nemotron"
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["past_key_values"]
    default_theta = _DEFAULT.rope_theta

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    layer_types: list[str]
    num_attention_heads: int
    num_key_value_heads: int
    efficient_attention_config: dict
    num_hidden_layers: int | None = None  # follows from layer_types
    head_dim: int | None = None  # hidden_size / num_attention_heads
    rms_norm_eps: float = _DEFAULT.rms_norm_eps
    rope_parameters: dict | None = None
    attention_bias: bool = _DEFAULT.attention_bias
    use_qk_norm: bool = _DEFAULT.use_qk_norm
    initializer_range: float = _DEFAULT.initializer_range
    max_position_embeddings: int = _DEFAULT.max_position_embeddings
    tie_word_embeddings: bool = _DEFAULT.tie_word_embeddings
    use_cache: bool = True
    bos_token_id: int | None = _DEFAULT.bos_token_id
    eos_token_id: int | list[int] | None = _DEFAULT.eos_token_id
    pad_token_id: int | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        if isinstance(self.layer_types, (list, tuple)):
            self.layer_types = [LAYER_NAMES.get(kind, kind) for kind in self.layer_types]
        super().__post_init__(**kwargs)
        checked = self.network_config()
        self.num_hidden_layers = checked.num_hidden_layers
        self.head_dim = checked.head_dim
        self.sliding_window = checked.window_size if "swa" in checked.layer_types else None

    def network_config(self) -> network.JetNemotronConfig:
        """The same as a config of `jetkernels.model`.

        Raises:
            ValueError: it is none.
        """
        values = {key: value for key, value in self.to_dict().items() if value is not None or key in _NONE_MEANS}
        config = network.JetNemotronConfig.from_dict(values)
        given = getattr(self, "sliding_window", None)
        if "swa" in config.layer_types and given not in (None, config.window_size):
            raise ValueError(
                "sliding_window must be that of efficient_attention_config.swa, from which it follows, "
                f"{config.window_size}, got {given!r}"
            )
        return config

    def to_dict(self) -> dict[str, Any]:
        """The content of config.json: published names and keys, and transformers' own."""
        values = super().to_dict()
        if values.get("layer_types") is not None:
            values["layer_types"] = [_KINDS.get(name, name) for name in values["layer_types"]]
        values |= rotary_fields(values)  # refuses rotations that are not computed
        del values["rope_parameters"]
        values.pop("sliding_window", None)
        # transformers warns of `rope_scaling` where it reads a config as one of any model.
        for name, meant in (network.UNPUBLISHED | {"rope_scaling": None}).items():
            if values.get(name) is meant:
                del values[name]
        return values


# Keys for which None is a value like others.
_NONE_MEANS = ("bos_token_id", "eos_token_id", "pad_token_id")
