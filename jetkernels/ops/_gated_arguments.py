"""The arguments of flash-linear-attention's gated delta rule, as the ops take them.

``chunk_gated_delta_rule`` and ``fused_recurrent_gated_delta_rule`` share this file, and the functions on a pool what it
has of gates. A call that uses none of these arguments only pays for a glance at them (:func:`is_plain`).
"""

import re
import warnings
from typing import Any, NamedTuple

import torch
from torch import Tensor

from jetkernels.ops._checks import real_dtype

_NARROW = (torch.bfloat16, torch.float16)
_CHUNK_SIZES = (16, 32, 64)
_NOT_COMPUTED = {
    "gk": "the decay is one number per token and value head (g), not one per key dimension",
    "gv": "the decay is one number per token and value head (g), not one per value dimension",
    "cp_context": "no sequence is split over devices in here; initial_state and output_final_state pass its state on",
}


class Tokens(NamedTuple):
    """What the ops take of every token."""

    q: Tensor
    k: Tensor
    v: Tensor
    g: Tensor
    beta: Tensor


Unchecked = tuple[Any, Any, Any, Any, Any]  # q, k, v, g and beta as the user gave them


class Options(NamedTuple):
    """The keyword-only arguments of the two functions, in their order and with their defaults."""

    state_v_first: bool = False
    use_gate_in_kernel: bool = False
    A_log: Tensor | None = None
    dt_bias: Tensor | None = None
    use_beta_sigmoid_in_kernel: bool = False
    allow_neg_eigval: bool = False
    cu_seqlens_cpu: Tensor | None = None
    chunk_indices: Tensor | None = None
    chunk_size: int = 64
    autotune_interval: int | None = None
    use_cache: bool | None = None
    transpose_state_layout: bool | None = None
    gk: Tensor | None = None
    gv: Tensor | None = None
    cp_context: object | None = None


_DEFAULTS = tuple(Options())
_FLAGS = ("state_v_first", "use_gate_in_kernel", "use_beta_sigmoid_in_kernel", "allow_neg_eigval")


def is_plain(g: Tensor | None, beta: Tensor | None, initial_state: Tensor | None, given: tuple) -> bool:
    """Whether the ops take the call as it is; ``given`` are the fields of :class:`Options`."""
    try:
        if g is None or beta is None or given != _DEFAULTS:
            return False
    except (RuntimeError, ValueError):  # a tensor or an array where a flag belongs has no truth
        return False
    return initial_state is None or getattr(initial_state, "dtype", None) not in _NARROW


def resolve(
    function: str,
    tokens: Unchecked,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    given: tuple,
) -> tuple[Tokens, Tensor | None, bool]:
    """The arguments of the op for a call that is not plain.

    Args:
        function: the name that the user called.
        tokens: as the user gave them.
        initial_state: as the user gave it.
        cu_seqlens: as the user gave it.
        given: the fields of :class:`Options`, as the user gave them.

    Returns:
        q, k, v, g and beta with the gates computed; initial_state with K before V and in no narrow dtype; whether the
        final state is to be given with V before K. What the op refuses by itself is handed on to it.

    Raises:
        TypeError, ValueError, RuntimeError, NotImplementedError: an option is wrong, or not computed here.
    """
    options = Options(*given)
    v_first = _check_options(function, options)
    _check_hints(function, cu_seqlens, options)
    resolved = _gates(function, Tokens(*tokens), options)
    if isinstance(initial_state, Tensor):
        if v_first:
            initial_state = _k_first(function, initial_state, resolved)
        if initial_state.dtype in _NARROW and isinstance(resolved.q, Tensor):
            initial_state = initial_state.to(real_dtype(resolved.q))
    return resolved, initial_state, v_first


def resolve_gates(function: str, tokens: Unchecked, **given: Any) -> Unchecked:
    """The tokens with the gates computed, for the arguments of gates alone; g and beta must be there."""
    options = Options(**given)
    _check_options(function, options)
    if tokens[3] is None or tokens[4] is None:
        return tokens  # the op refuses them
    return _gates(function, Tokens(*tokens), options)


def _k_first(function: str, state: Tensor, tokens: Tokens) -> Tensor:
    """The state [N, H, V, K] with K before V."""
    q, v = tokens.q, tokens.v
    if state.dim() < 2 or not isinstance(q, Tensor) or not isinstance(v, Tensor) or q.dim() != 4 or v.dim() != 4:
        return state  # the op refuses one of them
    if state.shape[-2] != v.shape[3] or state.shape[-1] != q.shape[3]:
        raise RuntimeError(
            f"{function}: initial_state must be [N,H,V,K] with V = {v.shape[3]} and K = {q.shape[3]} "
            f"(state_v_first=True), got {list(state.shape)}"
        )
    return state.mT


def _check_options(function: str, options: Options) -> bool:
    """Refuses what does not go together; returns whether states have V before K."""
    for name, why in _NOT_COMPUTED.items():
        if getattr(options, name) is not None:
            raise NotImplementedError(f"{function}: {name} must be None: {why}")
    for name in _FLAGS:
        _flag(function, name, getattr(options, name))
    if options.allow_neg_eigval and not options.use_beta_sigmoid_in_kernel:
        raise ValueError(f"{function}: allow_neg_eigval=True needs use_beta_sigmoid_in_kernel=True")
    for name in ("A_log", "dt_bias"):
        if getattr(options, name) is not None and not options.use_gate_in_kernel:
            raise ValueError(f"{function}: {name} is used with use_gate_in_kernel=True only; without it leave it None")
    if options.transpose_state_layout is None:
        return options.state_v_first
    _flag(function, "transpose_state_layout", options.transpose_state_layout)
    if options.state_v_first:
        raise ValueError(f"{function}: transpose_state_layout is the old name of state_v_first; give one of the two")
    text = f"{function}: transpose_state_layout is the old name of state_v_first"
    if not torch.compiler.is_compiling():
        warnings.warn(text, DeprecationWarning, stacklevel=4)
    return options.transpose_state_layout


