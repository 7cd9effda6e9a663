"""How parameters are trained: steps of AdamW, and the resumable, data-parallel training of the stages on them."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

from jetkernels._progress import progress
from jetkernels.modules import parameter_groups

from .checkpoints import load_state, save_state
from .data import Loader

FINAL_SHARE = 0.02  # of the peak learning rate, where a cosine ends


def cosine(done: float, whole: float = 1.0, final_share: float = FINAL_SHARE) -> float:
    """The share of the peak learning rate when `done` of a `whole` training is behind it: from 1 to `final_share`."""
    return final_share + (1 - final_share) * (0.5 * (1 + math.cos(math.pi * done / whole)))


def warm_up(step: int, steps: int) -> float:
    """The share of the learning rate in step `step`, counted from 0, of a training that warms up for `steps`."""
    return min(1.0, (step + 1) / max(1, steps))


@dataclass(frozen=True)
class Recipe:
    """How parameters are trained.

    Attributes:
        steps: optimiser steps.
        learning_rate: peak, after `warmup` steps, then a cosine down to final_share of it.
        warmup: steps in which the learning rate rises.
        final_share: of the learning rate, at the end.
        weight_decay: of matrices (`parameter_groups`).
        clip: largest norm of the gradient.
        save_every: steps between two checkpoints.
    """

    steps: int
    learning_rate: float = 1e-3
    warmup: int = 20
    final_share: float = FINAL_SHARE
    weight_decay: float = 0.0
    clip: float = 1.0
    save_every: int = 50

    def __post_init__(self) -> None:
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
        share = cosine(step, max(1, self.steps), self.final_share)
        return self.learning_rate * warm_up(step, self.warmup) * share


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


class Trainer:
    """AdamW over parameters, a step at a time: what every training of this library, the demo's too, is made of.

    Under an initialised process group gradients and losses are averaged over the ranks.

    Args:
        parameters: what is trained. One without a gradient in a step is left alone in it.
        step_loss: number of the step -> scalar loss of this rank's rows.
        weight_decay: of matrices (`parameter_groups`).
        clip: largest norm of the gradient.
        fused: use PyTorch's fused AdamW, which rounds differently.

    Attributes:
        optimizer: the AdamW.
        losses: of the steps so far.
    """

    def __init__(
        self,
        parameters: Iterable[nn.Parameter],
        step_loss: Callable[[int], Tensor],
        *,
        weight_decay: float = 0.0,
        clip: float = 1.0,
        fused: bool | None = None,
    ):
        self.parameters = list(parameters)
        self.step_loss = step_loss
        self.clip = clip
        groups = parameter_groups(self.parameters, weight_decay)
        self.optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), fused=fused)
        self.losses: list[float] = []

    def step(self, learning_rate: float) -> float:
        """One step; returns its loss, which also ends `losses`."""
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        self.optimizer.zero_grad(set_to_none=True)
        loss = self.step_loss(len(self.losses))
        loss.backward()
        value = loss.detach().clone()
        if ranks()[1] > 1:
            average_([value, *(p.grad for p in self.parameters if p.grad is not None)])
        torch.nn.utils.clip_grad_norm_(self.parameters, self.clip)
        self.optimizer.step()
        self.losses.append(value.item())
        return self.losses[-1]


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
        loader: of the rows.
        recipe: steps, learning rate and the like.
        facts: JSON values that the result depends on beside recipe and loader's sizes (model, data, options).
        checkpoint: file to resume from and to write to; None: no checkpoints.
        on_step: called after each step with its number and loss.

    Raises:
        DifferentRun: the checkpoint is of a run that depends on something else.
        ValueError: the checkpoint is damaged, or of another stage.
        RuntimeError: a loss is not finite.
    """
    rank, count = ranks()
    # By the names that the command line has for them; positions are one fewer than tokens.
    loading = {"batch": loader.batch_size, "length": loader.length - 1, "seed": loader.seed}
    run = {"facts": dict(facts), "recipe": recipe.facts(), **loading, "names": sorted(parameters)}
    trainer = Trainer(
        parameters.values(),
        lambda step: step_loss(loader.batch(step, rank, count), step),
        weight_decay=recipe.weight_decay,
        clip=recipe.clip,
    )
    losses = trainer.losses
    if checkpoint is not None and Path(checkpoint).exists():
        state = load_state(checkpoint, stage, run)
        losses += state["losses"]
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(state["parameters"][name])
        trainer.optimizer.load_state_dict(state["optimizer"])

    def save() -> None:
        if checkpoint is not None and rank == 0:
            values = {name: p.detach().cpu() for name, p in parameters.items()}
            saved = {"parameters": values, "optimizer": trainer.optimizer.state_dict(), "losses": losses}
            save_state(checkpoint, stage, run, saved)

    with progress(total=recipe.steps, initial=len(losses), desc=stage, unit="step", disable=rank > 0) as bar:
        for step in range(len(losses), recipe.steps):
            loss = trainer.step(recipe.rate(step))
            if not math.isfinite(loss):
                raise RuntimeError(f"{stage}: the loss of step {step} must be finite, got {loss}")
            bar.set_postfix_str(f"loss {loss:.4f}", refresh=False)
            bar.update()
            if len(losses) % recipe.save_every == 0 or len(losses) == recipe.steps:
                save()
            if on_step is not None:
                on_step(step, loss)
    return losses


def join_ranks(device: torch.device) -> None:
    """Under `torchrun`, joins its processes (nccl for CUDA devices, else gloo); alone, does nothing.

    Args:
        device: of the training; "cuda" means one of its own for each process of a machine.

    Raises:
        ValueError: one CUDA device is named for all processes.
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
