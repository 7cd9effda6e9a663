"""Root-mean-square norms that compute in fp32 (fp64 for fp64 input) and round once, at the end."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.types import Device


def _normalise(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Gives x / rms(x) * weight over the last dimension, left in the precision of the computation."""
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    return F.rms_norm(x, x.shape[-1:], weight.to(x.dtype), eps)


class RMSNorm(nn.Module):
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
        return _normalise(x, self.weight, self.eps).to(x.dtype)

    def extra_repr(self) -> str:
        """What `print` says of it."""
        return f"{self.weight.numel()}, eps={self.eps}"


class GatedRMSNorm(RMSNorm):
    """y = rmsnorm(x) * weight * silu(gate); x and gate [..., V], one weight [V] shared by all heads."""

    def forward(self, x: Tensor, gate: Tensor) -> Tensor:  # type: ignore[override]  # the gate is a second input
        """Normalises and gates x [..., V]; the result has its dtype."""
        y = _normalise(x, self.weight, self.eps)
        return (y * F.silu(gate.to(y.dtype))).to(x.dtype)