def _check_hints(function: str, cu_seqlens: Tensor | None, options: Options) -> None:
    """Of what changes no result: refuses what could not be meant."""
    if type(options.chunk_size) is not int or options.chunk_size not in _CHUNK_SIZES:
        raise ValueError(f"{function}: chunk_size must be 16, 32 or 64, got {options.chunk_size!r}")
    interval = options.autotune_interval
    if interval is not None and (type(interval) is not int or interval < 1):
        raise ValueError(f"{function}: autotune_interval must be an int of at least 1 or None, got {interval!r}")
    if options.use_cache is not None and not isinstance(options.use_cache, bool):
        raise TypeError(f"{function}: use_cache must be True, False or None, got {_kind(options.use_cache)}")
    offsets, chunks = options.cu_seqlens_cpu, options.chunk_indices
    for name, t in (("cu_seqlens_cpu", offsets), ("chunk_indices", chunks)):
        if t is None:
            continue
        if not isinstance(t, Tensor) or t.dtype not in (torch.int32, torch.int64):
            raise TypeError(f"{function}: {name} must be a Tensor of int32 or int64 or None, got {_kind(t)}")
        if cu_seqlens is None:
            raise ValueError(f"{function}: {name} belongs to cu_seqlens, which is None")
    if offsets is not None and isinstance(cu_seqlens, Tensor):
        if offsets.device.type != "cpu" or offsets.shape != cu_seqlens.shape:
            raise ValueError(
                f"{function}: cu_seqlens_cpu must be a copy of cu_seqlens {list(cu_seqlens.shape)} on the CPU, "
                f"got {list(offsets.shape)} on {offsets.device}"
            )
    if chunks is not None and (chunks.dim() != 2 or chunks.shape[1] != 2):
        raise ValueError(
            f"{function}: chunk_indices must be [chunks, 2], a sequence and a chunk in it, got {list(chunks.shape)}"
        )


def _flag(function: str, name: str, value: object) -> None:
    if not isinstance(value, bool):
        raise TypeError(f"{function}: {name} must be True or False, got {_kind(value)}")


def _kind(value: object) -> str:
    if value is None:
        return "None"
    return str(value.dtype) if isinstance(value, Tensor) else type(value).__name__


def _gates(function: str, tokens: Tokens, options: Options) -> Tokens:
    """The tokens with g and beta as the ops take them."""
    v, g, beta = tokens.v, tokens.g, tokens.beta
    for name, t, option in (("g", g, "use_gate_in_kernel"), ("beta", beta, "use_beta_sigmoid_in_kernel")):
        if t is None and getattr(options, option):
            raise ValueError(f"{function}: {name} must be a Tensor with {option}=True, got None")
    if isinstance(v, Tensor):
        real = real_dtype(v)
        g = v.new_zeros(v.shape[:3], dtype=real) if g is None else g
        beta = v.new_ones(v.shape[:3], dtype=real) if beta is None else beta
    tokens = tokens._replace(g=g, beta=beta)
    if not all(isinstance(t, Tensor) and t.is_floating_point() for t in tokens):
        return tokens  # the op refuses them
    if options.use_gate_in_kernel and g.dim() != 3:
        raise RuntimeError(f"{function}: g must have 3 dimensions [B,T,H], got {g.dim()} with shape {list(g.shape)}")
    if v.dtype == torch.float64:
        g, beta = g.double(), beta.double()
    raw_beta = beta
    if options.use_gate_in_kernel:
        together = options.use_beta_sigmoid_in_kernel and beta.dtype == g.dtype
        g, strength = _delta_gates(function, g, beta if together else g.detach(), options)
        beta = strength if together else beta
    if options.use_beta_sigmoid_in_kernel and beta is raw_beta:
        beta = torch.sigmoid(beta.to(real_dtype(beta)))
    if options.allow_neg_eigval:
        beta = 2 * beta
    return tokens._replace(g=g, beta=beta)


def _delta_gates(function: str, g: Tensor, beta: Tensor, options: Options) -> tuple[Tensor, Tensor]:
    """``jet::delta_gates`` of the raw g and beta; what it refuses, under the names that these have here."""
    parameters: list[Tensor] = []
    for name, t in (("A_log", options.A_log), ("dt_bias", options.dt_bias)):
        if t is None and name == "dt_bias":
            t = torch.zeros_like(parameters[0])
        if not isinstance(t, Tensor) or not t.is_floating_point():
            raise TypeError(
                f"{function}: {name} must be a floating-point Tensor with use_gate_in_kernel=True, got {_kind(t)}"
            )
        parameters.append(t.to(real_dtype(g)))
    try:
        return torch.ops.jet.delta_gates.default(g, beta, *parameters)
    except RuntimeError as error:
        names = {"a": "g", "b": "beta"}
        op, colon, sentence = str(error).partition(": ")
        if not colon or op not in ("delta_gates", "jet::delta_gates"):
            raise
        renamed = re.sub(r"(^|of |like |as in )([ab])\b", lambda m: m[1] + names[m[2]], sentence)
        raise type(error)(f"{function}: {renamed}") from None
