"""Root-mean-square norms that compute in fp32 (fp64 for fp64 input) and round once, at the end."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.types import Device

from jetkernels.ops import add_rms_norm, gated_rms_norm, rms_norm

from .fused import ops_take
from .stand_in import HasStandIn, is_as_written


def _weight_for(x: Tensor, weight: Tensor) -> Tensor:
    """`weight` in a dtype that the ops take beside x."""
    return weight if weight.dtype in (x.dtype, torch.float32) else weight.to(_real(x.dtype))


def _real(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _normalise(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Gives x / rms(x) * weight over the last dimension in PyTorch, left in the precision of the computation."""
    x = x.to(_real(x.dtype))
    return F.rms_norm(x, x.shape[-1:], weight.to(x.dtype), eps)


class RMSNorm(HasStandIn):
    """y = x / sqrt(mean(x^2) + eps) * weight over the last dimension, weight [size]."""

    def __init__(self, size: int, eps: float = 1e-6, *, device: Device = None, dtype: torch.dtype | None = None):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(size, device=device, dtype=dtype))

    def reset_parameters(self) -> None:
        """Sets the weight to one."""
        nn.init.ones_(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        """Normalises x [..., size]; the result has its dtype."""
        weight = self.weight
        if not ops_take(x, weight):
            return _normalise(x, weight, self.eps).to(x.dtype)
        return rms_norm(x, _weight_for(x, weight), self.eps)

    def extra_repr(self) -> str:
        """What `print` says of it."""
        return f"{self.weight.numel()}, eps={self.eps}"


class GatedRMSNorm(RMSNorm):
    """y = rmsnorm(x) * weight * silu(gate); x and gate [..., V], one weight [V] shared by all heads."""

    def forward(self, x: Tensor, gate: Tensor) -> Tensor:  # type: ignore[override]  # the gate is a second input
        """Normalises and gates x [..., V]; the result has its dtype."""
        weight, dtype = self.weight, x.dtype
        if not ops_take(x, gate, weight):
            y = _normalise(x, weight, self.eps)
            return (y * F.silu(gate.to(y.dtype))).to(dtype)
        if gate.dtype != dtype:  # rounding either to the other's dtype would be a second rounding
            x, gate = x.to(_real(dtype)), gate.to(_real(dtype))
        return gated_rms_norm(x, gate, _weight_for(x, weight), self.eps).to(dtype)


def add_norm(norm: nn.Module, x: Tensor | None, residual: Tensor) -> tuple[Tensor, Tensor]:
    """Adds x to the residual stream and norms it.

    Args:
        norm: an RMSNorm, or what stands in its place.
        x: None for nothing.
        residual: as x.

    Returns: the normed sum, and the sum.
    """
    if x is None:
        return norm(residual), residual
    if type(norm) is RMSNorm and is_as_written(norm) and x.dtype == residual.dtype:
        weight = norm.weight
        if ops_take(x, residual, weight):
            return add_rms_norm(x, residual, _weight_for(x, weight), norm.eps)
    h = residual + x
    return norm(h), h
