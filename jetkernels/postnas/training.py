"""One training loop for the whole search: AdamW over named parameters, resumable, data-parallel."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

from jetkernels._progress import progress
from jetkernels.modules import parameter_groups

from .checkpoints import load_state, save_state
from .data import Loader


@dataclass(frozen=True)
class Recipe:
    """How parameters are trained.

    steps: optimiser steps.  learning_rate: peak, after `warmup` steps, then a cosine down to final_share of it.
    weight_decay: of matrices (`parameter_groups`).  clip: largest norm of the gradient.
    save_every: steps between two checkpoints.
    """

    steps: int
    learning_rate: float = 1e-3
    warmup: int = 20
    final_share: float = 0.02
    weight_decay: float = 0.0
    clip: float = 1.0
    save_every: int = 50

    def __post_init__(self):
        for name in ("steps", "warmup"):
            if getattr(self, name) < 0:
                raise ValueError(f"recipe: {name} must be at least 0, got {getattr(self, name)}")
        if self.save_every < 1 or not self.learning_rate > 0 or not self.clip > 0:
            raise ValueError(
                "recipe: save_every must be at least 1, learning_rate and clip positive, got "
                f"{self.save_every}, {self.learning_rate} and {self.clip}"
            )

    def facts(self) -> dict:
        """What the result depends on: everything but how often it is saved."""
        return {name: value for name, value in asdict(self).items() if name != "save_every"}

    def rate(self, step: int) -> float:
        """Learning rate of step `step`, counted from 0."""
        cosine = 0.5 * (1 + math.cos(math.pi * step / max(1, self.steps)))
        return (
            self.learning_rate
            * min(1.0, (step + 1) / max(1, self.warmup))
            * (self.final_share + (1 - self.final_share) * cosine)
        )


def ranks() -> tuple[int, int]:
    """(this process's rank, number of ranks): (0, 1) outside `torchrun`."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def average_(tensors: list[Tensor]) -> None:
    """Replaces each tensor by its mean over the ranks, in place, in one exchange per dtype."""
    by_dtype: dict[torch.dtype, list[Tensor]] = {}
    for tensor in tensors:
        by_dtype.setdefault(tensor.dtype, []).append(tensor)
    for group in by_dtype.values():
        flat = torch.cat([t.flatten() for t in group])
        dist.all_reduce(flat)
        flat /= dist.get_world_size()
        for tensor, part in zip(group, flat.split([t.numel() for t in group])):
            tensor.copy_(part.view_as(tensor))


def train(
    stage: str,
    parameters: Mapping[str, nn.Parameter],
    step_loss: Callable[[Tensor, int], Tensor],
    loader: Loader,
    recipe: Recipe,
    facts: Mapping,
    checkpoint: str | Path | None = None,
    on_step: Callable[[int, float], None] | None = None,
) -> list[float]:
    """Trains `parameters` in place and returns the loss of every step.

    A run that was killed goes on from its last checkpoint and ends with the same parameters and losses, bitwise for the
    same machine, threads and number of ranks: batches and random paths depend on the step number only.
    Under an initialised process group each rank takes its rows of every batch, and gradients are averaged.

    Args:
        stage: names the training; a checkpoint of another one is refused.
        parameters: what is trained, by name. One without a gradient in a step is left alone in it.
        step_loss: (token ids [rows, length] on the CPU, step) -> scalar loss, mean over the rows.
        facts: JSON values that the result depends on beside recipe and loader's sizes (model, data, options).
        checkpoint: file to resume from and to write to; None: no checkpoints.
        on_step: called after each step with its number and loss.
    """
    rank, count = ranks()
    # By the names that the command line has for them; positions are one fewer than tokens.
    loading = {"batch": loader.batch_size, "length": loader.length - 1, "seed": loader.seed}
    run = {"facts": dict(facts), "recipe": recipe.facts(), **loading, "names": sorted(parameters)}
    groups = parameter_groups(parameters.values(), recipe.weight_decay)
    optimizer = torch.optim.AdamW(groups, lr=recipe.learning_rate, betas=(0.9, 0.95))
    losses: list[float] = []
    if checkpoint is not None and Path(checkpoint).exists():
        state = load_state(checkpoint, stage, run)
        losses = state["losses"]
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(state["parameters"][name])
        optimizer.load_state_dict(state["optimizer"])

    def save() -> None:
        if checkpoint is not None and rank == 0:
            values = {name: p.detach().cpu() for name, p in parameters.items()}
            save_state(
                checkpoint, stage, run, {"parameters": values, "optimizer": optimizer.state_dict(), "losses": losses}
            )

    with progress(total=recipe.steps, initial=len(losses), desc=stage, unit="step", disable=rank > 0) as bar:
        for step in range(len(losses), recipe.steps):
            for group in optimizer.param_groups:
                group["lr"] = recipe.rate(step)
            optimizer.zero_grad(set_to_none=True)
            loss = step_loss(loader.batch(step, rank, count), step)
            loss.backward()
            value = loss.detach().clone()
            if count > 1:
                average_([value, *(p.grad for p in parameters.values() if p.grad is not None)])
            torch.nn.utils.clip_grad_norm_(parameters.values(), recipe.clip)
            optimizer.step()
            losses.append(value.item())
            if not math.isfinite(losses[-1]):
                raise RuntimeError(f"{stage}: the loss of step {step} must be finite, got {losses[-1]}")
            bar.set_postfix_str(f"loss {losses[-1]:.4f}", refresh=False)
            bar.update()
            if len(losses) % recipe.save_every == 0 or len(losses) == recipe.steps:
                save()
            if on_step is not None:
                on_step(step, losses[-1])
    return losses


def join_ranks(device: torch.device) -> None:
    """Under `torchrun`, joins its processes (nccl for CUDA devices, else gloo); alone, does nothing.

    "cuda" then means a device of its own for each process of a machine; ValueError if one is named for all.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or dist.is_initialized():
        return
    if device.type == "cuda":
        if device.index is not None:
            raise ValueError(f"device must be cuda, without a number, for several ranks, got {device}")
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")


def wait_for_ranks() -> None:
    """Under `torchrun`, returns when every process has come here: what rank 0 wrote before can be read after."""
    if dist.is_initialized():
        dist.barrier()
