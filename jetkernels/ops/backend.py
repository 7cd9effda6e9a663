"""Which backend serves a call of an op."""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from jetkernels import _library
from jetkernels.ops import _autograd, _flash_linear_attention, _register


class Backend(NamedTuple):
    """Who serves a call, and why.

    Attributes:
        name: ``"hopper"``, a Hopper kernel of this library; ``"cpu"``, its C++ for a CPU; ``"fla"``, the Triton kernels
            of flash-linear-attention, for CUDA tensors that no kernel of this library takes; or ``"plain"``, operations
            of PyTorch.
        detail: the CUDA architecture of the kernel, the CPU instruction set in use (where that is AVX-512, float64 runs
            as AVX2), or the reason for ``"fla"`` (after the library's version) or ``"plain"``, in words.
    """

    name: str
    detail: str


def backend_of(op: str | torch._ops.OpOverload | torch._ops.OpOverloadPacket, *args: Any) -> Backend:
    """Who would serve ``torch.ops.jet.<op>(*args)``, and why.

    The op's own binding is asked, with all its checks. Nothing is computed, launched or written.

    Args:
        op: ``"chunk_gated_delta_rule"``, or ``torch.ops.jet.chunk_gated_delta_rule``; also a backward op.
        *args: the arguments of ``torch.ops.jet.<op>``, on a CPU or a CUDA device.

    Returns:
        The backend's name and the detail in words.

    Raises:
        ValueError: there is no such op.
        RuntimeError: an argument is wrong (the op's own sentence), or holds no data (a meta or fake tensor);
            or ``torch.jit`` is tracing.

    Example:
        >>> x, kernels = torch.randn(1, 5, 8), torch.randn(1, 5, 8, 4)
        >>> jetkernels.backend_of("apply_dynamic_conv", x, kernels, None, None, True)
        Backend(name='cpu', detail='avx512')
    """
    name = op if isinstance(op, str) else str(op).removeprefix("jet.").removesuffix(".default")
    if name not in _register.defined:
        raise ValueError(
            f"backend_of: op must be a name or torch.ops.jet.<name>, one of {', '.join(_register.defined)}, got {op}"
        )
    if torch._C._get_tracing_state() is not None:
        raise RuntimeError(f"{name}: backend_of cannot be traced by torch.jit; call it outside")
    overload = _autograd.overload(name)
    with _disable_current_modes():  # make_fx would record the call, and its graph would make it
        answer = _library.ask_backend(lambda: overload(*args))
    if answer is None:
        tensors = zip((a.name for a in overload._schema.arguments), args)
        given = ", ".join(f"{argument} on {t.device}" for argument, t in tensors if isinstance(t, Tensor))
        raise RuntimeError(f"{name}: backend_of needs tensors that hold data, got {given} (meta or fake tensors)")
    backend = Backend(**answer)
    if backend.name != "plain":
        return backend
    function, text = _flash_linear_attention.offer(name, args, backend.detail)
    if function:
        return Backend("fla", f"{text}; {backend.detail}")
    return Backend("plain", f"{backend.detail}{text and '; '}{text}")
