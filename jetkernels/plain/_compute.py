"""What every plain op shares: the dtype it computes in, and the modes it switches off."""

import functools

import torch


def accumulation_dtype(x):
    """fp64 for fp64 inputs, fp32 for all others."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def plain_op(function):
    """Run `function` without autograd (backward formulas are explicit) and without autocast (arithmetic is fp32)."""

    @functools.wraps(function)
    def run(*args):
        device = args[0].device.type
        # a device without autocast (meta) must not be asked whether it is on
        if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
            with torch.autocast(device, enabled=False):
                return run(*args)
        with torch.no_grad():
            return function(*args)

    return run


def contiguous_as(x, dtype):
    """A contiguous `x` in `dtype`, in at most one copy; `x` itself where it is that already."""
    if x.dtype == dtype and x.is_contiguous():
        return x
    return torch.empty(x.shape, dtype=dtype, device=x.device).copy_(x)
