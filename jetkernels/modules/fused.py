"""Where an op of this library may stand for operations of PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd import forward_ad

# Not DTensor, quantised tensors and other subclasses: what they compute is decided where they are used. FakeTensor
# stands for a plain tensor while a program is being exported.
PLAIN_TENSORS = (Tensor, nn.Parameter, FakeTensor)
_DTYPES = (torch.bfloat16, torch.float32, torch.float16, torch.float64)
_DEVICES = ("cpu", "cuda", "meta")


def is_plain(tensor: Tensor | None) -> bool:
    """Whether it is a tensor of no subclass that decides itself what is computed with it."""
    return type(tensor) in PLAIN_TENSORS


def ops_take(*tensors: Tensor) -> bool:
    """Whether the ops compute on them: plain tensors of a floating dtype, on a device that the ops know.

    Operations of PyTorch also run on other devices, batch under vmap and differentiate forwards: where that is wanted
    they are used.
    """
    for t in tensors:
        if type(t) not in PLAIN_TENSORS or t.dtype not in _DTYPES or t.device.type not in _DEVICES:
            return False
    return not is_transformed()


def is_transformed() -> bool:
    """Whether PyTorch batches what is computed now, or differentiates it forwards: its own operations can do that."""
    if torch.compiler.is_compiling():
        return False
    return forward_ad._current_level >= 0 or torch._C._are_functorch_transforms_active()


def fusible(*tensors: Tensor) -> bool:
    """Whether a pointwise op takes them: `ops_take` does, and they have one shape, dtype and device.

    Operations of PyTorch also promote and broadcast.
    """
    first = tensors[0]
    dtype, device, shape = first.dtype, first.device, first.shape
    return ops_take(*tensors) and all(t.dtype == dtype and t.device == device and t.shape == shape for t in tensors[1:])
