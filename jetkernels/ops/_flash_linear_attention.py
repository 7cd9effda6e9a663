"""flash-linear-attention's Triton kernels, for CUDA tensors that no kernel of this library takes.

The plain path (``_register``) asks :func:`offer` first. The library is imported at the first such call, never for
tensors on a CPU. Called are the two functions under its autograd, with a context of our own: no gradient is recorded
here, and its registry of backends, in which this library may be, is not asked.
"""

import functools
import importlib
import importlib.util
import os
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from jetkernels import _library
from jetkernels.plain._compute import contiguous_as, plain_op
from jetkernels.plain._pool import PoolRows
from jetkernels.plain.chunk_gated_delta_rule import LOG_DECAY_MIN, Inputs

LIBRARY = "flash-linear-attention"
_VERSION = "0.6"  # the functions are not its public ones
_MAX_HEAD_DIM = 256
_MAX_HEADS = 65535  # of a batch: the second dimension of a grid
_MIN_CAPABILITY = (8, 0)  # of Triton
_CHUNK_DTYPES = (torch.bfloat16, torch.float16)
_RECURRENT_DTYPES = (*_CHUNK_DTYPES, torch.float32)


class Offer(NamedTuple):
    """What the library makes of a call.

    Attributes:
        function: computes it; ``None`` if plain PyTorch has to.
        text: the library and its version, or why it does not serve; ``""`` where nothing is to be said.
    """

    function: Callable | None
    text: str


_NOTHING = Offer(None, "")


def offer(op: str, arguments: Sequence[Any], reason: str) -> Offer:
    """What the library makes of ``jet::<op>(*arguments)``, which no kernel of this library takes for ``reason``."""
    function = _FUNCTIONS.get(op)
    if function is None or not _on_gpu(arguments[0]) or reason == _library.plain_reason_text(_library.PLAIN_ASKED):
        return _NOTHING
    if os.environ.get("JETKERNELS_FLA") == "0" or importlib.util.find_spec("fla") is None:
        return _NOTHING
    if any(isinstance(a, Tensor) and a.numel() == 0 for a in arguments):
        return _NOTHING
    if refused := _refused(op, arguments) or _load().refused:
        return Offer(None, refused)
    return Offer(functools.partial(_said_if_it_fails, function), _load().name)


def _said_if_it_fails(function: Callable, *arguments: Any) -> Any:
    """What fails says who failed, and what to do."""
    try:
        return function(*arguments)
    except Exception as error:
        text = f"{_load().name} failed, and JETKERNELS_FLA=0 switches it off ({type(error).__name__}: {error})"
        raise RuntimeError(text) from error


def _on_gpu(tensor: Tensor) -> bool:
    return tensor.is_cuda


def _refused(op: str, arguments: Sequence[Any]) -> str:
    """Why the library does not take these arguments; ``""`` if it does."""
    q, _, v = arguments[_GRADIENTS:][:3] if op.endswith("_backward") else arguments[:3]
    dtypes = _RECURRENT_DTYPES if op.startswith("recurrent") else _CHUNK_DTYPES
    if q.dtype not in dtypes:
        return f"{LIBRARY} does not take {str(q.dtype).removeprefix('torch.')}"
    if q.shape[3] > _MAX_HEAD_DIM:
        return f"{LIBRARY} takes K up to {_MAX_HEAD_DIM}"
    if v.shape[0] * v.shape[2] > _MAX_HEADS:
        return f"{LIBRARY} takes up to {_MAX_HEADS} heads in a batch"
    if torch.cuda.get_device_capability(q.device) < _MIN_CAPABILITY:
        return "Triton needs compute capability 8.0"
    if torch.cuda.is_current_stream_capturing():
        return f"{LIBRARY} is not captured into a CUDA graph"
    return ""


# ---- the library


class _Rules(NamedTuple):
    """The library's two autograd functions, its name and version, or why it is not used."""

    chunk: Any = None
    recurrent: Any = None
    name: str = ""
    refused: str = ""


