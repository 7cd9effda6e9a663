"""Published models with full attention in every layer, Llama, Qwen2 and Qwen3: their config.json as one of ours.

Their weights have the names that this library gives them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jetkernels.modules import checks

from .config import JetNemotronConfig, layer_count, refuse_other_models, stored_dtype
from .rotary import rotary_fields

# Keys that name the same thing here. The first four must be there.
_SHARED = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "rms_norm_eps",
    "rope_theta",
    "rope_scaling",
    "initializer_range",
    "max_position_embeddings",
    "tie_word_embeddings",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
)
_ALL: dict[str, Any] = {
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "initializer_range": 0.02,
    "tie_word_embeddings": False,
    "bos_token_id": None,
    "eos_token_id": None,
}
# model_type -> what it means by a key that its config.json does not have.
DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": _ALL | {"max_position_embeddings": 2048, "bos_token_id": 1, "eos_token_id": 2},
    "qwen2": _ALL | {"max_position_embeddings": 32768},
    "qwen3": _ALL | {"max_position_embeddings": 32768, "head_dim": 128},
}
# model_type -> what is so in all of its models.
_FIXED: dict[str, dict[str, bool]] = {
    "llama": {"attention_bias": False},
    "qwen2": {},
    "qwen3": {"attention_bias": False, "use_qk_norm": True},
}


def published_config(values: Mapping) -> JetNemotronConfig:
    """The content of a published config.json of DEFAULTS' model types -> the same model here.

    Raises:
        ValueError: the model is another one: another model_type, biases that attention here does not have, sliding
            windows in use, rotary positions scaled in another way than Llama 3's, another activation; or a key is
            missing, or two do not agree.

    Source: the published config.json files and the configs of transformers.
    """
    kind = values.get("model_type")
    if not isinstance(kind, str) or kind not in DEFAULTS:
        raise ValueError(f"base: model_type must be one of {', '.join(DEFAULTS)}, got {checks.shown(kind)}")
    given = {key: value for key, value in values.items() if value is not None or key.endswith("_token_id")}
    refuse_other_models(given)
    if "attention_bias" in _FIXED[kind] and not checks.same(bias := given.get("attention_bias", False), False):
        raise ValueError(
            f"base: attention_bias must be False, got {checks.shown(bias)}: in {kind} it is one of the output "
            "projection too, which has none here"
        )
    layers = given.get("layer_types")
    if layers is not None and (not isinstance(layers, list) or any(each != "full_attention" for each in layers)):
        raise ValueError(f"base: layer_types must all be full_attention, got {checks.shown(layers)}")
    if missing := [key for key in (*_SHARED[:4], "num_hidden_layers") if key not in given]:
        raise ValueError(f"base: config.json must have {', '.join(missing)}")
    given |= rotary_fields(given)
    known = DEFAULTS[kind] | {key: given[key] for key in _SHARED if key in given} | _FIXED[kind]
    known.setdefault("num_key_value_heads", given["num_attention_heads"])
    return JetNemotronConfig(
        **known,
        layer_types=["attn"] * layer_count(given["num_hidden_layers"]),
        efficient_attention_config={},
        torch_dtype=stored_dtype(given) or "float32",
    )
