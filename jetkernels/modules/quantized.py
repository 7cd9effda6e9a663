"""Linear layers whose weight is kept in 8 or 4 bits; activations, sums and results stay as they are."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any, NamedTuple, Self
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.types import Device

from jetkernels.ops import linear_int4, linear_int8

from .dynamic_conv import KernelGenerator
from .fused import is_transformed
from .joined import ROWS, FusedProjections, Whole, release_
from .linear import has_hooks

BITS = (8, 4)
# Columns that share a scale of int4. A row of int8 has one scale: 255 steps resolve it.
GROUP_SIZES_INT4 = (32, 64)
# The steps that the value of largest magnitude may become in int4; the best by squared error is kept. On normal weights
# the error is 13% below that of 7 alone, and 1.3% above that of 44 candidates.
EXTREMES_INT4 = (-9.0, -8.0, -7.0, 7.0)
# Weights that are converted at once. On a CPU what is computed of them stays in a cache; a GPU wants more work at once.
BLOCK = {"cpu": 1 << 20, "cuda": 1 << 26}
# Up to so many rows of x a product reads the weight as it is stored; above, it is widened in front of a GEMM of torch.
# On a CPU with AMX (8960 x 1536, 512 rows, 2 cores) int8 takes 23 ms so and 46 the other way, int4 32 and 55.
MOST_ROWS_CPU = 512
# By bytes: torch's int8 kernel reads the weight once per row, its int4 kernel once per 16 rows; widening moves 5 bytes
# per weight.
MOST_ROWS_CUDA = {8: 4, 4: 64}
# What torch's int4 kernel wants on CUDA: tiles of 16 columns, in one piece of memory 8 of them and as many rows.
INNER_TILES, TILE_COLUMNS, TILE_ROWS = 8, 16, 8
TILES_ON = ("cuda",)


# ---- numbers


def pack_int4(steps: Tensor) -> Tensor:
    """Integers from -8 to 7 [P, C], C even -> uint8 [P, C/2]: byte j has column 2j in its low and 2j + 1 in its high
    half, plus 8.
    """  # noqa: D205 - two lines of one sentence
    halves = (steps + 8).to(torch.uint8)
    return halves[:, ::2] | halves[:, 1::2] << 4


def unpack_int4(packed: Tensor) -> Tensor:
    """The int8 [P, C] of `pack_int4`."""
    return torch.stack((packed & 15, packed >> 4), -1).flatten(-2).to(torch.int8) - 8


def _blocks(like: Tensor, columns: int) -> Iterator[slice]:
    """The rows of a matrix, BLOCK elements at a time; a compiler gets them at once, and makes its own blocks."""
    rows = len(like)
    some = rows if torch.compiler.is_compiling() else max(1, BLOCK.get(like.device.type, BLOCK["cpu"]) // columns)
    return (slice(a, a + some) for a in range(0, rows, max(1, some)))


def _widen(weight: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    steps = unpack_int4(weight) if weight.dtype == torch.uint8 else weight
    # Integers times fp32 are fp32, and fp64 is exact.
    scale = scale.to(torch.promote_types(dtype, torch.float32))
    return (steps.unflatten(1, (scale.shape[1], -1)) * scale[:, :, None]).flatten(1).to(dtype)


def dequantize(weight: Tensor, scale: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """The matrix [P, C] that `weight` and `scale` of a QuantizedLinear stand for, rounded to `dtype`."""
    columns = weight.shape[1] * (2 if weight.dtype == torch.uint8 else 1)
    wide = torch.empty(len(weight), columns, dtype=dtype, device=weight.device)
    for rows in _blocks(weight, columns):
        wide[rows] = _widen(weight[rows], scale[rows], dtype)
    return wide


def quantize(weight: Tensor, bits: int, group_size: int) -> tuple[Tensor, Tensor]:
    """The nearest steps, and their scales, of a matrix.

    Args:
        weight: [P, C], floating.
        bits: 8 or 4.
        group_size: columns that share a scale; divides C.

    Returns: what QuantizedLinear calls weight and scale. A scale of int8 takes the largest magnitude to 127. One of
        int4 is chosen for the least squared error, and rounded to bf16, in which torch's CUDA kernel reads it.

    Raises:
        ValueError: a weight is not finite.
    """
    P, C = weight.shape
    stored = torch.empty(P, C * bits // 8, dtype=torch.int8 if bits == 8 else torch.uint8, device=weight.device)
    scale = torch.empty(P, C // group_size, dtype=torch.float32, device=weight.device)
    if weight.is_meta:
        return stored, scale
    for rows in _blocks(weight, C):
        groups = weight[rows].to(torch.float32).unflatten(1, (-1, group_size))
        steps, found = _fit_int8(groups) if bits == 8 else _fit_int4(groups)
        steps = steps.flatten(1).to(torch.int8)
        stored[rows], scale[rows] = steps if bits == 8 else pack_int4(steps), found.squeeze(-1)
    if not scale.isfinite().all():
        raise ValueError("quantize: weight must be finite in float32, got NaN or infinity")
    return stored, scale


def _fit_int8(groups: Tensor) -> tuple[Tensor, Tensor]:
    """Groups [P, G, g] -> steps [P, G, g] and scales [P, G, 1]."""
    scale = groups.abs().amax(-1, keepdim=True) / 127
    return (groups / _divisor(scale)).round_(), scale


def _fit_int4(groups: Tensor) -> tuple[Tensor, Tensor]:
    """As `_fit_int8`, with the least squared error among EXTREMES_INT4."""
    low, high = groups.aminmax(dim=-1, keepdim=True)
    extreme = torch.where(-low > high, low, high)
    best, scale = torch.full_like(extreme, -1.0), extreme
    for step in EXTREMES_INT4:
        steps = _steps_int4(groups, extreme / step)
        # Given the steps, the best scale is <w, q> / <q, q>, and it takes <w, q>^2 / <q, q> off the error.
        product, square = (groups * steps).sum(-1, keepdim=True), steps.square().sum(-1, keepdim=True)
        fitted = product / _divisor(square)
        gain = product * fitted
        scale = torch.where(gain > best, fitted, scale)
        best = torch.maximum(gain, best)
    scale = scale.to(torch.bfloat16).to(torch.float32)
    return _steps_int4(groups, scale), scale


def _steps_int4(groups: Tensor, scale: Tensor) -> Tensor:
    return (groups / _divisor(scale)).round_().clamp_(-8, 7)


def _divisor(scale: Tensor) -> Tensor:
    """Where a scale is zero all steps are, whatever they are divided by."""
    return torch.where(scale == 0, 1.0, scale)


# ---- products


class TilesInt4(NamedTuple):
    """A weight as torch's int4 kernel for CUDA reads it, beside the one that is stored.

    Attributes:
        weight: [P/8, C/128, 32, 4] int32.
        scale_and_zero: [G, P, 2] bf16, the scale and what a step of 8 stands for: zero.
    """

    weight: Tensor
    scale_and_zero: Tensor


def halves_swapped(packed: Tensor) -> Tensor:
    """The bytes of `pack_int4` with even columns in their high halves, as aten::_convert_weight_to_int4pack wants."""
    return packed << 4 | packed >> 4


def int4_scale_and_zero(scale: Tensor) -> Tensor:
    """`TilesInt4.scale_and_zero` of scales [P, G]."""
    return F.pad(scale.mT.unsqueeze(-1).to(torch.bfloat16), (0, 1))


def int4_tiles(weight: Tensor, scale: Tensor) -> TilesInt4 | None:
    """The weight for torch's int4 kernel; None where it does not take this one."""
    P, half = weight.shape
    if (
        weight.device.type not in TILES_ON
        or P == 0
        or P % TILE_ROWS
        or 2 * half % (INNER_TILES * TILE_COLUMNS)
        or torch.cuda.get_device_capability(weight.device) < (8, 0)
    ):
        return None
    tiles = torch._convert_weight_to_int4pack(halves_swapped(weight), INNER_TILES)
    return TilesInt4(tiles, int4_scale_and_zero(scale))


