"""Small hybrid models for the tests, with every parameter away from its neutral initial value."""

from pathlib import Path

import torch

from jetkernels.model import JetNemotronConfig, JetNemotronForCausalLM
from jetkernels.modules import JetBlock, JetBlockConfig

VOCAB = 61
WINDOW = 5
# Two calls that should agree differ by the order of fp32 sums only.
ATOL = 1e-5
JET = {
    "num_heads": 3,
    "head_dim": 8,
    "expand_v": 1.5,
    "conv_size": 4,
    "dconv_generator_reduction": 4,
    "norm_eps": "1e-5",
    "mode": "chunk",
    "dconv_implementation": "triton",
}


def small_config(layer_types=("jet", "swa", "jet", "attn"), **changes) -> JetNemotronConfig:
    values = {
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "intermediate_size": 48,
        "layer_types": list(layer_types),
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "efficient_attention_config": {"jet": dict(JET), "swa": {"window_size": WINDOW}},
        "initializer_range": 0.1,
    }
    return JetNemotronConfig.from_dict(values | changes)


@torch.no_grad()
def stir_(module: torch.nn.Module, std: float = 0.2) -> torch.nn.Module:
    """Adds noise to the parameters that start at zero or one: biases, norms, the kernel generator's output."""
    for name, parameter in module.named_parameters():
        if "norm" in name or name.endswith(("bias", "w2.weight")):
            parameter.add_(torch.randn(parameter.shape).to(parameter) * std)
    return module


def small_model(*layer_types: str, seed: int = 0, dtype=torch.float32, **changes) -> JetNemotronForCausalLM:
    config = small_config(layer_types, **changes) if layer_types else small_config(**changes)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return stir_(JetNemotronForCausalLM(config)).to(dtype)


def small_block(seed: int = 0, dtype=torch.float32, hidden_size: int = 20, **changes) -> JetBlock:
    sizes = {"num_heads": 2, "head_dim": 6, "expand_v": 1.5, "conv_size": 4, "dconv_generator_reduction": 2}
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return stir_(JetBlock(hidden_size, JetBlockConfig(**(sizes | changes)), initializer_range=0.3)).to(dtype)


def tokens(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randint(VOCAB, shape, generator=torch.Generator().manual_seed(seed))


def padded(rows: list[torch.Tensor], left: bool, fill: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of unequal length [t] (or [t, C]) -> a batch and its mask, padded on one side."""
    T = max(len(row) for row in rows)
    batch = rows[0].new_full((len(rows), T, *rows[0].shape[1:]), fill)
    mask = torch.zeros(len(rows), T, dtype=torch.int64)
    for n, row in enumerate(rows):
        span = slice(T - len(row), T) if left else slice(0, len(row))
        batch[n, span] = row
        mask[n, span] = 1
    return batch, mask


def pieces(length: int, sizes: list[int]) -> list[slice]:
    """Consecutive slices of the given sizes, repeated until `length` is covered."""
    spans, start = [], 0
    while start < length:
        size = sizes[len(spans) % len(sizes)]
        spans.append(slice(start, min(start + size, length)))
        start += size
    return spans


def boundaries(lengths: list[int], dtype=torch.int64) -> torch.Tensor:
    return torch.tensor([0, *lengths], dtype=dtype).cumsum(0).to(dtype)


def content(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


# Attention as Llama 3 and as Qwen3 have it. Of the four frequencies of a head of `small_config` one is fast, one on the
# ramp, two are slow.
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
OTHER_ATTENTION = {
    "llama": {"attention_bias": False, "rope_scaling": LLAMA3, "rope_theta": 500.0},
    "qwen3": {"attention_bias": False, "use_qk_norm": True, "head_dim": 16},
}
