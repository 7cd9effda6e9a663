"""The model configuration: the published config.json, read and written as it is."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from functools import cached_property
from importlib import resources
from pathlib import Path

import torch

from jetkernels.modules import JetBlockConfig

LAYER_TYPES = ("jet", "attn", "swa")
CONFIG_FILE = "config.json"

# Published keys with the only value that this model computes; another value means another model.
_ONLY_VALUE = {"hidden_act": "silu", "rope_scaling": None, "use_mrope": False, "attention_dropout": 0.0}


@dataclass(eq=True)
class JetNemotronConfig:
    """Sizes of a hybrid model, field names as in the published config.json.

    layer_types: one of "jet", "attn", "swa" per layer.  efficient_attention_config: {"jet": sizes of JetBlock,
    "swa": {"window_size": tokens, the current one included}}, kept as written; `jet` and `window_size` are its parsed
    form.  torch_dtype: name of the dtype the weights are stored in.  extra: keys that mean nothing here; saved again.
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
    initializer_range: float = 0.02
    max_position_embeddings: int = 32768
    tie_word_embeddings: bool = True
    bos_token_id: int | None = 151643
    eos_token_id: int | list[int] | None = 151643
    pad_token_id: int | None = None
    torch_dtype: str = "float32"
    extra: dict = field(default_factory=dict)

    def __post_init__(self):
        for name in ("vocab_size", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads"):
            self._require_count(name)
        if self.head_dim is None:
            self._require_multiple("hidden_size", self.hidden_size, "num_attention_heads", self.num_attention_heads)
            self.head_dim = self.hidden_size // self.num_attention_heads
        self._require_count("head_dim")
        self.rms_norm_eps = float(self.rms_norm_eps)
        self.rope_theta = float(self.rope_theta)
        self.layer_types = list(self.layer_types)
        self._check()

    def _require_count(self, name: str) -> None:
        value = getattr(self, name)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"config: {name} must be a positive integer, got {value!r}")

    @staticmethod
    def _require_multiple(name: str, value: int, of: str, unit: int) -> None:
        if value % unit:
            raise ValueError(f"config: {name} must be a multiple of {of} = {unit}, got {value}")

    def _check(self) -> None:
        for i, kind in enumerate(self.layer_types):
            if kind not in LAYER_TYPES:
                raise ValueError(f"config: layer_types[{i}] must be one of {', '.join(LAYER_TYPES)}, got {kind!r}")
        self._require_multiple(
            "num_attention_heads", self.num_attention_heads, "num_key_value_heads", self.num_key_value_heads
        )
        if self.head_dim % 2:
            raise ValueError(f"config: head_dim must be even (rotary embedding), got {self.head_dim}")
        if not isinstance(getattr(torch, self.torch_dtype, None), torch.dtype):
            raise ValueError(f"config: torch_dtype must name a dtype, got {self.torch_dtype!r}")
        if "jet" in self.layer_types:
            self.jet  # noqa: B018  (parses, and so checks, the sizes)
        if "swa" in self.layer_types:
            self.window_size  # noqa: B018

    @property
    def num_hidden_layers(self) -> int:
        return len(self.layer_types)

    @property
    def dtype(self) -> torch.dtype:
        return getattr(torch, self.torch_dtype)

    def _section(self, name: str) -> Mapping:
        section = self.efficient_attention_config.get(name)
        if not isinstance(section, Mapping):
            raise ValueError(f"config: efficient_attention_config.{name} is needed by a {name} layer, got {section!r}")
        return section

    @cached_property
    def jet(self) -> JetBlockConfig:
        """Sizes of the JetBlock layers."""
        return JetBlockConfig.from_dict(self._section("jet"))

    @cached_property
    def window_size(self) -> int:
        """Tokens that a sliding-window layer sees, the current one included."""
        window = self._section("swa").get("window_size")
        if not isinstance(window, int) or window < 1:
            raise ValueError(
                f"config: efficient_attention_config.swa.window_size must be a positive integer, got {window!r}"
            )
        return window

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
        values = dict(values)
        model_type = values.pop("model_type", "jet_nemotron")
        if model_type != "jet_nemotron":
            raise ValueError(f"config: model_type must be jet_nemotron, got {model_type!r}")
        for key, only in _ONLY_VALUE.items():
            if values.get(key, only) != only:
                raise ValueError(f"config: {key} must be {only!r}, got {values[key]!r}")
        if "dtype" in values:
            values.setdefault("torch_dtype", values.pop("dtype"))
        layers = values.pop("num_hidden_layers", None)
        names = {f.name for f in fields(cls)} - {"extra"}
        missing = [f.name for f in fields(cls) if f.name not in values and f.name in _REQUIRED]
        if missing:
            raise ValueError(f"config: missing {', '.join(missing)}")
        if layers is not None and layers != len(values["layer_types"]):
            raise ValueError(
                f"config: layer_types must have num_hidden_layers = {layers} entries, got {len(values['layer_types'])}"
            )
        known = {key: values.pop(key) for key in list(values) if key in names}
        if known.get("torch_dtype", "") is None:
            del known["torch_dtype"]
        return cls(**known, extra=values)

    def to_dict(self) -> dict:
        """The content of config.json, published keys, sorted."""
        values = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in ("extra", "head_dim", "pad_token_id")}
        if self.head_dim * self.num_attention_heads != self.hidden_size:
            values["head_dim"] = self.head_dim
        if self.pad_token_id is not None:
            values["pad_token_id"] = self.pad_token_id
        values["model_type"] = "jet_nemotron"
        values["num_hidden_layers"] = self.num_hidden_layers
        defaults = {"architectures": ["JetNemotronForCausalLM"], **_ONLY_VALUE}
        return dict(sorted((defaults | self.extra | values).items()))

    @classmethod
    def from_file(cls, path: str | Path) -> JetNemotronConfig:
        """Reads a config.json, or the one in a folder."""
        path = Path(path)
        path = path / CONFIG_FILE if path.is_dir() else path
        if not path.is_file():
            raise FileNotFoundError(f"config: no file {path}")
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"config: {path} is not JSON: {error}") from None
        if not isinstance(values, dict):
            raise ValueError(f"config: {path} must hold a JSON object, got {type(values).__name__}")
        return cls.from_dict(values)

    @classmethod
    def from_name(cls, name: str) -> JetNemotronConfig:
        """One of the configurations that ship with the package: "2b" or "4b"."""
        folder = resources.files(__package__) / "configs"
        file = folder / f"{name}.json"
        if not file.is_file():
            names = sorted(entry.name.removesuffix(".json") for entry in folder.iterdir() if entry.name.endswith(".json"))
            raise ValueError(f"config: name must be one of {', '.join(names)}, got {name!r}")
        return cls.from_dict(json.loads(file.read_text(encoding="utf-8")))

    def save(self, path: str | Path) -> None:
        Path(path).write_text(json.dumps(self.to_dict(), indent=2) + "\n", encoding="utf-8")


_REQUIRED = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "layer_types",
    "num_attention_heads",
    "num_key_value_heads",
    "efficient_attention_config",
)