def product(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None, tiles: TilesInt4 | None = None) -> Tensor:
    """``x W^T + bias`` in the dtype of x, W = dequantize(weight, scale).

    Args:
        x: [R, C].
        weight: int8 [P, C] or uint8 [P, C/2].
        scale: [P, G] fp32.
        bias: [P] in the dtype of x, or None.
        tiles: of an int4 weight on CUDA.
    """
    R = x.shape[0]
    if x.device.type == "cpu" and R <= MOST_ROWS_CPU:
        return (linear_int8 if weight.dtype == torch.int8 else linear_int4)(x, weight, scale, bias)
    if x.device.type == "cuda":
        y = cuda_product(x, weight, scale, tiles)
        if y is not None:
            return y if bias is None else y + bias
    y = x.new_empty(R, len(weight))
    for rows in _blocks(weight, x.shape[1]):
        y[:, rows] = F.linear(x, _widen(weight[rows], scale[rows], x.dtype), None if bias is None else bias[rows])
    return y


def cuda_product(x: Tensor, weight: Tensor, scale: Tensor, tiles: TilesInt4 | None) -> Tensor | None:
    """`product` by a kernel of torch that reads the stored weight; None where there is none, or it does not pay."""
    (R, C), G = x.shape, scale.shape[1]
    if R == 0 or x.dtype == torch.float64:
        return None
    if weight.dtype == torch.int8:
        return torch._weight_int8pack_mm(x, weight, scale.flatten()) if G == 1 and R <= MOST_ROWS_CUDA[8] else None
    if tiles is None or R > MOST_ROWS_CUDA[4] or x.dtype != torch.bfloat16:
        return None
    return torch._weight_int4pack_mm(x.contiguous(), tiles.weight, C // G, tiles.scale_and_zero)


class _Product(torch.autograd.Function):
    """`product` with gradients for x and bias; the weight is widened again in the backward pass, and not kept."""

    @staticmethod
    def forward(x: Tensor, bias: Tensor | None, weight: Tensor, scale: Tensor, tiles: TilesInt4 | None) -> Tensor:
        return product(x, weight, scale, bias, tiles)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        _, _, weight, scale, _ = inputs
        ctx.save_for_backward(weight, scale)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (dy,) = grads
        weight, scale = ctx.saved_tensors
        dx = dy @ dequantize(weight, scale, dy.dtype) if ctx.needs_input_grad[0] else None
        dbias = dy.sum(0) if ctx.needs_input_grad[1] else None
        return dx, dbias, None, None, None


def quantized_linear(
    x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None, tiles: TilesInt4 | None = None
) -> Tensor:
    """What a QuantizedLinear of these tensors gives of x."""
    P, C = len(weight), weight.shape[1] * (2 if weight.dtype == torch.uint8 else 1)
    if x.dim() == 0 or x.shape[-1] != C or not x.is_floating_point():
        raise RuntimeError(f"QuantizedLinear: x must be floating [..., {C}], got {x.dtype} {list(x.shape)}")
    device = x.device.type
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device) and x.dtype != torch.float64:
        x = x.to(torch.get_autocast_dtype(device))
    bias = None if bias is None else bias.to(x.dtype)
    if is_transformed():
        return F.linear(x, _widen(weight, scale, x.dtype), bias)
    rows = x.reshape(-1, C)
    if torch.is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad)):
        y = _Product.apply(rows, bias, weight, scale, tiles)
    else:
        y = product(rows, weight, scale, bias, tiles)
    return y.view(*x.shape[:-1], P)


