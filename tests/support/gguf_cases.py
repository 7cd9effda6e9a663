"""Tiny GGUF files, written by the package gguf from models of transformers as llama.cpp's converter would."""

import json
from pathlib import Path

import numpy as np
import pytest
import tokenizers
import torch
import transformers
from support.model_cases import stir_
from support.paths import ROOT
from support.stories import stories
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

gguf = pytest.importorskip("gguf", reason="needs the package gguf, of requirements.txt")
transformers.utils.logging.disable_progress_bar()

VOCAB = 80
SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.15,
    "rms_norm_eps": 1e-5,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 3,
}
# transformers takes every Qwen3 in a GGUF file to have heads of 128.
HEADS = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 128}
ARCHITECTURES: dict[str, dict] = {"llama": {}, "qwen2": {}, "qwen3": HEADS}
LLAMA32 = {
    "rope_type": "llama3",
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def drawn(architecture: str, theta: float = 50000.0, **changes):
    """A model of transformers of an architecture, with random weights."""
    kind = type(transformers.AutoConfig.for_model(architecture))
    rotary = {"rope_theta": theta, **changes.pop("scaling", {"rope_type": "default"})}
    sizes = SIZES | ARCHITECTURES[architecture] | {"tie_word_embeddings": True} | changes
    config = kind(**sizes, rope_parameters=rotary)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return stir_(transformers.AutoModelForCausalLM.from_config(config).float()).eval()


def permuted(rows: np.ndarray, heads: int) -> np.ndarray:
    """Rows of q and k as the converter writes them: the dimensions of a pair beside each other."""
    halves = rows.reshape(heads, 2, rows.shape[0] // heads // 2, *rows.shape[1:])
    return np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(rows.shape)


def factors(config) -> np.ndarray:
    """What a converter divides Llama 3's frequencies by."""
    scaled = transformers.models.llama.modeling_llama.LlamaRotaryEmbedding(config).inv_freq.double()
    half = config.head_dim // 2
    plain = config.rope_parameters["rope_theta"] ** -(torch.arange(half, dtype=torch.float64) / half)
    return (plain / scaled).float().numpy()


def fields_of(model) -> dict[str, object]:
    """The keys that describe a model, without its architecture in front."""
    config = model.config
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    fields = {
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "block_count": config.num_hidden_layers,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
        "rope.freq_base": float(config.rope_parameters["rope_theta"]),
        "vocab_size": config.vocab_size,
    }
    if head * config.num_attention_heads != config.hidden_size:
        fields |= {"attention.key_length": head, "attention.value_length": head}
    return fields | ({"rope.dimension_count": head} if config.model_type == "llama" else {})


def tokenizer_fields(**changes) -> dict[str, object]:
    """Those of a byte-level tokenizer that knows two letters, which is enough for a file to be read."""
    tokens = ["t", "0", *(f"t{i}" for i in range(VOCAB - 3)), "<|endoftext|>"]
    kinds = [1] * (VOCAB - 1) + [3]
    ids = {"bos_token_id": 1, "eos_token_id": 2, "padding_token_id": 3}
    return {"model": "gpt2", "pre": "gpt-2", "tokens": tokens, "token_type": kinds, "merges": ["t 0"], **ids} | changes


def _add(writer, key: str, value: object) -> None:
    add = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
    add.get(type(value), writer.add_array)(key, value)


def write_gguf(path: Path, model, kind: str = "F32", tokenizer: dict | None = None, fields=(), tensors=()) -> Path:
    """Writes a model of transformers.

    Args:
        path: of the file.
        model: a Llama, a Qwen2 or a Qwen3.
        kind: of the matrices, a name of gguf.GGMLQuantizationType.
        tokenizer: keys of the tokenizer, without `tokenizer.ggml.`.
        fields: keys of the architecture that are added or replaced; a value of None takes one out.
        tensors: the same of whole tensors, by their names in the file.
    """
    architecture, config = model.config.model_type, model.config
    writer = gguf.GGUFWriter(path, architecture)
    for key, value in (fields_of(model) | dict(fields)).items():
        if value is not None:
            _add(writer, f"{architecture}.{key}", value)
    for key, value in (tokenizer_fields() if tokenizer is None else tokenizer).items():
        _add(writer, "tokenizer.chat_template" if key == "chat_template" else f"tokenizer.ggml.{key}", value)
    arch = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    names = gguf.get_tensor_name_map(arch, config.num_hidden_layers)
    found = {}
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        rows, (stem, _, suffix) = tensor.numpy(), name.rpartition(".")
        if architecture == "llama" and "q_proj" in name:
            rows = permuted(rows, config.num_attention_heads)
        if architecture == "llama" and "k_proj" in name:
            rows = permuted(rows, config.num_key_value_heads)
        found[f"{names.get_name(stem)}.{suffix}"] = rows
    if config.rope_parameters["rope_type"] == "llama3":
        found["rope_freqs.weight"] = factors(config)
    for name, rows in (found | dict(tensors)).items():
        if rows is None:
            continue
        of = gguf.GGMLQuantizationType[kind if rows.ndim > 1 and rows.dtype == np.float32 else "F32"]
        data = gguf.quantize(rows, of) if rows.dtype == np.float32 else rows
        of = gguf.GGMLQuantizationType.Q8_0 if rows.dtype == np.uint8 else of  # quantised already
        writer.add_tensor(name, data, raw_dtype=of if rows.dtype in (np.float32, np.uint8) else None)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


# ---- tokenizers

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2 = LLAMA3.replace("{1,3}", "")


def split(pattern):
    piece = pre_tokenizers.Split(tokenizers.Regex(pattern), behavior="isolated")
    return pre_tokenizers.Sequence([piece, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


# As the published tokenizer.json files of GPT-2, SmolLM2, Llama 3 and Qwen2.5 have it.
PUBLISHED_CUTS = {
    "gpt-2": lambda: pre_tokenizers.ByteLevel(add_prefix_space=False),
    "smollm": lambda: pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    ),
    "llama-bpe": lambda: split(LLAMA3),
    "qwen2": lambda: split(QWEN2),
}


def documents() -> list[str]:
    """Texts of some length."""
    return [path.read_text(encoding="utf-8") for path in sorted((ROOT / "docs").glob("*.md"))[:6]]


def trained_tokenizer(cut: str):
    """A byte-level tokenizer with a small vocabulary; its special tokens come first, as SmolLM2's do."""
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = PUBLISHED_CUTS[cut]()
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=700, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator([stories(200_000), *documents()], trainer)
    if cut == "qwen2":
        backend.normalizer = normalizers.NFC()
    return backend


def fields_of_tokenizer(backend, cut: str, **changes) -> dict:
    """Its keys in a GGUF file, without `tokenizer.ggml.`."""
    model = json.loads(backend.to_str())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].get)
    kinds = [3 if token in SPECIAL else 1 for token in tokens]
    merges = [" ".join(merge) for merge in model["merges"]]
    ids = {"bos_token_id": 1, "eos_token_id": 2, "unknown_token_id": 0, "padding_token_id": 2}
    fields = {"model": "gpt2", "pre": cut, "tokens": tokens, "token_type": kinds, "merges": merges, **ids}
    return fields | {"add_bos_token": False} | changes
