"""GGUF files of Llama, Qwen2 and Qwen3 as stored models: keys become those of a config.json, tensors become weights.

Source: the GGUF specification in ggml, and the names and layouts of llama.cpp's converter.
"""

from __future__ import annotations

import errno
import re
import struct
from collections.abc import Mapping
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from jetkernels._optional import optional
from jetkernels.modules import checks

from .architectures import DEFAULTS
from .gguf_tokenizer import tokenizer_files
from .rotary import RotaryScaling
from .stored import FLOATING, StoredModel, short

SUFFIX = ".gguf"
# Keys behind the architecture's name -> keys of config.json.
_CONFIG = {
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "block_count": "num_hidden_layers",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "rope.freq_base": "rope_theta",
}
_NEEDED = ("embedding_length", "block_count", "feed_forward_length", "attention.head_count")
# Keys that say again what others say, or that nothing is unusual; and what they must be. None: the width of a head.
_ONLY: dict[str, object] = {
    "attention.value_length": None,
    "rope.dimension_count": None,
    "rope.scaling.type": "none",
    "attention.causal": True,
    "expert_count": 0,
    "expert_used_count": 0,
}
_TOKENS = {"bos_token_id": "bos_token_id", "eos_token_id": "eos_token_id", "padding_token_id": "pad_token_id"}
_TENSORS = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
}
_LAYER_TENSORS = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_FREQUENCY_FACTORS = "rope_freqs.weight"
# Of Llama 3.1, 3.2 and 3.3. A file has the factor of each frequency, not the numbers that they come from.
_LOW, _HIGH, _ORIGINAL = 1.0, 4.0, 8192


def is_gguf(path: str | Path) -> bool:
    """Whether a path names a GGUF file; whether there is one is not asked."""
    return Path(path).suffix.lower() == SUFFIX and not Path(path).is_dir()