# The tiles of weights that are joined, and the versions of the tensors of which they were made.
_tiles_of: WeakKeyDictionary[Whole, tuple[list[int], TilesInt4 | None]] = WeakKeyDictionary()


def tiles_of_group(layers: Sequence[nn.Module], weight: Whole, scale: Whole) -> TilesInt4 | None:
    """The tiles of joined layers; they are for many rows each from then on, and give up their own."""
    if weight.rows.device.type not in TILES_ON or weight.rows.dtype != torch.uint8:
        return None
    tensors = [layer.__dict__["_buffers"][name] for layer in layers for name in ("weight", "scale")]
    versions = [0 if t.is_inference() else t._version for t in tensors]
    known = _tiles_of.get(weight)
    if known is None or known[0] != versions:
        known = _tiles_of[weight] = versions, int4_tiles(weight.rows, scale.rows)
        for layer in layers:
            layer._tiles = None  # type: ignore[assignment]  # of a QuantizedLinear
    return known[1]


# ---- layers


def _checked_group_size(bits: int, group_size: int | None) -> int | None:
    """None: all columns."""
    if bits not in BITS:
        raise ValueError(f"quantisation: bits must be 8 or 4, got {bits!r}")
    if bits == 4:
        group_size = GROUP_SIZES_INT4[0] if group_size is None else group_size
        if group_size not in GROUP_SIZES_INT4:
            raise ValueError(f"quantisation: group_size of int4 must be 32 or 64, got {group_size!r}")
    elif group_size is not None and (not isinstance(group_size, int) or group_size < 1):
        raise ValueError(f"quantisation: group_size must be a positive integer or None, got {group_size!r}")
    return group_size


