"""SwiGLU and its backward in plain PyTorch."""

import torch

from ._compute import accumulation_dtype, contiguous_as, plain_op


@plain_op
def swiglu(gate, up):
    """jet::swiglu: gate, up [.., C] in one dtype -> y [.., C] in that dtype."""
    dtype = accumulation_dtype(gate)
    return contiguous_as(torch.nn.functional.silu(gate.to(dtype)) * up, gate.dtype)


@plain_op
def swiglu_backward(grad_y, gate, up):
    """jet::swiglu_backward: grad_y, gate, up [.., C] in one dtype -> gradients of gate and up in that dtype."""
    wide = gate.to(accumulation_dtype(gate))
    sigmoid = torch.sigmoid(wide)
    dup = contiguous_as(wide * sigmoid * grad_y, up.dtype)
    slope = wide.mul(1 - sigmoid).add_(1).mul_(sigmoid)
    return contiguous_as(slope.mul_(grad_y).mul_(up), gate.dtype), dup
