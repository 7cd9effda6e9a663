"""Layouts of the same values: other strides, other offsets, addresses far apart."""

from collections.abc import Sequence
from typing import NamedTuple

import pytest
import torch
from support.arguments import tensor_names
from torch import Tensor

FAR = 2**31 + 64  # elements: beyond what a 32-bit index reaches
LAYOUTS = ("contiguous", "padded", "stepped", "reversed dims", "shifted", "strides of ones")


def laid_out(t: Tensor, layout: str) -> Tensor:
    """The values of ``t`` behind other strides; what lies between them is NaN."""
    if layout == "contiguous" or t.dim() == 0:
        return t.contiguous()
    if layout == "reversed dims":
        dims = tuple(reversed(range(t.dim())))
        return t.permute(dims).contiguous().permute(dims)
    if layout == "strides of ones":  # those of dimensions of size 1 mean nothing
        strides = (7 if size == 1 else stride for size, stride in zip(t.shape, t.contiguous().stride()))
        return t.contiguous().as_strided(t.shape, tuple(strides))
    filler = float("nan") if t.is_floating_point() else 1 << 30
    if layout == "shifted":
        out = t.new_full((t.numel() + 1,), filler)[1:].view(t.shape)
    elif layout == "stepped":
        out = t.new_full((*t.shape, 2), filler)[..., 0]
    else:
        out = t.new_full((*t.shape[:-1], t.shape[-1] + 3), filler)[..., 1 : t.shape[-1] + 1]
    out.copy_(t)
    return out


def with_layouts(inputs: NamedTuple, layouts: Sequence[str]) -> NamedTuple:
    """Each tensor argument in its layout, in the order of the schema; those behind the last layout stay as they are."""
    names = tensor_names(inputs)
    return inputs._replace(**{name: laid_out(getattr(inputs, name), layout) for name, layout in zip(names, layouts)})


def far_apart(t: Tensor, dim: int) -> Tensor:
    """The values of ``t`` with a stride along ``dim`` that takes its last index past 2^31 elements.

    The storage is reserved but only the pages of these values exist.
    """
    strides = list(t.contiguous().stride())
    strides[dim] = -(-FAR // (t.shape[dim] - 1))
    needed = 1 + sum((size - 1) * stride for size, stride in zip(t.shape, strides))
    try:
        storage = torch.empty(needed, dtype=t.dtype)
    except RuntimeError:
        pytest.skip(f"this machine does not reserve {needed * t.element_size() >> 30} GiB of address space")
    return storage.as_strided(t.shape, strides).copy_(t)
