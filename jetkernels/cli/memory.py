"""Whether a model can fit at all, found out before anything is allocated: a killed process says nothing."""

import os
from collections import Counter
from pathlib import Path

import torch

from jetkernels.model import JetNemotronConfig
from jetkernels.model.hybrid import DecoderLayer
from jetkernels.model.mixers import MIXERS

CGROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")
TRAINING_COPIES = 4  # of fp32 parameters: themselves, the gradient, AdamW's two averages


def parameter_count(config: JetNemotronConfig) -> int:
    """Of the model of a config; one layer of each kind is built, on no device."""
    layers = sum(
        count * sum(p.numel() for p in DecoderLayer(config, kind, device="meta").parameters())
        for kind, count in Counter(config.layer_types).items()
    )
    heads = 1 if config.tie_word_embeddings else 2
    return heads * config.vocab_size * config.hidden_size + layers + config.hidden_size


def cache_bytes(config: JetNemotronConfig, dtype: torch.dtype, batch: int, tokens: int) -> int:
    """Of the cache of `batch` sequences of up to `tokens` tokens."""
    total = 0
    for kind, count in Counter(config.layer_types).items():
        state = MIXERS[kind].initial_state(config, 1, max(1, tokens), device="meta", dtype=dtype)
        total += count * sum(tensor.nbytes for tensor in state)
    return batch * total


def available_bytes(device: str) -> int | None:
    """What a device can still give, swap included; None if nobody says."""
    if torch.device(device).type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    limits = []
    try:
        lines = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
        limits.append(sum(int(lines[name].split()[0]) * 1024 for name in ("MemAvailable", "SwapFree")))
    except (OSError, KeyError, ValueError):
        pass
    try:
        limits.append(int(CGROUP_LIMIT.read_text()))
    except (OSError, ValueError):
        pass  # no limit, or none that can be read
    if not limits and hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        limits.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    return min(limits, default=None)


def require(what: str, needed: int, device: str) -> None:
    """Raises RuntimeError if `what` needs more than the device has; needed: bytes, no more than it certainly takes."""
    available = available_bytes(device)
    if available is not None and needed > available:
        raise RuntimeError(
            f"{what} need at least {needed / 2**30:,.1f} GiB, and {device} has {available / 2**30:,.1f} GiB free: "
            "fewer tokens or sequences at once, a narrower dtype or a smaller model need less"
        )
