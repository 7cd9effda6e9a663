"""``jet::dynamic_conv_step``: one token per sequence, the convolution state updated in place."""

from typing import Any

import torch
from torch import Tensor

from jetkernels.ops import _register
from jetkernels.ops._checks import Checks
from jetkernels.plain import dynamic_conv_step as plain


def _fake(checks: Checks, a: Any) -> Tensor:
    checks.shape("x", a.x, "N", "D")
    checks.floating("x", a.x)
    checks.shape("hidden", a.hidden, "N", "R")
    checks.generator(a)
    checks.shape("conv_state", a.conv_state, "P", "D", "W-1")
    checks.like("conv_state", a.conv_state, "x", a.x)
    checks.state_rows(a.state_indices, "x", a.x)
    checks.written("conv_state", a.conv_state)
    return a.x.new_empty(a.x.shape)


_register.define(
    "dynamic_conv_step",
    "(Tensor x, Tensor hidden, Tensor weight, Tensor? bias, Tensor(a!) conv_state, Tensor? state_indices, bool silu) "
    "-> Tensor",
    fake=_fake,
    plain=plain.dynamic_conv_step,
)
_register.in_place("dynamic_conv_step", instead="dynamic_conv")
_register.autocast("dynamic_conv_step", low_precision=("x", "hidden", "weight", "bias"), dtype_of="conv_state")
_op = torch.ops.jet.dynamic_conv_step.default


def dynamic_conv_step_(
    x: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    conv_state: Tensor,
    state_indices: Tensor | None = None,
    activation: str | None = "silu",
) -> Tensor:
    """One step of :func:`dynamic_conv` per sequence, shifting ``conv_state`` in place.

    For decode, under ``torch.no_grad()``: not differentiable.

    Args:
        x: [N, D], the new inputs.
        hidden: [N, R].
        weight: [D * W, R].
        bias: [D * W] or ``None``.
        conv_state: [P, D, W - 1] pool, oldest input first; rows that no index names stay untouched.
        state_indices: [N] int32 or int64, the pool row of each sequence; a negative index touches no state and gives
            a zero output row. ``None`` means row n for sequence n.
        activation: ``"silu"``, ``"swish"`` or ``None``.

    Returns:
        y [N, D].

    Raises:
        RuntimeError: as :func:`dynamic_conv`; also for an index out of range or named twice (checked on a CPU, and on
            CUDA under ``JETKERNELS_CHECK=1``); the pool overlaps itself or another argument. The pool is untouched
            then. With gradients on, an input that requires one: the op writes in place and is not differentiable.
        TypeError, ValueError: as :func:`dynamic_conv`.
        NotImplementedError: an input has a tangent (forward mode).
    """
    silu = _register.use_silu("dynamic_conv_step_", activation)
    try:
        return _op(x, hidden, weight, bias, conv_state, state_indices, silu)
    except RuntimeError as error:
        raise _register.refusal(error, "dynamic_conv_step_") from None
