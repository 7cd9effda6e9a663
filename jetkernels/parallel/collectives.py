"""Sums over the ranks of a group that gradients go through."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import Function


def _summed(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    y = x.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(y, group=group)
    return y


class _SumOutput(Function):
    """Sums over the ranks; every rank's part has the gradient of the sum."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        return _summed(x, group)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0], None


class _SumGradient(Function):
    """Passes x on; its gradient is the sum of the ranks'."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return _summed(gradients[0], ctx.group), None


def sum_over_ranks(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The sum of the ranks' x; each rank's x has the gradient of the sum."""
    return _SumOutput.apply(x, group)


def sum_gradients(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """x, which all ranks have alike; its gradient is the sum of theirs."""
    return _SumGradient.apply(x, group) if torch.is_grad_enabled() and x.requires_grad else x