@functools.cache
def _load() -> _Rules:
    try:
        version = getattr(importlib.import_module("fla"), "__version__", "of an unknown version")
        name = f"{LIBRARY} {version}"
        if not version.startswith(f"{_VERSION}."):
            return _Rules(refused=f"{name} is not used, only {_VERSION} is")
        utils, chunk, recurrent = (
            importlib.import_module(f"fla.{module}")
            for module in ("utils", "ops.gated_delta_rule.chunk", "ops.gated_delta_rule.fused_recurrent")
        )
        if utils.IS_NVIDIA_HOPPER and utils.TRITON_ABOVE_3_4_0 and not utils.TRITON_ABOVE_3_7_1:
            return _Rules(refused=f"{name} is not used on Hopper with Triton 3.4 to 3.7.0, where it refuses gradients")
        return _Rules(chunk.ChunkGatedDeltaRuleFunction, recurrent.FusedRecurrentFunction, name)
    except Exception as error:  # of whatever it imports: a broken package must not break the call, and it is announced
        return _Rules(refused=f"{LIBRARY} is installed and does not import ({type(error).__name__}: {error})")


class _Context:
    """Stands in for autograd's context."""

    saved_tensors: tuple[Tensor | None, ...] = ()

    def save_for_backward(self, *tensors: Tensor | None) -> None:
        self.saved_tensors = tensors


# ---- the ops


def _run_chunk(context: _Context, a: Inputs) -> tuple[Tensor, Tensor]:
    return _load().chunk.forward(
        context,
        q=a.q,
        k=a.k,
        v=a.v,
        g=a.g.float().clamp(min=LOG_DECAY_MIN),  # it takes differences of sums of g, in which -inf would give NaN
        beta=a.beta.float(),
        scale=a.scale,
        initial_state=None if a.initial_state is None else a.initial_state.float(),
        output_final_state=True,
        # a copy: it remembers what it has read of a tensor, which may be written in place between two calls
        cu_seqlens=None if a.cu_seqlens is None else a.cu_seqlens.to(torch.int64, copy=True),
        use_qk_l2norm_in_kernel=a.l2norm_qk,
    )


@plain_op
def _chunk(*arguments: Any) -> tuple[Tensor, Tensor]:
    """jet::chunk_gated_delta_rule."""
    a = Inputs(*arguments)
    o, final_state = _run_chunk(_Context(), a)
    return contiguous_as(o, a.v.dtype), final_state


@plain_op
def _chunk_backward(grad_o: Tensor, grad_final_state: Tensor | None, *arguments: Any) -> tuple[Tensor, ...]:
    """jet::chunk_gated_delta_rule_backward; the forward runs once more, as nothing of it was kept."""
    a = Inputs(*arguments)
    state = a.initial_state
    if state is None:  # it has a gradient too
        sequences = a.q.shape[0] if a.cu_seqlens is None else a.cu_seqlens.numel() - 1
        state = a.v.new_zeros(sequences, a.v.shape[2], a.q.shape[3], a.v.shape[3], dtype=torch.float32)
        a = a._replace(initial_state=state)
    context = _Context()
    _run_chunk(context, a)
    dq, dk, dv, dg, dbeta, _, dinitial, *_ = _load().chunk.backward(context, grad_o, grad_final_state)
    grads = dq, dk, dv, torch.where(a.g < LOG_DECAY_MIN, 0, dg), dbeta, dinitial
    return tuple(contiguous_as(grad, x.dtype) for grad, x in zip(grads, (a.q, a.k, a.v, a.g, a.beta, state)))


@plain_op
def _recurrent(*arguments: Any) -> Tensor:
    """jet::recurrent_gated_delta_rule, which has the pool and state_indices where the chunked rule has two others."""
    a = Inputs(*arguments)
    rows = PoolRows(a.initial_state, a.cu_seqlens, a.v.shape[0])
    old = rows.take()
    o, new = _load().recurrent.forward(
        _Context(),
        q=a.q,
        k=a.k,
        v=a.v,
        g=a.g.float(),
        beta=a.beta.float(),
        scale=a.scale,
        initial_state=old,
        output_final_state=True,
        use_qk_l2norm_in_kernel=a.l2norm_qk,
    )
    rows.put(old, new)
    return contiguous_as(rows.mask(o), a.v.dtype)


_GRADIENTS = 2  # grad_o and grad_final_state, before the arguments of the forward
_FUNCTIONS: dict[str, Callable] = {
    "chunk_gated_delta_rule": _chunk,
    "chunk_gated_delta_rule_backward": _chunk_backward,
    "recurrent_gated_delta_rule": _recurrent,
}
