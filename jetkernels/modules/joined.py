"""Layers whose tensors lie one behind the other in memory, so that one product gives the outputs of all.

Each tensor has a storage of its own over its part of that memory, so savers and whatever else looks at storages see a
tensor as any other. The tensors alone keep the memory, and nothing is remembered of layers: whether they can be
computed as one is read off the addresses of what they hold now (`joined`).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from itertools import chain
from typing import Any, Self
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils.dlpack import from_dlpack, to_dlpack

from .linear import has_own_hooks, linears_are_called_by_torch

_REAL_TENSORS = (nn.Parameter, Tensor)
_DEVICES = ("cpu", "cuda")
_ABSENT = object()
# Kinds of layers that are joined: the tensors that have a row for each output, by the attribute of a module that holds
# them. The first is not None.
ROWS: dict[type[nn.Module], tuple[tuple[str, str], ...]] = {
    nn.Linear: (("_parameters", "weight"), ("_parameters", "bias")),
}


class Whole:
    """Memory that some tensors fill, one behind the other.

    Attributes:
        rows: all of it as one tensor.
        sizes: rows of each tensor.
        parts: address, shape and dtype of each.
    """

    def __init__(self, rows: Tensor, parts: Sequence[Tensor]):
        self.rows = rows
        self.sizes = [part.shape[0] for part in parts]
        self.parts = [(part.data_ptr(), part.shape, part.dtype) for part in parts]

    def holds(self, tensor: Tensor) -> bool:
        """Whether a tensor lies in it."""
        return 0 <= tensor.data_ptr() - self.rows.data_ptr() < self.rows.nbytes


# By address. They live as long as the memory is in use.
_wholes: WeakValueDictionary[int, Whole] = WeakValueDictionary()


def is_real(x: Tensor | None) -> bool:
    """Whether it is a tensor with a place in memory."""
    return (
        x is not None
        and type(x) in _REAL_TENSORS
        and not x.is_meta
        and not isinstance(x, FakeTensor)
        and not torch._C._functorch.is_functorch_wrapped_tensor(x)
    )


def joined(layers: Sequence[nn.Module]) -> list[Whole | None] | None:
    """Of each of their tensors (`ROWS`) the memory that those of all layers fill, in order; None where there is none.

    Returns: None if they are not joined, or if calling one of them does more than the product. On the path of every
        decoded token.
    """
    found = _found(layers)
    if found is None or not linears_are_called_by_torch():
        return None
    for layer in layers:
        if has_own_hooks(layer.__dict__):
            return None
    return found


def _found(layers: Sequence[nn.Module]) -> list[Whole | None] | None:
    found: list[Whole | None] = []
    for column in _columns(layers):
        whole = _whole_of(column)
        if whole is None and not _is_empty(column):
            return None
        found.append(whole)
    return found if found and found[0] is not None else None


def _columns(layers: Sequence[nn.Module]) -> list[list[Any]]:
    """For each name in `ROWS` what the layers have of it; nothing if they are of several kinds, or of another."""
    kind = type(layers[0])
    attributes = [layer.__dict__ for layer in layers if type(layer) is kind]
    if len(attributes) < len(layers):
        return []
    return [[a[where].get(name, _ABSENT) for a in attributes] for where, name in ROWS.get(kind, ())]


def _is_empty(column: Sequence[Any]) -> bool:
    """Whether no layer has a tensor of this name."""
    return column[0] is None and not [t for t in column if t is not None]


def _whole_of(tensors: Sequence[Any]) -> Whole | None:
    """The memory that these tensors fill, and no others."""
    first = tensors[0]
    whole = _wholes.get(first.data_ptr()) if type(first) in _REAL_TENSORS else None
    if whole is None or len(tensors) != len(whole.parts):
        return None
    for t, (place, shape, dtype) in zip(tensors, whole.parts):
        if (
            type(t) not in _REAL_TENSORS
            or t.data_ptr() != place
            or t.shape != shape
            or t.dtype is not dtype
            or not t.is_contiguous()
        ):
            return None
    return whole


def fuse_(layers: Sequence[nn.Module]) -> None:
    """Lets the tensors of layers of one input lie one behind the other in memory.

    They stay the same objects with the same values. Does nothing where they lie so already, where the layers are not
    of one kind in `ROWS` or have tensors of different dtypes, devices or widths, and where a tensor is in shared or
    pinned memory or is a part of a larger one: who put it there wants it there.
    """
    apart = [column for column in _columns(layers) if _whole_of(column) is None and not _is_empty(column)]
    if all(map(_may_join, apart)):
        for column in apart:
            _join_(column)


def _may_join(tensors: Sequence[Tensor]) -> bool:
    first = tensors[0]
    return (
        len(tensors) > 1
        and len(set(map(id, tensors))) == len(tensors)
        and all(
            is_real(t)
            and t.numel() > 0
            and t.is_contiguous()
            and (t.dtype, t.device, t.shape[1:]) == (first.dtype, first.device, first.shape[1:])
            and t.is_inference() == first.is_inference()
            and t.device.type in _DEVICES
            and t.untyped_storage().nbytes() == t.nbytes
            and not (t.device.type == "cpu" and (t.is_shared() or t.is_pinned()))
            for t in tensors
        )
    )


@torch.no_grad()
def _join_(tensors: Sequence[Tensor]) -> None:
    with torch.inference_mode(tensors[0].is_inference()):
        rows = torch.cat([t.detach() for t in tensors])
        parts = rows.split([t.shape[0] for t in tensors])
        whole = Whole(rows, parts)
        for t, part in zip(tensors, parts):
            # The new storage keeps the object `part`, and that keeps all of the memory and what is known of it.
            part.whole = whole
            # A capsule: of a tensor `from_dlpack` would take only one on the current CUDA device.
            t.data = from_dlpack(to_dlpack(part))
    _wholes[rows.data_ptr()] = whole


@torch.no_grad()
def release_(module: nn.Module) -> None:
    """Gives memory of their own to tensors inside a module that lie in that of a group which is no more."""
    groups = [m for m in module.modules() if isinstance(m, FusedProjections)]
    in_use = {whole for group in groups for whole in _found(_layers(group)) or ()}
    idle = [whole for whole in _wholes.values() if whole not in in_use]
    for tensor in filter(is_real, chain(module.parameters(), module.buffers())):
        if any(whole.holds(tensor) for whole in idle):
            with torch.inference_mode(tensor.is_inference()):
                tensor.data = tensor.data.clone()


def _layers(module: FusedProjections) -> list[nn.Module]:
    return [*module.projections().values()]


class FusedProjections(nn.Module, ABC):
    """A module whose projections of its input are joined, also after it was moved, cast, copied or unpickled.

    Not after `load_state_dict(assign=True)`, `share_memory` or other ways to say where a parameter should lie: it
    stays there. `fuse` joins them again.
    """

    @abstractmethod
    def projections(self) -> dict[str, nn.Module]:
        """The layers that read the module's input, by name, in the order in which their weights lie."""

    def fuse(self) -> None:
        """See `fuse_`; called at the end of a constructor."""
        fuse_(_layers(self))

    def _places(self) -> list[int]:
        tensors = chain.from_iterable(chain(layer.parameters(), layer.buffers()) for layer in _layers(self))
        return [t.data_ptr() for t in tensors if is_real(t)]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        before = self._places()
        super()._apply(fn, recurse)
        if self._places() != before:
            self.fuse()
        return self

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.fuse()