class QuantizedLinear(nn.Module):
    """y = x W^T + b with a weight of 8 or 4 bits: W[p, c] = scale[p, c // group_size] * step[p, c].

    It computes in the dtype of x, whatever that is, and gradients go to x and the bias, not to the weight. `to(dtype)`
    changes the dtype of the bias only. A floating weight in a state dict that is loaded is quantised.

    Args:
        in_features: C.
        out_features: P.
        bits: 8 or 4.
        group_size: columns that share a scale. int8: a divisor of C, all of them by default. int4: 32 or 64, the
            default 32; C must be a multiple of it.
        bias: whether there is one.
        device: of weight, scale and bias.
        dtype: of the bias.

    Attributes:
        weight: the steps: int8 [P, C], or uint8 [P, C/2] as `pack_int4` makes it; of no particular values at first.
        scale: [P, C / group_size] fp32.
        bias: [P], a parameter, or None.
    """

    weight: Tensor
    scale: Tensor
    bias: nn.Parameter | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bits: int,
        group_size: int | None = None,
        bias: bool = False,
        *,
        device: Device = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        group_size = _checked_group_size(bits, group_size) or in_features
        if in_features < 1 or in_features % group_size:
            raise ValueError(
                f"QuantizedLinear: in_features must be a multiple of group_size = {group_size}, got {in_features}"
            )
        self.in_features, self.out_features = in_features, out_features
        self.bits, self.group_size = bits, group_size
        meta = torch.empty(out_features, in_features, device="meta")
        for name, like in zip(("weight", "scale"), quantize(meta, bits, group_size)):
            self.register_buffer(name, torch.empty(like.shape, dtype=like.dtype, device=device))
        values = torch.empty(out_features, device=device, dtype=dtype) if bias else None
        self.register_parameter("bias", None if values is None else nn.Parameter(values))
        self._tiles: TilesInt4 | None = None

    @classmethod
    def from_linear(cls, linear: nn.Linear, bits: int, group_size: int | None = None) -> QuantizedLinear:
        """The quantised form of a layer; it shares the bias with it."""
        weight = linear.weight
        quantized = cls(linear.in_features, linear.out_features, bits, group_size, device=weight.device)
        quantized.bias = linear.bias
        quantized.train(linear.training)
        quantized.quantize_weight_(weight.detach())
        return quantized

    @torch.no_grad()
    def quantize_weight_(self, weight: Tensor) -> None:
        """Takes the steps and scales of a floating weight [P, C], which may be on another device."""
        stored, scale = quantize(weight.to(self.weight.device), self.bits, self.group_size)
        self.weight.copy_(stored)
        self.scale.copy_(scale)
        self._make_tiles()

    def dequantized(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight [P, C] that it computes with."""
        return dequantize(self.weight, self.scale, dtype)

    def forward(self, x: Tensor) -> Tensor:
        """[..., C], floating -> [..., P] in the same dtype; in that of autocast where it is on, as a Linear's."""
        return quantized_linear(x, self.weight, self.scale, self.bias, self._tiles)

    def _make_tiles(self) -> None:
        self._tiles = int4_tiles(self.weight, self.scale) if self.bits == 4 else None

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        before = {"weight": self.weight, "scale": self.scale}
        super()._apply(fn, recurse)
        for name, old in before.items():
            new = getattr(self, name)
            if new.dtype != old.dtype:
                setattr(self, name, old.to(new.device))
        self._make_tiles()
        return self

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        weight, need = state_dict.get(prefix + "weight"), [self.out_features, self.in_features]
        if isinstance(weight, Tensor) and weight.is_floating_point():
            errors = args[-1]
            if list(weight.shape) != need:
                errors.append(f"{prefix}weight must be {need}, got {list(weight.shape)}")
                return
            if not self.weight.is_meta:
                weight = weight.to(self.weight.device)
            try:
                stored = quantize(weight, self.bits, self.group_size)
            except ValueError as error:
                errors.append(f"{prefix}weight: {error}")
                return
            state_dict[prefix + "weight"], state_dict[prefix + "scale"] = stored
        scale = state_dict.get(prefix + "scale")
        if isinstance(scale, Tensor):
            # load_state_dict(assign=True) takes the tensor as it is.
            state_dict[prefix + "scale"] = scale.to(torch.float32)
        super()._load_from_state_dict(state_dict, prefix, *args)
        self._make_tiles()

    def extra_repr(self) -> str:
        """What `print` says of it."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"bits={self.bits}, group_size={self.group_size}"
        )


ROWS[QuantizedLinear] = (("_buffers", "weight"), ("_parameters", "bias"), ("_buffers", "scale"))


class Quantized(NamedTuple):
    """What `quantize_` did.

    Attributes:
        replaced: names of the layers that are quantised now.
        left: name -> why it is not, of the other Linear layers.
    """

    replaced: list[str]
    left: dict[str, str]


def quantize_(module: nn.Module, bits: int, group_size: int | None = None, skip: Collection[str] = ()) -> Quantized:
    """Replaces the Linear layers inside a module by quantised ones, in place and one by one.

    The w2 of a JetBlock's convolution stays as it is: its weight enters an op. So do layers whose weight is read by a
    TransformerEncoderLayer, layers that are more than a Linear (adapters, parametrizations, hooks), and those that int4
    cannot divide into groups. What stays of joined layers gets memory of its own, and what is replaced of them frees
    its memory when all of a group has had its turn.

    Args:
        module: whose layers are replaced; not a Linear itself.
        bits: 8 or 4.
        group_size: see QuantizedLinear.
        skip: names of layers that stay, whole ("layers.0.mlp.up_proj") or from some dot on ("up_proj").

    Raises:
        ValueError: bits or group_size is wrong, or `skip` names no Linear layer; nothing has been replaced. Or a weight
            is not finite, which is found when its turn comes.
    """
    group_size = _checked_group_size(bits, group_size)
    report, places, unused = Quantized([], {}), deque[tuple[nn.Linear, list[Place]]](), set(skip)
    for linear, found in _linears(module):
        asked = {part for part in skip for place in found if f".{place.name}".endswith(f".{part}")}
        unused -= asked
        reasons = (_reason_to_leave(linear, place, group_size) for place in found)
        reason = "skip names it" if asked else next(filter(None, reasons), None)
        if reason is None:
            places.append((linear, found))
        else:
            report.left.update((place.name, reason) for place in found)
    if unused:
        raise ValueError(f"quantize_: skip must name Linear layers, got {', '.join(sorted(unused))}")
    while places:
        # Nothing here holds a layer that has been replaced: its memory is free for the next one.
        linear, found = places.popleft()
        try:
            quantized = QuantizedLinear.from_linear(linear, bits, group_size)
        except ValueError as error:
            raise ValueError(f"{found[0].name}: {error}") from None
        for place in found:
            setattr(place.parent, place.child, quantized)
            report.replaced.append(place.name)
    for child in module.modules():
        if isinstance(child, FusedProjections) and QuantizedLinear in map(type, child.projections().values()):
            child.fuse()
    release_(module)
    return report


class Place(NamedTuple):
    """Where a layer is used: `parent.child`, which a module calls `name`."""

    parent: nn.Module
    child: str
    name: str


def _linears(module: nn.Module) -> list[tuple[nn.Linear, list[Place]]]:
    """The Linear layers inside a module, each with all places where it is used."""
    found: dict[nn.Linear, list[Place]] = {}
    for path, parent in module.named_modules(remove_duplicate=False):
        for child, layer in parent._modules.items():
            if isinstance(layer, nn.Linear):
                found.setdefault(layer, []).append(Place(parent, child, f"{path}.{child}" if path else child))
    return list(found.items())


def _reason_to_leave(linear: nn.Linear, place: Place, group_size: int | None) -> str | None:
    if isinstance(place.parent, KernelGenerator) and place.child == "w2":
        return "its weight enters the convolution's op"
    if type(linear) is not nn.Linear:
        return f"it is a {type(linear).__qualname__}, not a torch.nn.Linear"
    if isinstance(place.parent, nn.TransformerEncoderLayer):
        return "a TransformerEncoderLayer reads its weight itself"
    if has_hooks(linear):
        return "it has hooks, or another forward"
    if not {"weight", "bias"} <= linear._parameters.keys():
        return "its weight and bias are not both parameters"
    if group_size is not None and linear.in_features % group_size:
        return f"its {linear.in_features} columns are no multiple of {group_size}"
    return None
