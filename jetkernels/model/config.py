"""The model configuration: the published config.json, read and written as it is."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from functools import cached_property
from importlib import resources
from pathlib import Path
from typing import Any

import torch

from jetkernels.files import write_atomic
from jetkernels.modules import JetBlockConfig, checks
from jetkernels.reading import parse_json

from .mixers import MIXERS
from .rotary import RotaryScaling, rotary_fields, scaling_of

CONFIG_FILE = "config.json"

MAX_LAYERS = 4096
_ARCHITECTURES = ["JetNemotronForCausalLM"]
DTYPES = ("float64", "float32", "bfloat16", "float16")

# Published keys, and keys of related configs, with the only value that this model computes; another value means another
# model.
_PUBLISHED = {"hidden_act": "silu", "use_mrope": False, "attention_dropout": 0.0}
_ONLY_VALUE = _PUBLISHED | {
    "attn_logit_softcapping": None,
    "final_logit_softcapping": None,
    "mlp_bias": False,
    "partial_rotary_factor": 1.0,
    "quantization_config": None,
    "use_sliding_window": False,  # windows are those of swa layers, of efficient_attention_config.swa
}
# Either names the dtype of the weights, the former since version 5 of transformers.
_DTYPES = ("dtype", "torch_dtype")
# Keys that the published files do not have, with what they mean by that; with that value they are not written.
UNPUBLISHED = {"attention_bias": True, "use_qk_norm": False}


@dataclass(eq=True)
class JetNemotronConfig:
    """Sizes of a hybrid model, field names as in the published config.json.

    Attributes:
        vocab_size: token ids are below it.
        hidden_size: C.
        intermediate_size: width of the MLPs.
        layer_types: the kind of each layer, a key of `mixers.MIXERS`.
        num_attention_heads: query heads of an attention layer.
        num_key_value_heads: key and value heads, which divide them.
        efficient_attention_config: a section for each kind that needs one, {"jet": sizes of JetBlock, "swa":
            {"window_size": tokens, the current one included}}, kept as written; `jet` and `window_size` are its parsed
            form.
        head_dim: of an attention layer; hidden_size / num_attention_heads if None.
        rms_norm_eps: added to the mean square in the norms.
        rope_theta: base of the rotary frequencies.
        rope_scaling: how they are scaled, Llama 3's way alone, as `RotaryScaling.to_dict` has it; None: they are not.
        attention_bias: whether q, k and v of attention layers have biases; their output projection has none.
        use_qk_norm: whether each head of q and k of attention layers is normed before it is rotated.
        initializer_range: standard deviation of new weights.
        max_position_embeddings: tokens of the longest text that the model is made for.
        tie_word_embeddings: whether the head has the embedding's weight.
        bos_token_id: begins a text.
        eos_token_id: ends a text; one id or several.
        pad_token_id: fills rows behind their end.
        torch_dtype: name of the dtype that the weights are stored in.
        extra: keys that mean nothing here; saved again.

    Raises:
        ValueError: a value is not one that this model can have.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    layer_types: list[str]
    num_attention_heads: int
    num_key_value_heads: int
    efficient_attention_config: dict
    head_dim: int | None = None
    rms_norm_eps: float = 1e-6
    rope_theta: float = 1e6
    rope_scaling: dict | None = None
    attention_bias: bool = True
    use_qk_norm: bool = False
    initializer_range: float = 0.02
    max_position_embeddings: int = 32768
    tie_word_embeddings: bool = True
    bos_token_id: int | None = 151643
    eos_token_id: int | list[int] | None = 151643
    pad_token_id: int | None = None
    torch_dtype: str = "float32"
    extra: dict = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in (
            "vocab_size",
            "hidden_size",
            "intermediate_size",
            "num_attention_heads",
            "num_key_value_heads",
            "max_position_embeddings",
        ):
            self._require_count(name)
        if self.head_dim is None:
            self._require_multiple("hidden_size", self.hidden_size, "num_attention_heads", self.num_attention_heads)
            self.head_dim = self.hidden_size // self.num_attention_heads
        self._require_count("head_dim")
        checks.below_limit("config: num_attention_heads * head_dim", self.num_attention_heads * self.head_dim)
        if self.head_dim % 2:
            raise ValueError(f"config: head_dim must be even (rotary embedding), got {self.head_dim}")
        self._require_multiple(
            "num_attention_heads", self.num_attention_heads, "num_key_value_heads", self.num_key_value_heads
        )
        self._require_number("rms_norm_eps", 0.0, 1.0, text=True)
        self._require_number("rope_theta", 1.0, float("inf"))
        self._require_number("initializer_range", 0.0, 100.0)
        self._check_layers()
        self._check_choices()

    def _require_count(self, name: str) -> None:
        setattr(self, name, checks.count(f"config: {name}", getattr(self, name)))

    def _require_number(self, name: str, least: float, most: float, text: bool = False) -> None:
        value = checks.number(f"config: {name}", getattr(self, name), text=text)
        if not least <= value <= most:
            raise ValueError(f"config: {name} must be at least {least:g} and at most {most:g}, got {value:g}")
        setattr(self, name, value)

    @staticmethod
    def _require_multiple(name: str, value: int, of: str, unit: int) -> None:
        if value % unit:
            raise ValueError(f"config: {name} must be a multiple of {of} = {unit}, got {value}")

    def _check_layers(self) -> None:
        if not isinstance(self.layer_types, (list, tuple)):
            raise ValueError(
                f"config: layer_types must be a list of {', '.join(MIXERS)}, got {checks.shown(self.layer_types)}"
            )
        layer_count(len(self.layer_types), "layer_types must have")
        for i, kind in enumerate(self.layer_types):
            if not isinstance(kind, str) or kind not in MIXERS:
                raise ValueError(
                    f"config: layer_types[{i}] must be one of {', '.join(MIXERS)}, got {checks.shown(kind)}"
                )
        self.layer_types = list(self.layer_types)
        if not isinstance(self.efficient_attention_config, Mapping):
            raise ValueError(
                "config: efficient_attention_config must be a mapping with jet and swa, "
                f"got {checks.shown(self.efficient_attention_config)}"
            )
        for kind, mixer in MIXERS.items():
            if kind in self.layer_types:
                mixer.sizes(self)  # reads, and so checks, what the config says of the kind

    def _check_choices(self) -> None:
        for name in ("attention_bias", "use_qk_norm", "tie_word_embeddings"):
            if not isinstance(value := getattr(self, name), bool):
                raise ValueError(f"config: {name} must be true or false, got {checks.shown(value)}")
        rotary = rotary_fields({"rope_theta": self.rope_theta, "rope_scaling": self.rope_scaling})
        self.rope_scaling = rotary["rope_scaling"]  # type: ignore[assignment]  # a dict or None
        _ = self.rotary_scaling  # kept from here on: torch.compile does not enter the lock of a cached property
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            value = getattr(self, name)
            for token in value if name == "eos_token_id" and isinstance(value, (list, tuple)) else [value]:
                if not (token is None and token is value) and (type(token) is not int or not 0 <= token < 1 << 63):
                    raise ValueError(
                        f"config: {name} must be None or a token id (an integer from 0), got {checks.shown(value)}"
                    )
        if isinstance(self.torch_dtype, (str, torch.dtype)):
            self.torch_dtype = str(self.torch_dtype).removeprefix("torch.")
        if not isinstance(self.torch_dtype, str) or self.torch_dtype not in DTYPES:
            raise ValueError(
                f"config: torch_dtype must name a dtype, got {checks.shown(self.torch_dtype)}; "
                f"one of {', '.join(DTYPES)}"
            )
        if not isinstance(self.extra, Mapping) or not all(isinstance(key, str) for key in self.extra):
            raise ValueError(f"config: extra must be a mapping of names, got {checks.shown(self.extra)}")

    @property
    def num_hidden_layers(self) -> int:
        """Layers of the model."""
        return len(self.layer_types)

    @property
    def dtype(self) -> torch.dtype:
        """The one that `torch_dtype` names."""
        return getattr(torch, self.torch_dtype)

    @property
    def head_size(self) -> int:
        """`head_dim` as it is once the config has been checked."""
        assert self.head_dim is not None
        return self.head_dim

    @cached_property
    def rotary_scaling(self) -> RotaryScaling | None:
        """`rope_scaling`, parsed."""
        return scaling_of(self.rope_scaling)

    def section(self, name: str) -> Mapping:
        """What `efficient_attention_config` says of a kind of layer.

        Raises:
            ValueError: there is no such section.
        """
        section = self.efficient_attention_config.get(name)
        if not isinstance(section, Mapping):
            raise ValueError(
                f"config: efficient_attention_config.{name} is needed by a {name} layer, got {checks.shown(section)}"
            )
        return section

    @cached_property
    def jet(self) -> JetBlockConfig:
        """Sizes of the JetBlock layers."""
        return JetBlockConfig.from_dict(self.section("jet"))

    @cached_property
    def window_size(self) -> int:
        """Tokens that a sliding-window layer sees, the current one included."""
        window = self.section("swa").get("window_size")
        return checks.count("config: efficient_attention_config.swa.window_size", window)

    @property
    def stop_token_ids(self) -> list[int]:
        """Tokens that end a text."""
        eos = self.eos_token_id
        return [] if eos is None else [eos] if isinstance(eos, int) else list(eos)

    @property
    def padding_token_id(self) -> int:
        """The token that fills rows after their end: pad, else the first stop token, else 0."""
        if self.pad_token_id is not None:
            return self.pad_token_id
        return (self.stop_token_ids or [0])[0]

    @classmethod
    def from_dict(cls, values: Mapping) -> JetNemotronConfig:
        """Reads the parsed content of a published config.json. Keys that mean nothing here are kept in `extra`."""
        if not isinstance(values, Mapping) or not all(isinstance(key, str) for key in values):
            raise ValueError(f"config: must be a mapping of names, got {checks.shown(values)}")
        values = dict(values)
        model_type = values.pop("model_type", "jet_nemotron")
        if model_type != "jet_nemotron":
            raise ValueError(f"config: model_type must be jet_nemotron, got {checks.shown(model_type)}")
        refuse_other_models(values)
        values |= rotary_fields(values)
        # Read by now, or written again by `to_dict` with the one value there is.
        for key in (*_PUBLISHED, "rope_parameters"):
            values.pop(key, None)
        if values.get("architectures") == _ARCHITECTURES:
            del values["architectures"]
        dtype = stored_dtype(values)
        for key in _DTYPES:
            values.pop(key, None)
        layers = values.pop("num_hidden_layers", None)
        missing = [name for name in _REQUIRED if name not in values]
        if missing:
            raise ValueError(f"config: missing {', '.join(missing)}")
        names = {f.name for f in fields(cls)} - {"extra"}
        known: dict[str, Any] = {key: values.pop(key) for key in list(values) if key in names}
        if dtype is not None:
            known["torch_dtype"] = dtype
        config = cls(**known, extra=values)
        if layers is not None and layer_count(layers) != config.num_hidden_layers:
            raise ValueError(
                f"config: layer_types must have num_hidden_layers = {layers} entries, got {config.num_hidden_layers}"
            )
        return config

    def to_dict(self) -> dict:
        """The content of config.json, published keys, sorted."""
        values = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in ("extra", "head_dim")}
        for name, meant in (UNPUBLISHED | {"pad_token_id": None}).items():
            if values[name] == meant:
                del values[name]
        if self.head_size * self.num_attention_heads != self.hidden_size:
            values["head_dim"] = self.head_dim
        values["model_type"] = "jet_nemotron"
        values["num_hidden_layers"] = self.num_hidden_layers
        defaults = {"architectures": list(_ARCHITECTURES), **_PUBLISHED}
        return dict(sorted((defaults | self.extra | values).items()))

    @classmethod
    def from_file(cls, path: str | Path) -> JetNemotronConfig:
        """Reads a config.json, or the one in a folder."""
        path = Path(path)
        path = path / CONFIG_FILE if path.is_dir() else path
        if not path.is_file():
            raise FileNotFoundError(f"config: no file {path}")
        return cls.from_dict(parse_json(path.read_bytes(), f"config: {path}"))

    @classmethod
    def from_name(cls, name: str) -> JetNemotronConfig:
        """One of the configurations that ship with the package.

        "2b" and "4b" are the published models; "full-attention" has Qwen3-1.7B's shape, attn layers only, and is what
        they are compared with: q, k and v have biases and q and k no norms, unlike Qwen3's.
        """
        folder = resources.files(__package__) / "configs"
        file = folder / f"{name}.json"
        if not file.is_file():
            names = sorted(
                entry.name.removesuffix(".json") for entry in folder.iterdir() if entry.name.endswith(".json")
            )
            raise ValueError(f"config: name must be one of {', '.join(names)}, got {name!r}")
        return cls.from_dict(json.loads(file.read_text(encoding="utf-8")))

    def save(self, path: str | Path) -> None:
        """Writes a config.json, in one step."""
        write_atomic(path, (json.dumps(self.to_dict(), indent=2) + "\n").encode("utf-8"))


def layer_count(value: object, subject: str = "num_hidden_layers must be") -> int:
    """A number of layers, checked before anything of its length is made."""
    if type(value) is not int or not 1 <= value <= MAX_LAYERS:
        raise ValueError(f"config: {subject} 1 to {MAX_LAYERS}, got {checks.shown(value)}")
    return value


def stored_dtype(values: Mapping) -> str | None:
    """The dtype that a config.json says the weights have; None where it says none.

    Raises:
        ValueError: it says two.
    """
    dtypes = {str(values[key]) for key in _DTYPES if values.get(key) is not None}
    if len(dtypes) > 1:
        raise ValueError(
            f"config: torch_dtype and dtype must agree, got {' and '.join(map(checks.shown, sorted(dtypes)))}"
        )
    return next(iter(dtypes), None)


def refuse_other_models(values: Mapping) -> None:
    """ValueError if a key of a config.json has a value that this model does not compute."""
    for key, only in _ONLY_VALUE.items():
        got = values.get(key, only)
        if not checks.same(got, only):
            raise ValueError(f"config: {key} must be {only!r}, got {checks.shown(got)}")


_REQUIRED = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "layer_types",
    "num_attention_heads",
    "num_key_value_heads",
    "efficient_attention_config",
)
