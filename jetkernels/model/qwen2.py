"""Published Qwen2 and Qwen2.5 models: their config.json as one of this library's. Their weights have the same names."""

from __future__ import annotations

from collections.abc import Mapping

from .config import JetNemotronConfig, layer_count

# Keys of a published Qwen2 config that name the same thing here.
_SHARED = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "num_key_value_heads",
    "rms_norm_eps",
    "rope_theta",
    "initializer_range",
    "max_position_embeddings",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
    "head_dim",
)
# What Qwen2 means by a key that its config does not write; each differs from ours or is missing there.
_DEFAULTS = {"rope_theta": 10000.0, "tie_word_embeddings": False, "bos_token_id": None, "eos_token_id": None}


def qwen2_config(values: Mapping) -> JetNemotronConfig:
    """The content of a published Qwen2 or Qwen2.5 config.json -> the same model here, every layer full attention.

    Raises:
        ValueError: the model is another one: another model_type, sliding windows in use, scaled positions, another
            activation; or a key is missing.

    Source: the published config.json files and transformers' Qwen2Config.
    """
    model_type = values.get("model_type")
    if model_type != "qwen2":
        raise ValueError(f"base: model_type must be qwen2, got {model_type!r}")
    rope = values.get("rope_parameters") or {}
    if not isinstance(rope, Mapping):
        raise ValueError(f"base: rope_parameters must be an object, got {rope!r:.100}")
    kind = rope.get("rope_type", rope.get("type", "default"))
    for key, only, got in (
        ("hidden_act", "silu", values.get("hidden_act", "silu")),
        ("use_sliding_window", False, values.get("use_sliding_window") or False),
        ("rope_scaling", None, values.get("rope_scaling")),
        ("rope_parameters.rope_type", "default", kind),
    ):
        if got != only:
            raise ValueError(f"base: {key} must be {only!r}, got {got!r}")
    missing = [k for k in (*_SHARED[:4], "num_hidden_layers") if values.get(k) is None]
    if missing:
        raise ValueError(f"base: config.json must have {', '.join(missing)}")
    known = _DEFAULTS | {key: values[key] for key in _SHARED if values.get(key) is not None}
    if "rope_theta" in rope:
        known["rope_theta"] = rope["rope_theta"]
    known.setdefault("num_key_value_heads", values["num_attention_heads"])
    known["tie_word_embeddings"] = values.get("tie_word_embeddings", _DEFAULTS["tie_word_embeddings"])
    return JetNemotronConfig(
        **known,
        layer_types=["attn"] * layer_count(values["num_hidden_layers"]),
        efficient_attention_config={},
        torch_dtype=values.get("torch_dtype") or values.get("dtype") or "float32",
    )
