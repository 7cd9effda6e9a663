"""Linear layers of one input, computed as one product.

Each stays a `torch.nn.Linear` with a parameter of its own name. Their weights are views of one storage, one behind the
other, so that one product over the storage gives the outputs of all: a decode step reads the input once and launches
once. Where a gradient is computed, and where a layer is more than a Linear (`plain_weights`), each is called.
"""

from __future__ import annotations

import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from jetkernels.ops import linear as linear_op

from .linear import has_hooks, has_own_hooks, linears_are_called_by_torch, plain_weights
from .quantized import QuantizedLinear

_REAL_TENSORS = (nn.Parameter, Tensor)


@torch.no_grad()
def fuse_(layers: Sequence[nn.Module]) -> None:
    """Makes the weights of layers of one input views of one storage, and their biases of another.

    The parameters stay the same objects with the same values. Does nothing where a layer is no plain Linear with a
    weight in memory, where the weights differ in dtype or device, and where they lie so already.
    """
    for layer in layers:
        for known in (_known, _known_quantized):
            known.pop(layer, None)  # it may hold on to memory that the layer has left
    if not all(type(layer) is nn.Linear for layer in layers):
        return
    for name in ("weight", "bias"):
        parameters = [layer._parameters.get(name) for layer in layers]
        if all(map(is_real, parameters)):
            _join_([p for p in parameters if p is not None])


def is_real(x: Tensor | None) -> bool:
    """Whether it is a tensor with a place in memory."""
    return (
        x is not None
        and type(x) in _REAL_TENSORS
        and not x.is_meta
        and not isinstance(x, FakeTensor)
        and not torch._C._functorch.is_functorch_wrapped_tensor(x)
    )


def _join_(parameters: Sequence[Tensor]) -> None:
    first = parameters[0]
    alike = all(
        p.is_contiguous() and p.dtype == first.dtype and p.device == first.device and p.shape[1:] == first.shape[1:]
        for p in parameters
    )
    if not alike or _joined(parameters) is not None:
        return
    for p, part in zip(parameters, torch.cat([p.data for p in parameters]).split([len(p) for p in parameters])):
        p.data = part


def _joined(parameters: Sequence[Tensor]) -> Tensor | None:
    """The rows of all parameters as one tensor, if they lie one behind the other in one storage."""
    first, last = parameters[0], parameters[-1]
    row, at, rows = first.stride(), first.data_ptr(), 0
    for p in parameters:
        if p.data_ptr() != at or p.dtype != first.dtype or p.stride() != row or p.shape[1:] != first.shape[1:]:
            return None
        at += p.nbytes
        rows += len(p)
    if not first.is_contiguous() or first.untyped_storage().data_ptr() != last.untyped_storage().data_ptr():
        return None
    return first.detach().as_strided((rows, *first.shape[1:]), row)


class FusedProjections(nn.Module, ABC):
    """A module whose projections of its input lie so, also after it was moved, cast, copied or unpickled."""

    @abstractmethod
    def projections(self) -> dict[str, nn.Module]:
        """The layers that read the module's input, by name, in the order in which their weights lie."""

    def fuse(self) -> None:
        """See `fuse_`; called at the end of a constructor."""
        fuse_([*self.projections().values()])

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        super()._apply(fn, recurse)
        self.fuse()
        return self

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.fuse()


def project(layers: Mapping[str, nn.Module], x: Tensor) -> Sequence[Tensor]:
    """The outputs of layers of one input, in order.

    Args:
        layers: by name, for people.
        x: [..., C].

    Returns: [..., P] of each; views of one tensor where they were computed as one.
    """
    modules = tuple(layers.values())
    if _is_called(modules, x):
        return [layer(x) for layer in modules]
    if type(modules[0]) is QuantizedLinear and len(modules) == 1:
        return [modules[0](x)]
    if (whole := _quantized(modules)) is not None:
        return torch.split_with_sizes(whole(x), [layer.get_buffer("weight").shape[0] for layer in modules], -1)
    product = _known.get(modules[0])
    if product is None or not product.is_of(modules):
        plain = [plain_weights(layer, name) for name, layer in layers.items()]
        product = _product_of(modules, plain)
        if product is None:
            return [layer(x) if p is None else linear(x, *p) for layer, p in zip(modules, plain)]
        _known[modules[0]] = product
    y = linear(x, product.weight, product.bias)
    return (y,) if len(modules) == 1 else torch.split_with_sizes(y, product.sizes, -1)


