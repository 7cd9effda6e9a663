"""Which calls of another library's gated delta rule are served here, and what is said of the others."""

import warnings
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from jetkernels.ops import backend_of

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_announced: set[tuple[str, str]] = set()


def reason_not_served(op: str, q: Any, k: Any, v: Any, initial_state: Any) -> str | None:
    """Why a call with these tensors goes to the other library; ``None`` if jetkernels serves it.

    Args:
        op: ``"chunk_gated_delta_rule"`` or ``"recurrent_gated_delta_rule"``.
        q: [B, T, Hk, K].
        k: [B, T, Hk, K].
        v: [B, T, H, V].
        initial_state: [N, H, K, V] or [N, H, V, K], or ``None``.
    """
    if not all(isinstance(t, Tensor) and t.dim() == 4 for t in (q, k, v)):
        return "q, k and v are not tensors of 4 dimensions"
    device = q.device
    if device.type not in ("cpu", "cuda", "meta"):
        return f"the tensors are on {device.type}, and jetkernels has code for cpu and cuda"
    if q.dtype not in _DTYPES or not q.dtype == k.dtype == v.dtype:
        return f"q, k and v must have one floating dtype, got {q.dtype}, {k.dtype} and {v.dtype}"
    real = torch.float64 if q.dtype == torch.float64 else torch.float32
    if initial_state is not None and initial_state.dtype not in (real, torch.bfloat16, torch.float16):
        return f"a state of {initial_state.dtype} does not go with q of {q.dtype}"
    if forward_ad._current_level >= 0:
        return "forward-mode derivatives, which jetkernels does not have"
    if device.type == "cuda":
        return plain_reason(op, device.index, q.dtype, q.shape[3], v.shape[3])
    return None


_plain_reasons: dict[tuple, str | None] = {}


@torch.compiler.assume_constant_result
def plain_reason(op: str, device: int, dtype: torch.dtype, K: int, V: int) -> str | None:
    """Why no kernel serves these head dims on a CUDA device, so that the other library's code is the better choice."""
    key = op, device, dtype, K, V
    if key not in _plain_reasons:
        on: dict[str, Any] = {"device": torch.device("cuda", device)}
        keys, values = (torch.zeros(1, 1, 1, size, dtype=dtype, **on) for size in (K, V))
        gates = torch.zeros(1, 1, 1, **on)
        tokens = keys, keys, values, gates, gates
        state = torch.zeros(1, 1, K, V, dtype=torch.float64 if dtype == torch.float64 else torch.float32, **on)
        backend = backend_of(op, *tokens, state, None, 1.0, False)
        _plain_reasons[key] = None if backend.name == "hopper" else backend.detail
    return _plain_reasons[key]


def announce(function: str, library: str, reason: str) -> None:
    """Says once where a call goes; says nothing while a graph is traced."""
    if torch.compiler.is_compiling() or (function, reason) in _announced:
        return
    _announced.add((function, reason))
    warnings.warn(f"jetkernels: {function} stays with {library}: {reason}", stacklevel=3)
