"""Whether a model can fit at all, found out before anything is allocated: a killed process says nothing."""

import dataclasses
import os
from collections import Counter
from contextlib import suppress
from pathlib import Path

import torch

from jetkernels.model import JetNemotronConfig, JetNemotronForCausalLM
from jetkernels.model.decoder_layer import DecoderLayer
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


def weight_bytes(config: JetNemotronConfig, dtype: torch.dtype, bits: int | None) -> int:
    """Of the weights, as `JetNemotronForCausalLM.quantize_` leaves them if there are `bits`."""
    one = dataclasses.replace(config, layer_types=sorted(set(config.layer_types)))
    model = JetNemotronForCausalLM(one, device="meta", dtype=dtype)
    if bits is not None:
        model.quantize_(bits)
    counts = Counter(config.layer_types)
    return _bytes(model) + sum(
        (counts[kind] - 1) * _bytes(layer) for kind, layer in zip(one.layer_types, model.model.layers)
    )


def _bytes(module: torch.nn.Module) -> int:
    return sum(tensor.nbytes for tensor in (*module.parameters(), *module.buffers()))


def cache_bytes_of_kinds(config: JetNemotronConfig, dtype: torch.dtype, batch: int, tokens: int) -> dict[str, int]:
    """Of the cache of `batch` sequences of up to `tokens` tokens: of all layers of each kind."""
    found = {}
    for kind, count in Counter(config.layer_types).items():
        state = MIXERS[kind].initial_state(config, 1, max(1, tokens), device="meta", dtype=dtype)
        found[kind] = batch * count * sum(tensor.nbytes for tensor in state)
    return found


def cache_bytes(config: JetNemotronConfig, dtype: torch.dtype, batch: int, tokens: int) -> int:
    """Of the cache of `batch` sequences of up to `tokens` tokens."""
    return sum(cache_bytes_of_kinds(config, dtype, batch, tokens).values())


def reset_peak(device: str) -> None:
    """What `peak_bytes` says counts from here on."""
    if torch.device(device).type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak_bytes(device: str) -> int | None:
    """The most that this process has held of a device's memory since `reset_peak`; None if nobody says."""
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    with suppress(OSError, ValueError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return 1024 * int(line.split()[1])
    return None


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
