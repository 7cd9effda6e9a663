"""What every number carries: device, driver, torch, commit, command, date, and how busy the machine was."""

import datetime
import hashlib
import os
import platform
import sys

import torch

from benchmarks import ROOT, machine


def _gpu(index: int) -> dict[str, object]:
    properties = torch.cuda.get_device_properties(index)
    return {
        "device": properties.name,
        "driver": machine.gpu_driver(index),
        "multiprocessors": properties.multi_processor_count,
        "l2_bytes": properties.L2_cache_size,
        "memory_bytes": properties.total_memory,
        "cuda": torch.version.cuda,
    }


def _build() -> dict | str:
    try:
        from jetkernels import _library
    except Exception as error:  # what was measured without the library still has a provenance
        return f"no library: {error}"
    return {**_library.build_info(), "library": _library.path.name}


def processors() -> dict[str, float]:
    """What a program gets of the processors at this moment; where others take them, that is said on stderr."""
    found = machine.processors()
    if notice := machine.busy_notice(found, "times measured now are too long and vary; measure again on a quiet one"):
        print(notice, file=sys.stderr, flush=True)
    return {"got": round(found.got, 2), "count": found.count}


def _waiting() -> dict[str, str]:
    """What the environment says about how idle threads of OpenMP wait; jetkernels/_machine.py sets GOMP_SPINCOUNT."""
    names = ("OMP_WAIT_POLICY", machine.SPIN, "KMP_BLOCKTIME")
    return {name: os.environ[name] for name in names if name in os.environ}


def provenance(command: str, device: torch.device | str = "cpu") -> dict[str, object]:
    """``command``: what was typed, e.g. "python -m benchmarks.run"; this process's arguments are added."""
    device = torch.device(device)
    library = ROOT / "jetkernels" / "libjetkernels.so"
    return {
        **({"device": machine.processor_name()} if device.type == "cpu" else _gpu(device.index or 0)),
        "threads": torch.get_num_threads(),
        "waiting": _waiting(),
        "processors": processors(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "build": _build(),
        "library_sha256": hashlib.sha256(library.read_bytes()).hexdigest()[:16] if library.exists() else None,
        "commit": machine.commit(),
        "command": " ".join([command, *sys.argv[1:]]),
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
    }
