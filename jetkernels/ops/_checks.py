"""What ``bindings/checks.h`` and ``bindings/*_inputs.h`` refuse, for fake tensors: in the same order and words.

They see ranks, sizes, dtypes, devices and layouts. Values, and who shares memory with whom, only the bindings see.
``tests/ops/test_bad_arguments.py`` holds the two against each other. Sizes may be symbols, hence ``torch._check``.
"""

from collections.abc import Iterable
from typing import Any, NoReturn

import torch
from torch import Tensor

_NAMES = {
    torch.float32: "float32",
    torch.float64: "float64",
    torch.bfloat16: "bfloat16",
    torch.float16: "float16",
    torch.int32: "int32",
    torch.int64: "int64",
    torch.bool: "bool",
    torch.uint8: "uint8",
    torch.int8: "int8",
    torch.int16: "int16",
}
_FLOATING = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_INDEX = (torch.int32, torch.int64)
MAX_TAPS = 4


def _dtype_name(dtype: torch.dtype) -> str:
    return _NAMES.get(dtype, "another dtype")


def _numbers(values: Iterable) -> str:
    return "[" + ",".join(str(v) for v in values) + "]"


def _known(t: Tensor) -> bool:
    return all(type(n) is int for n in (*t.shape, *t.stride()))


def real_dtype(q: Tensor) -> torch.dtype:
    """Dtype of the arithmetic, and of states outside a pool."""
    return torch.float64 if q.dtype == torch.float64 else torch.float32


