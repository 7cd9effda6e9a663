"""The norm of gradients that are divided over ranks in several ways."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate


@torch.no_grad()
def clip_grad_norm_(parameters: Iterable[Tensor], max_norm: float) -> Tensor:
    """Scales gradients so that their norm, all of them and all ranks taken together, is `max_norm` at most.

    `torch.nn.utils.clip_grad_norm_` takes DTensors of one mesh, or none. Here plain gradients, which are the same on
    every rank (`tensor_parallel_`), and DTensors of any mesh are taken together. Those of `context_parallel_` have to
    be summed first.

    Args:
        parameters: those without a gradient are left out.
        max_norm: of the gradients behind this call.

    Returns: the norm before it, fp32 (fp64 if a gradient is), the same on every rank.
    """
    found: list[tuple[tuple[dist.ProcessGroup, ...], Tensor]] = []
    for parameter in parameters:
        gradient = parameter.grad
        if isinstance(gradient, DTensor):
            if any(placement.is_partial() for placement in gradient.placements):
                gradient = parameter.grad = gradient.redistribute(placements=[Replicate()] * gradient.device_mesh.ndim)
            divided = [dim for dim, placement in enumerate(gradient.placements) if not placement.is_replicate()]
            groups = tuple(gradient.device_mesh.get_group(dim) for dim in divided)
            found.append((groups, gradient.to_local()))
        elif gradient is not None:
            found.append(((), gradient))
    if not found:
        return torch.zeros(())
    # One sum over the ranks for each way in which gradients are divided.
    squares: dict[tuple[dist.ProcessGroup, ...], Tensor] = {}
    for groups, gradient in found:
        wide = torch.promote_types(gradient.dtype, torch.float32)
        square = torch.linalg.vector_norm(gradient, dtype=wide).square()
        squares[groups] = squares[groups] + square if groups in squares else square
    for groups, square in squares.items():
        for group in groups:
            dist.all_reduce(square, group=group)
    norm = torch.stack([square.to(found[0][1].device) for square in squares.values()]).sum().sqrt()
    scale = (max_norm / (norm + 1e-6)).clamp(max=1.0)
    for _, gradient in found:
        gradient.mul_(scale.to(gradient.device))
    return norm
