"""What was built, for which processors, and which backend serves which op on this machine."""

import argparse
import json
import platform
from typing import Any

import torch

from jetkernels import _library, _version, backend_of
from jetkernels.ops import _register

_BACKWARD = "_backward"
OPS = list(_register.defined)
_PHRASES = {"hopper": "Hopper kernel", "cpu": "C++", "plain": "plain PyTorch", "fla": "Triton"}
# One token of one sequence with the head dims of Jet-Nemotron-2B, in bf16
_B, _T, _H, _K, _V, _D, _R, _W = 1, 1, 1, 96, 256, 256, 32, 4


def _example(op: str, device: torch.device) -> list[Any]:
    """Arguments of ``op``, by their names in its schema."""

    def bf16(*sizes: int) -> torch.Tensor:
        return torch.zeros(sizes, dtype=torch.bfloat16, device=device)

    def fp32(*sizes: int) -> torch.Tensor:
        return torch.zeros(sizes, device=device)

    tokens = (_B,) if op == "dynamic_conv_step" else (_B, _T)
    made: dict[str, Any] = {
        "q": bf16(_B, _T, _H, _K),
        "k": bf16(_B, _T, _H, _K),
        "v": bf16(_B, _T, _H, _V),
        "g": fp32(_B, _T, _H),
        "beta": bf16(_B, _T, _H),
        "state": fp32(_B, _H, _K, _V),
        "keys": fp32(_B, _T, _H, _K),
        "updates": fp32(_B, _T, _H, _V),
        "num_accepted": torch.zeros(_B, dtype=torch.int32, device=device),
        "x": bf16(*tokens, _D),
        "hidden": bf16(*tokens, _R),
        "weight": bf16(_D * _W, _R),
        "kernels": bf16(_B, _T, _D, _W),
        "conv_state": bf16(_B, _D, _W - 1),
        "cos": fp32(_B, _K),
        "sin": fp32(_B, _K),
        "key": bf16(_B, _H, _T, _K),
        "value": bf16(_B, _H, _T, _K),
        "lengths": torch.zeros(_B, dtype=torch.int64, device=device),
        "gate": bf16(*tokens, _D),
        "up": bf16(*tokens, _D),
        "a": bf16(*tokens, _H),
        "b": bf16(*tokens, _H),
        "A_log": fp32(_H),
        "dt_bias": fp32(_H),
        "scale": 1.0,
        "l2norm_qk": True,
        "silu": True,
        "residual": bf16(_B, _T, _D),
        "eps": 1e-6,
    }
    if op == "attention_step":
        made |= dict.fromkeys("qkv", bf16(_B, _H, _K))
    if op.endswith("rms_norm"):
        made["weight"] = bf16(_D)
    if op == "prefill_gated_delta_rule":
        made["cu_seqlens"] = torch.tensor([0, _T], device=device)
    if op == "jet_block_step":
        made |= {
            "q": bf16(_B, _H, _K),
            "k": bf16(_B, _H, _K),
            "v": bf16(_B, _D),
            "hidden": bf16(_B, _R),
            "a": bf16(_B, _H),
            "b": bf16(_B, _H),
            "gate": bf16(_B, _H, _V),
            "A_log": fp32(_H),
            "dt_bias": fp32(_H),
            "norm_weight": bf16(_V),
            "eps": 1e-5,
        }
    made |= _linear_example(op, device)
    return [made.get(a.name) for a in getattr(torch.ops.jet, op).default._schema.arguments]


def _linear_example(op: str, device: torch.device) -> dict[str, torch.Tensor]:
    """The weight and scale of ``op`` if it is one of the linears, for x [.., _D]."""
    weights = {
        "linear": torch.zeros(_D, _D, dtype=torch.bfloat16, device=device),
        "linear_int8": torch.zeros(_D, _D, dtype=torch.int8, device=device),
        "linear_int4": torch.zeros(_D, _D // 2, dtype=torch.uint8, device=device),
    }
    return {"weight": weights[op], "scale": torch.ones(_D, 1, device=device)} if op in weights else {}


def _arguments(op: str, device: torch.device) -> list[Any]:
    """Arguments of ``op``; those of a backward begin with gradients of what its forward returns."""
    forward = op.removesuffix(_BACKWARD)
    arguments = _example(forward, device)
    if forward == op:
        return arguments
    shapes = [x.to("meta") if isinstance(x, torch.Tensor) else x for x in arguments]
    outs = getattr(torch.ops.jet, forward).default(*shapes)
    outs = outs if isinstance(outs, tuple) else (outs,)
    return [*(torch.zeros(out.shape, dtype=out.dtype, device=device) for out in outs), *arguments]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``jetkernels info``."""
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of text")


def backends(device: torch.device) -> dict[str, str]:
    """The backend of each op for tensors on ``device``, as one phrase each.

    Asked for the head dims of Jet-Nemotron in bf16. For other shapes and dtypes :func:`jetkernels.backend_of` may tell
    another backend.
    """

    def phrase(op: str) -> str:
        try:
            backend = backend_of(op, *_arguments(op, device))
        except RuntimeError as error:  # of the CUDA runtime: this command is there to find out
            return f"none ({str(error).splitlines()[0]})"
        return f"{_PHRASES[backend.name]} ({backend.detail})"

    return {op: phrase(op) for op in OPS}


def devices() -> list[torch.device]:
    """The CPU and every CUDA device."""
    cuda = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return [torch.device("cpu"), *(torch.device("cuda", i) for i in range(cuda))]


def facts() -> dict[str, object]:
    """Versions, threads and what the library was built for, by the names that are printed."""
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
    """The device with its product name and compute capability."""
    if device.type == "cpu":
        return "cpu"
    major, minor = torch.cuda.get_device_capability(device)
    return f"{device} ({torch.cuda.get_device_name(device)}, compute capability {major}.{minor})"


def run(arguments: argparse.Namespace) -> None:
    """Print it."""
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