class Checks:
    """The checks of one call. ``size`` holds the symbols that :meth:`shape` and :meth:`bind` have met."""

    def __init__(self, op: str):
        self.op = op
        self.size: dict[str, int] = {}
        self._source: dict[str, str] = {}

    def fail(self, text: str) -> NoReturn:
        raise RuntimeError(f"{self.op}: {text}")

    def require(self, condition: Any, text: str) -> None:
        torch._check(condition, lambda: f"{self.op}: {text}")

    def empty(self, like: Tensor, *symbols: str, dtype: torch.dtype | None = None) -> Tensor:
        """A result whose sizes are bound."""
        return like.new_empty([self.size[symbol] for symbol in symbols], dtype=dtype or like.dtype)

    # ---- bindings/checks.h

    def bind(self, symbol: str, size: int, source: str) -> None:
        self.size[symbol], self._source[symbol] = size, source

    def shape(self, name: str, t: Tensor, *dims: str) -> None:
        if t is None:
            self.fail(f"{name} must be a Tensor, got None")
        listed = _numbers(dims)
        if t.dim() != len(dims):
            self.fail(f"{name} must have {len(dims)} dimensions {listed}, got {t.dim()} with shape {_numbers(t.shape)}")
        for i, (symbol, got) in enumerate(zip(dims, t.shape)):
            if symbol in self.size:
                needs = f"{symbol} = {self.size[symbol]} ({self._source[symbol]})"
                self.require(got == self.size[symbol], f"{name} {listed} dimension {i} must be {needs}, got {got}")
            else:
                self.bind(symbol, got, f"as in {name}")

    def rows(self, name: str, t: Tensor) -> None:
        """A tensor [.., C]."""
        if t is None:
            self.fail(f"{name} must be a Tensor, got None")
        if not 1 <= t.dim() <= 8:
            self.fail(f"{name} must have 1 to 8 dimensions, got {t.dim()} with shape {_numbers(t.shape)}")

    def shape_like(self, name: str, t: Tensor, like_name: str, like: Tensor) -> None:
        if t is None:
            self.fail(f"{name} must be a Tensor, got None")
        text = f"{name} must have the shape {_numbers(like.shape)} of {like_name}, got {_numbers(t.shape)}"
        if t.dim() != like.dim():
            self.fail(text)
        for got, need in zip(t.shape, like.shape):
            self.require(got == need, text)

    def dtype(self, name: str, t: Tensor, *allowed: torch.dtype) -> None:
        if t.dtype not in allowed:
            self.fail(f"{name} must be {' or '.join(map(_dtype_name, allowed))}, got {_dtype_name(t.dtype)}")

    def floating(self, name: str, t: Tensor) -> None:
        self.dtype(name, t, *_FLOATING)

    def dtype_like(self, name: str, t: Tensor, like_name: str, like: Tensor) -> None:
        if t.dtype != like.dtype:
            self.fail(f"{name} must be {_dtype_name(like.dtype)} like {like_name}, got {_dtype_name(t.dtype)}")

    def same(self, name: str, t: Tensor, like_name: str, like: Tensor) -> None:
        """Shape, dtype and device."""
        self.shape_like(name, t, like_name, like)
        self.dtype_like(name, t, like_name, like)
        self.device(name, t, like_name, like)

    def dtype_like_or_fp32(self, name: str, t: Tensor, like_name: str, like: Tensor) -> None:
        """For parameters, which may be kept in fp32."""
        if t.dtype != torch.float32:
            self.dtype_like(name, t, like_name, like)

    def device(self, name: str, t: Tensor, like_name: str, like: Tensor) -> None:
        if t.device != like.device:
            self.fail(f"{name} must be on {like.device} like {like_name}, got {t.device}")

    def contiguous(self, name: str, t: Tensor) -> None:
        if _known(t) and not t.is_contiguous():
            self.fail(f"{name} must be contiguous, got strides {_numbers(t.stride())} for shape {_numbers(t.shape)}")

    def written(self, name: str, t: Tensor) -> None:
        if not _known(t) or t.numel() == 0:
            return
        inner = 0
        for stride, size in sorted((stride, size) for stride, size in zip(t.stride(), t.shape) if size > 1):
            if stride <= inner:
                layout = f"strides {_numbers(t.stride())} for shape {_numbers(t.shape)}"
                self.fail(f"{name} is written in place and must not overlap itself, got {layout}")
            inner += stride * (size - 1)

    def sequences(self, cu_seqlens: Tensor | None, like_name: str, like: Tensor) -> None:
        if cu_seqlens is None:
            self.bind("N", self.size["B"], "as B")
            return
        if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 1:
            self.fail(f"cu_seqlens must have 1 dimension [N+1] with N >= 0, got shape {_numbers(cu_seqlens.shape)}")
        self.dtype("cu_seqlens", cu_seqlens, *_INDEX)
        self.device("cu_seqlens", cu_seqlens, like_name, like)
        B = self.size["B"]
        self.require(B == 1, f"{like_name} dimension 0 (B) must be 1 with cu_seqlens, got {B}")
        self.bind("N", cu_seqlens.shape[0] - 1, "from cu_seqlens")

    def state_rows(self, state_indices: Tensor | None, like_name: str, like: Tensor) -> None:
        if state_indices is None:
            N, P = self.size["N"], self.size["P"]
            self.require(P >= N, f"the state pool must have at least N = {N} rows without state_indices, got P = {P}")
            return
        self.index("state_indices", state_indices, like_name, like)

    def index(self, name: str, t: Tensor, like_name: str, like: Tensor, symbol: str = "N") -> None:
        """[symbol] of int32 or int64."""
        self.shape(name, t, symbol)
        self.dtype(name, t, *_INDEX)
        self.device(name, t, like_name, like)

    # ---- bindings/gated_delta_rule_inputs.h, recurrent_inputs.h

    def heads(self, values: str, keys: str) -> None:
        H, Hk, K, V = (self.size[symbol] for symbol in ("H", "Hk", "K", "V"))
        multiple = H == 0 if Hk == 0 else H % Hk == 0
        self.require(multiple, f"{values} dimension 2 (H) must be a multiple of Hk = {Hk} (as in {keys}), got {H}")
        self.require(K >= 1, f"{keys} dimension 3 (K) must be at least 1, got {K}")
        self.require(V >= 1, f"{values} dimension 3 (V) must be at least 1, got {V}")

    def tokens(self, batch: str, a: Any) -> None:
        """Of the arguments ``a``: q, k [batch, T, Hk, K], v [batch, T, H, V], g and beta [batch, T, H]."""
        self.shape("q", a.q, batch, "T", "Hk", "K")
        self.floating("q", a.q)
        self.shape("k", a.k, batch, "T", "Hk", "K")
        self.shape("v", a.v, batch, "T", "H", "V")
        self.shape("g", a.g, batch, "T", "H")
        self.shape("beta", a.beta, batch, "T", "H")
        self.heads("v", "q")
        self.dtype_like("k", a.k, "q", a.q)
        self.dtype_like("v", a.v, "q", a.q)
        self.floating("g", a.g)
        self.floating("beta", a.beta)
        for name in ("k", "v", "g", "beta"):
            self.device(name, getattr(a, name), "q", a.q)

    def state(self, name: str, t: Tensor | None, q: Tensor) -> None:
        if t is None:
            return
        self.shape(name, t, "N", "H", "K", "V")
        self.dtype(name, t, real_dtype(q))
        self.device(name, t, "q", q)

    def pool(self, a: Any, like_name: str, like: Tensor) -> None:
        """Of the arguments ``a``: state [P, H, K, V], which goes with tensors like ``like``, and state_indices."""
        allowed = (torch.float64,) if like.dtype == torch.float64 else (torch.float32, torch.bfloat16)
        self.shape("state", a.state, "P", "H", "K", "V")
        self.dtype("state", a.state, *allowed)
        self.device("state", a.state, like_name, like)
        self.state_rows(a.state_indices, like_name, like)

    def drafts(self, a: Any, *allowed: torch.dtype) -> None:
        """Of the arguments ``a``: keys [N, T, Hk, K] and updates [N, T, H, V]."""
        self.shape("keys", a.keys, "N", "T", "Hk", "K")
        self.shape("updates", a.updates, "N", "T", "H", "V")
        self.dtype("keys", a.keys, *allowed)
        self.dtype_like("updates", a.updates, "keys", a.keys)
        self.contiguous("keys", a.keys)
        self.contiguous("updates", a.updates)

    # ---- bindings/dynamic_conv_inputs.h

    def like(self, name: str, t: Tensor, like_name: str, like: Tensor) -> None:
        self.dtype_like(name, t, like_name, like)
        self.device(name, t, like_name, like)

    def channels(self, name: str, x: Tensor) -> None:
        self.require(x.shape[-1] >= 1, f"{name} dimension {x.dim() - 1} (D) must be at least 1, got {x.shape[-1]}")

    def taps(self, W: int, text: str) -> None:
        self.require(W >= 2, text)
        self.require(W <= MAX_TAPS, text)

    def generator(self, a: Any, name: str = "x") -> None:
        """Of the arguments ``a``: hidden, whose rank is checked, weight [D*W, R] and bias [D*W]; binds W.

        ``name``: of what is convolved.
        """
        x = getattr(a, name)
        self.like("hidden", a.hidden, name, x)
        self.shape("weight", a.weight, "D*W", "R")
        self.like("weight", a.weight, name, x)
        self.channels(name, x)
        D, rows = self.size["D"], a.weight.shape[0]
        text = f"weight dimension 0 must be D*W with D = {D} (as in {name}) and W in 2..{MAX_TAPS}, got {rows}"
        self.require(rows % D == 0, text)
        W = rows // D
        self.taps(W, text)
        self.bind("W", W, "from weight")
        self.bind("W-1", W - 1, "from weight")
        if a.bias is not None:
            self.shape("bias", a.bias, "D*W")
            self.like("bias", a.bias, name, x)

    def conv_sequences(self, a: Any) -> None:
        """Of the arguments ``a``: cu_seqlens and conv_state."""
        self.sequences(a.cu_seqlens, "x", a.x)
        self.conv_state("conv_state", a.conv_state, a.x)

    def conv_state(self, name: str, t: Tensor | None, x: Tensor) -> None:
        """A state [N, D, W-1] or its gradient."""
        if t is not None:
            self.shape(name, t, "N", "D", "W-1")
            self.like(name, t, "x", x)

    def conv_gradients(self, a: Any) -> None:
        """Of the arguments ``a``: the incoming gradients."""
        self.shape("grad_y", a.grad_y, "B", "T", "D")
        self.like("grad_y", a.grad_y, "x", a.x)
        self.conv_state("grad_conv_state_out", a.grad_conv_state_out, a.x)

    # ---- bindings/norm_inputs.h

    def rows_to_norm(self, x: Tensor) -> None:
        """Of x [..., C]; binds C."""
        self.rows("x", x)
        self.floating("x", x)
        self.bind("C", x.shape[-1], "as in x")

    def norm_weight(self, weight: Tensor, x: Tensor) -> None:
        """[C] in the dtype of x or fp32."""
        self.shape("weight", weight, "C")
        self.dtype_like_or_fp32("weight", weight, "x", x)
        self.device("weight", weight, "x", x)

    # ---- bindings/jet_block_step.cpp

    def parameter(self, name: str, t: Tensor, dim: str, q: Tensor) -> None:
        """[dim] in the dtype of q, or in fp32 where that is narrower."""
        self.shape(name, t, dim)
        self.dtype(name, t, *((q.dtype,) if q.dtype in (torch.float64, torch.float32) else (torch.float32, q.dtype)))
        self.device(name, t, "q", q)
