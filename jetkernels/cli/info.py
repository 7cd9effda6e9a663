"""What was built, for which processors, and which backend serves which op on this machine."""

import argparse
import json
import platform

import torch

from jetkernels import _library, _version
from jetkernels.ops import _register

OPS = [name for name in _register.defined if not name.endswith("_backward")]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of text")


def backends(device: torch.device) -> dict[str, str]:
    """The backend of each op for tensors on ``device``, as one phrase each."""
    index = device.index if device.type == "cuda" else -1
    kernel = "Hopper kernel (sm_90a)" if device.type == "cuda" else f"C++ ({_library.build_info()['cpu_isa']})"
    reasons = {op: _library.plain_reason(op, index) for op in OPS}
    return {op: kernel if reason is None else f"plain PyTorch ({reason})" for op, reason in reasons.items()}


def devices() -> list[torch.device]:
    cuda = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return [torch.device("cpu"), *(torch.device("cuda", i) for i in range(cuda))]


def facts() -> dict[str, object]:
    build = _library.build_info()
    return {
        "jetkernels": _version.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "built with torch": build["torch"],
        "compiler": build["compiler"],
        "CPU variants": ", ".join(build["cpu_isas"]) + f" (in use: {build['cpu_isa']})",
        "CUDA architectures": ", ".join(build["cuda_architectures"]) or "none (built without nvcc)",
    }


def device_name(device: torch.device) -> str:
    if device.type == "cpu":
        return "cpu"
    major, minor = torch.cuda.get_device_capability(device)
    return f"{device} ({torch.cuda.get_device_name(device)}, compute capability {major}.{minor})"


def run(arguments: argparse.Namespace) -> None:
    table = {device_name(device): backends(device) for device in devices()}
    if arguments.json:
        print(json.dumps({**facts(), "backends": table}, indent=1))
        return
    for name, value in facts().items():
        print(f"{name:20} {value}")
    width = max(map(len, OPS))
    for device, ops in table.items():
        print(f"\non {device}")
        for op, backend in ops.items():
            print(f"  {op:{width}} {backend}")
    if not torch.cuda.is_available():
        print(
            "\nno CUDA device: "
            + ("this PyTorch is a CPU build" if torch.version.cuda is None else "PyTorch sees none")
        )
