"""``bindings/linear_inputs.h`` for fake tensors: in the same order and words."""

from typing import Any

import torch
from torch import Tensor

from jetkernels.ops._checks import Checks


def check_rows(checks: Checks, x: Tensor) -> None:
    """Of x [..., C]; binds C."""
    if x is None:
        checks.fail("x must be a Tensor, got None")
    if not 1 <= x.dim() <= 8:
        shape = ",".join(map(str, x.shape))
        checks.fail(f"x must have 1 to 8 dimensions [...,C], got {x.dim()} with shape [{shape}]")
    checks.floating("x", x)
    checks.bind("C", x.shape[-1], "as in x")


def check_scale(checks: Checks, a: Any, unit: int) -> None:
    """Of scale [P, G], in groups of a multiple of ``unit`` columns; binds G."""
    checks.shape("scale", a.scale, "P", "G")
    checks.dtype("scale", a.scale, torch.float32)
    checks.device("scale", a.scale, "x", a.x)
    C, G = checks.size["C"], checks.size["G"]
    divides = f"scale dimension 1 (G) must divide C = {C} (as in x), got {G}"
    checks.require(G >= 1, divides)
    checks.require(C % G == 0, divides)
    checks.require(
        C // G % unit == 0,
        f"scale dimension 1 (G) must give groups of a multiple of {unit} columns, got {C // G} = C / G",
    )


def check_bias(checks: Checks, a: Any) -> None:
    """Of bias [P] or None."""
    if a.bias is None:
        return
    checks.shape("bias", a.bias, "P")
    checks.dtype_like("bias", a.bias, "x", a.x)
    checks.device("bias", a.bias, "x", a.x)


def outputs(checks: Checks, a: Any) -> Tensor:
    """Makes y [..., P]."""
    return a.x.new_empty((*a.x.shape[:-1], checks.size["P"]))