def apply(layer: nn.Module, name: str, x: Tensor) -> Tensor:
    """The output of one layer, as `project` gives those of several."""
    return project({name: layer}, x)[0]


class _Product(NamedTuple):
    """The weights of some layers as one.

    Attributes:
        weight: [P, C].
        bias: [P], or None.
        sizes: outputs of each layer.
        parameters: of each layer, its weight and its bias, and where they lay.
    """

    weight: Tensor
    bias: Tensor | None
    sizes: list[int]
    parameters: tuple[tuple[Tensor, int, Tensor | None, int], ...]

    def is_of(self, layers: Sequence[nn.Module]) -> bool:
        """Whether it still is the product of these layers. On the path of every decoded token."""
        if len(layers) != len(self.parameters) or not linears_are_called_by_torch():
            return False
        for layer, (weight, place, bias, bias_place) in zip(layers, self.parameters):
            attributes = layer.__dict__
            if type(layer) is not nn.Linear or has_own_hooks(attributes):
                return False
            parameters = attributes["_parameters"]
            if parameters.get("weight") is not weight or weight.data_ptr() != place:
                return False
            if parameters.get("bias") is not bias or (bias is not None and bias.data_ptr() != bias_place):
                return False
        return True


# The product of the layers that begin with this one. A product that is out of date is found out by `is_of`.
_known: weakref.WeakKeyDictionary[nn.Module, _Product] = weakref.WeakKeyDictionary()


class _Quantized(NamedTuple):
    """Quantised layers as one, and where their weights lie in it."""

    whole: QuantizedLinear
    places: list[int]


_known_quantized: weakref.WeakKeyDictionary[nn.Module, _Quantized] = weakref.WeakKeyDictionary()


def _quantized(layers: Sequence[nn.Module]) -> QuantizedLinear | None:
    """The layers as one, if they are quantised alike and nothing else."""
    quantized = [layer for layer in layers if type(layer) is QuantizedLinear and not has_hooks(layer)]
    if len(quantized) < len(layers):
        return None
    known = _known_quantized.get(layers[0])
    if known is None or known.places != [layer.weight.data_ptr() for layer in quantized]:
        whole = QuantizedLinear.fused(quantized)
        if whole is None:
            return None
        known = _Quantized(whole, [layer.weight.data_ptr() for layer in quantized])
        _known_quantized[layers[0]] = known
    return known.whole


def _product_of(layers: Sequence[nn.Module], plain: Sequence[tuple[Tensor, Tensor | None] | None]) -> _Product | None:
    found = [p for p in plain if p is not None and is_real(p[0]) and (p[1] is None or is_real(p[1]))]
    if len(found) != len(layers) or any("weight" not in layer._parameters for layer in layers):
        return None
    biases = [bias for _, bias in found if bias is not None]
    if len(biases) not in (0, len(found)):
        return None
    weight, bias = _joined([weight for weight, _ in found]), _joined(biases) if biases else None
    if weight is None or (biases and bias is None):
        return None
    parameters = tuple((w, w.data_ptr(), b, 0 if b is None else b.data_ptr()) for w, b in found)
    return _Product(weight, bias, [w.shape[0] for w, _ in found], parameters)


def _is_called(layers: Iterable[nn.Module], x: Tensor) -> bool:
    """Whether each layer is called: for its gradient, or because there are no addresses to look at."""
    if torch.compiler.is_compiling() or not is_real(x):
        return True
    return torch.is_grad_enabled() and (x.requires_grad or any(p.requires_grad for m in layers for p in m.parameters()))


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Gives x W^T + b without a gradient; `jetkernels.ops.linear` knows which calls stream the weight."""
    under_autocast = x.device.type in ("cpu", "cuda") and torch.is_autocast_enabled(x.device.type)
    return F.linear(x, weight, bias) if under_autocast else linear_op(x, weight, bias)