class GgufFile(StoredModel):
    """A GGUF file of a Llama, a Qwen2 or a Qwen3. Tensors become fp32, one when it is asked for; fp64 stays.

    Raises:
        OSError: the file cannot be opened, or is a pipe or a device.
        ValueError: it is damaged, or of another architecture, or says something of the model that is not understood.
        ModuleNotFoundError: the package gguf is not installed.
    """

    def __init__(self, path: str | Path):
        path = Path(path)
        super().__init__(path, path)
        self._gguf = optional("gguf", "gguf", "reading GGUF files")
        if path.exists() and not path.is_file():  # a pipe would make the reader wait
            raise OSError(errno.EINVAL, "must be a file, it is a pipe or a device", str(path))
        with open(path, "rb") as file:
            if file.read(4) != b"GGUF":
                raise ValueError(f"gguf: {path} is not a GGUF file")
        try:
            reader = self._gguf.GGUFReader(path)
            self._fields = {name: field.contents() for name, field in reader.fields.items()}
        except (ValueError, LookupError, TypeError, OverflowError, MemoryError, AttributeError) as error:
            raise ValueError(f"gguf: {path} is not a whole GGUF file: {short(error)}") from None
        self._tensors = {tensor.name: tensor for tensor in reader.tensors}
        self.architecture = self._fields.get("general.architecture")
        if not isinstance(self.architecture, str) or self.architecture not in DEFAULTS:
            raise ValueError(
                f"gguf: general.architecture must be one of {', '.join(DEFAULTS)}, "
                f"got {checks.shown(self.architecture)} ({path})"
            )
        if self._fields.get("split.count", 1) not in (0, 1):
            raise ValueError(f"gguf: {path} is one of {self._fields['split.count']} parts of a model; join them first")
        names: dict[str, str] = {}
        for name in self._tensors:
            if name == _FREQUENCY_FACTORS:
                continue
            if (other := names.setdefault(_our_name(name), name)) != name:
                raise ValueError(f"gguf: {path} must have {_our_name(name)} once, got {other} and {name}")
        self.holders = names
        try:
            self.values = self._config()
        except ValueError as error:
            raise ValueError(f"{error} ({path})") from None

    @cached_property
    def companions(self) -> Mapping[str, bytes]:  # type: ignore[override]  # made when they are asked for
        """The tokenizer's files and the chat template; none where the file has no tokenizer."""
        try:
            return tokenizer_files(self._fields)
        except ValueError as error:
            raise ValueError(f"{error} ({self.path})") from None

    def facts(self, name: str) -> tuple[list[int], str]:
        """See `StoredModel.facts`."""
        tensor = self._tensors[self.holders[name]]
        return [int(size) for size in reversed(tensor.shape)], _kind(tensor.tensor_type)

    def stored(self, name: str) -> Tensor:
        """See `StoredModel.stored`; fp32, or fp64 where that is stored."""
        tensor = torch.from_numpy(self._numbers(self._tensors[self.holders[name]]))
        if self.architecture == "llama":
            for projection, heads in (("q_proj", "num_attention_heads"), ("k_proj", "num_key_value_heads")):
                if f".{projection}." in name:
                    return _unpermuted(tensor, self.values[heads])
        return tensor

    def _numbers(self, tensor: Any) -> Any:
        wide = _kind(tensor.tensor_type) == "F64"
        numbers = tensor.data if wide else self._gguf.dequantize(tensor.data, tensor.tensor_type)
        return numbers if numbers.flags.writeable else numbers.copy()

    def _config(self) -> dict[str, Any]:
        """What the keys say, by the names of a published config.json of the architecture."""
        prefix = f"{self.architecture}."
        given = {name.removeprefix(prefix): v for name, v in self._fields.items() if name.startswith(prefix)}
        if missing := [f"{prefix}{name}" for name in _NEEDED if name not in given]:
            raise ValueError(f"gguf: the file must have {', '.join(missing)}")
        embedding = self._tensors.get("token_embd.weight")
        if embedding is None:
            raise ValueError("gguf: the file must have the tensor token_embd.weight")
        values = {key: given[name] for name, key in _CONFIG.items() if name in given}
        for key in ("rms_norm_eps", "rope_theta"):
            if isinstance(values.get(key), float):
                values[key] = _shortest(values[key])
        values |= {key: self._fields.get(f"tokenizer.ggml.{name}") for name, key in _TOKENS.items()}
        heads = checks.count(f"gguf: {prefix}attention.head_count", values["num_attention_heads"])
        values.setdefault("num_key_value_heads", heads)
        values.setdefault("head_dim", checks.count(f"gguf: {prefix}embedding_length", values["hidden_size"]) // heads)
        values |= {
            "model_type": self.architecture,
            "vocab_size": int(embedding.shape[-1]),
            "tie_word_embeddings": "output.weight" not in self._tensors,
            "torch_dtype": "float32",
        }
        for name in sorted(given.keys() - _CONFIG.keys() - {"vocab_size"}):
            only = values["head_dim"] if _ONLY.get(name, 0) is None else _ONLY.get(name)
            if name not in _ONLY or not checks.same(given[name], only):
                wanted = f"must be {only!r}" if name in _ONLY else "is not understood"
                raise ValueError(f"gguf: {prefix}{name} {wanted}, got {checks.shown(given[name])}")
        if _FREQUENCY_FACTORS in self._tensors:
            values["rope_scaling"] = self._scaling(values)
        return values

    def _scaling(self, values: Mapping) -> dict[str, object] | None:
        """Llama 3's scaling, known by the factors that the frequencies are divided by."""
        stored = self._tensors[_FREQUENCY_FACTORS]
        if _kind(stored.tensor_type) not in FLOATING:
            raise ValueError(f"gguf: {_FREQUENCY_FACTORS} must be floating numbers, got {stored.tensor_type.name}")
        factors = torch.from_numpy(self._numbers(stored)).float()
        if bool((factors == 1).all()):
            return None
        half = values["head_dim"] // 2
        kind = values["model_type"]
        theta = checks.number(f"gguf: {kind}.rope.freq_base", values.get("rope_theta", DEFAULTS[kind]["rope_theta"]))
        plain = theta ** -(torch.arange(half, dtype=torch.float64) / half)
        scaling = RotaryScaling(float(factors.max()), _LOW, _HIGH, _ORIGINAL)
        need = (plain / scaling.scale(plain)).float()
        if factors.shape != need.shape or not torch.allclose(factors, need, rtol=1e-4, atol=0):
            raise ValueError(
                f"gguf: {_FREQUENCY_FACTORS} must be the factors of Llama 3.1 to 3.3 (rope_type llama3, "
                f"low_freq_factor {_LOW:g}, high_freq_factor {_HIGH:g}, {_ORIGINAL} original positions), got others"
            )
        return scaling.to_dict()


@cache
def _kind(quantization: Any) -> str:
    """The kind of the numbers that a type of tensor becomes; the type's name where the package gguf knows none."""
    gguf = optional("gguf", "gguf", "reading GGUF files")
    block = torch.zeros(gguf.GGML_QUANT_SIZES[quantization][1], dtype=torch.uint8)
    try:
        gguf.dequantize(block.numpy(), quantization)
    except NotImplementedError:
        return quantization.name
    return "F32"


def _shortest(value: float) -> float:
    """The number of the fewest digits that is `value` in fp32: what was 1e-05 is 1e-05 again."""
    rounded = (float(f"{value:.{digits}g}") for digits in range(1, 10))
    return next((number for number in rounded if struct.pack("f", number) == struct.pack("f", value)), value)


def _our_name(name: str) -> str:
    """The name of a tensor as the model has it; as it is where it is no tensor of such a model."""
    found = re.fullmatch(r"(?:blk\.(\d+)\.)?(\w+)\.(weight|bias)", name, re.ASCII)
    if found is None:
        return name
    layer, part, kind = found.groups()
    if layer is None:
        return f"{_TENSORS[part]}.{kind}" if part in _TENSORS else name
    return f"model.layers.{layer}.{_LAYER_TENSORS[part]}.{kind}" if part in _LAYER_TENSORS else name


def _unpermuted(rows: Tensor, heads: int) -> Tensor:
    """Rows of q or k of a Llama, or a bias, in the order of dimensions that the model here has.

    In a GGUF file dimensions 2i and 2i + 1 of a head turn as a pair, here i and i + head_dim/2.
    """
    return rows.unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2).contiguous()
