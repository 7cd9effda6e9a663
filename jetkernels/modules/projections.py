"""Linear layers of one input, computed as one product.

Each stays a layer of its own, with parameters of its own name. Where their tensors lie one behind the other (`joined`)
one product gives the outputs of all: a decode step reads the input once and launches once. Where a gradient is
computed, and where a layer is more than a Linear (`plain_weights`), each is called. Many rows on a CPU are a product
for each layer (`MANY_ROWS`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from jetkernels.ops import linear as linear_op

from .fused import is_transformed
from .joined import FusedProjections as FusedProjections
from .joined import Whole, is_real, joined
from .linear import plain_weights
from .quantized import QuantizedLinear, quantized_linear, tiles_of_group

# From so many rows on, products of single layers are as fast on a CPU, or faster: the seven of a JetBlock (1536
# columns, bf16, 2 cores) take 25.6 ms for 31.4 with 2048 rows. With 512 rows they take 1.19 times as long.
MANY_ROWS = 1024


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
    found = joined(modules)
    weight = None if found is None else found[0]
    if weight is None or (x.device.type == "cpu" and weight.rows.is_floating_point() and _has_many_rows(x)):
        return [_product(layer, name, x) for name, layer in layers.items()]
    assert found is not None
    _, bias, *scale = found
    y = _product_of_group(modules, x, weight, bias, *scale)
    return torch.split_with_sizes(y, weight.sizes, -1)


def _has_many_rows(x: Tensor) -> bool:
    return x.numel() >= MANY_ROWS * x.shape[-1] > 0


def apply(layer: nn.Module, name: str, x: Tensor) -> Tensor:
    """The output of one layer, as `project` gives those of several."""
    return layer(x) if _is_called((layer,), x) else _product(layer, name, x)


def _product_of_group(
    layers: Sequence[nn.Module], x: Tensor, weight: Whole, bias: Whole | None, scale: Whole | None = None
) -> Tensor:
    rows = None if bias is None else bias.rows
    if scale is None:
        return linear(x, weight.rows, rows)
    return quantized_linear(x, weight.rows, scale.rows, rows, tiles_of_group(layers, weight, scale))


def _product(layer: nn.Module, name: str, x: Tensor) -> Tensor:
    if type(layer) is QuantizedLinear:
        return layer(x)
    plain = plain_weights(layer, name)
    return layer(x) if plain is None else linear(x, *plain)


def _is_called(layers: Iterable[nn.Module], x: Tensor) -> bool:
    """Whether each layer is called: for its gradient, for a trace, or because there are no addresses to look at."""
    if torch.compiler.is_compiling() or not is_real(x) or is_transformed() or torch.jit.is_tracing():
        return True
    return torch.is_grad_enabled() and (x.requires_grad or any(p.requires_grad for m in layers for p in m.parameters()))


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Gives x W^T + b without a gradient; `jetkernels.ops.linear` knows which calls stream the weight."""
    under_autocast = x.device.type in ("cpu", "cuda") and torch.is_autocast_enabled(x.device.type)
    return F.linear(x, weight, bias) if under_autocast or is_transformed() else linear_op(x, weight, bias)
