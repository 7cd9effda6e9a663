"""How parameters are trained: steps of AdamW, and the resumable, data-parallel training of the stages on them."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

from jetkernels._progress import progress
from jetkernels.modules import parameter_groups

from .checkpoints import load_state, save_state
from .data import Loader

FINAL_SHARE = 0.02  # of the peak learning rate, where a cosine ends
# For which ranks wait for each other: rank 0 alone scores unseen examples and writes reports while the others wait for
# the next stage. PyTorch's own 10 (nccl) or 30 minutes would end that. Of a rank that died torchrun ends the others.
PATIENCE = timedelta(days=1)


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


class Losses(list[float]):
    """The losses of a training, by step.

    Attributes:
        tokens: of a step, over all ranks.
        seconds: that the steps took, those of earlier runs included.
        held_out: (steps made, loss on held-out rows), where it was measured on the way.
    """

    tokens = 0
    seconds = 0.0

    def __init__(self, values: Iterable[float] = ()):
        super().__init__(values)
        self.held_out: list[tuple[int, float]] = []

    @property
    def all_tokens(self) -> int:
        """Of the whole training."""
        return len(self) * self.tokens

    @property
    def tokens_per_second(self) -> float:
        """Of the whole training."""
        return self.all_tokens / self.seconds if self.seconds else 0.0


class Trainer:
    """AdamW over parameters, a step at a time: what every training of this library, the demo's too, is made of.

    Under an initialised process group gradients and losses are averaged over the ranks.

    Args:
        parameters: what is trained. One without a gradient in a step is left alone in it.
        step_loss: number of the step -> scalar loss of this rank's rows; or scalars whose sum it is, each of which is
            given its gradients before the next is asked for, so that the memory of one is held at a time.
        weight_decay: of matrices (`parameter_groups`).
        clip: largest norm of the gradient.
        fused: use PyTorch's fused AdamW, which rounds differently.
        name: of the training, for errors.

    Attributes:
        optimizer: the AdamW.
        losses: of the steps so far.
    """

    def __init__(
        self,
        parameters: Iterable[nn.Parameter],
        step_loss: Callable[[int], Tensor | Iterable[Tensor]],
        *,
        weight_decay: float = 0.0,
        clip: float = 1.0,
        fused: bool | None = None,
        name: str = "training",
    ):
        self.name = name
        self.parameters = list(parameters)
        self.step_loss = step_loss
        self.clip = clip
        groups = parameter_groups(self.parameters, weight_decay)
        self.optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), fused=fused)
        self.losses = Losses()

    def step(self, learning_rate: float) -> float:
        """One step; returns its loss, which also ends `losses`.

        Raises:
            RuntimeError: the loss or the norm of the gradient is not finite; no parameter has changed.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        self.optimizer.zero_grad(set_to_none=True)
        loss = self.step_loss(len(self.losses))
        values = []
        for part in [loss] if isinstance(loss, Tensor) else loss:
            part.backward()
            values.append(part.detach())
        value = torch.stack(values).sum()
        if ranks()[1] > 1:
            average_([value, *(p.grad for p in self.parameters if p.grad is not None)])
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, self.clip)
        for what, number in (("loss", value.item()), ("norm of the gradient", norm.item())):
            if not math.isfinite(number):
                raise RuntimeError(f"{self.name}: the {what} of step {len(self.losses)} must be finite, got {number}")
        self.optimizer.step()
        self.losses.append(value.item())
        return self.losses[-1]


class Training:
    """A training that is killed and goes on; `train` runs one, `train_together` several.

    Args:
        stage: names the training; a checkpoint of another one is refused.
        parameters: what is trained, by name. One without a gradient in a step is left alone in it.
        step_loss: (token ids [rows, length] on the CPU, step) -> what `Trainer` takes, a mean over the rows.
        loader: of the rows.
        recipe: steps, learning rate and the like.
        facts: JSON values that the result depends on beside recipe and loader's sizes (model, data, options).
        checkpoint: file to resume from and to write to; None: no checkpoints.
        on_step: called after each step with its number and loss.
        held_out: the loss on held-out rows, which `Losses.held_out` gets; its time is not counted. None: none.
        held_out_every: steps between two of these; the last step has one in any case.

    Attributes:
        losses: of the steps so far.

    Raises:
        DifferentRun: the checkpoint is of a run that depends on something else.
        ValueError: the checkpoint is damaged, or of another stage.
    """

    def __init__(
        self,
        stage: str,
        parameters: Mapping[str, nn.Parameter],
        step_loss: Callable[[Tensor, int], Tensor | Iterable[Tensor]],
        loader: Loader,
        recipe: Recipe,
        facts: Mapping,
        checkpoint: str | Path | None = None,
        on_step: Callable[[int, float], None] | None = None,
        held_out: Callable[[], float] | None = None,
        held_out_every: int = 50,
    ):
        self.held_out, self.held_out_every = held_out, held_out_every
        self.stage, self.parameters, self.recipe, self.on_step = stage, parameters, recipe, on_step
        self.checkpoint = checkpoint
        rank, count = ranks()
        # By the names that the command line has for them; positions are one fewer than tokens.
        loading = {"batch": loader.batch_size, "length": loader.length - 1, "seed": loader.seed}
        self.run = {"facts": dict(facts), "recipe": recipe.facts(), **loading, "names": sorted(parameters)}
        self.trainer = Trainer(
            parameters.values(),
            lambda step: step_loss(loader.batch(step, rank, count), step),
            weight_decay=recipe.weight_decay,
            clip=recipe.clip,
            name=stage,
        )
        self.losses = self.trainer.losses
        self.losses.tokens = loader.batch_size * (loader.length - 1)
        if checkpoint is not None and Path(checkpoint).exists():
            self._load(checkpoint)

    def _load(self, checkpoint: str | Path) -> None:
        state = load_state(checkpoint, self.stage, self.run)
        self.losses += state["losses"]
        self.losses.seconds = state["seconds"]
        self.losses.held_out = [(step, loss) for step, loss in state.get("held_out", ())]
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(state["parameters"][name])
        self.trainer.optimizer.load_state_dict(state["optimizer"])

    def _save(self) -> None:
        if self.checkpoint is not None and ranks()[0] == 0:
            saved = {
                "parameters": {name: p.detach().cpu() for name, p in self.parameters.items()},
                "optimizer": self.trainer.optimizer.state_dict(),
                "losses": list(self.losses),
                "seconds": self.losses.seconds,
                "held_out": list(self.losses.held_out),
            }
            save_state(self.checkpoint, self.stage, self.run, saved)

    @property
    def done(self) -> bool:
        """Whether every step has been made."""
        return len(self.losses) >= self.recipe.steps

    def step(self) -> float:
        """The next step; returns its loss; raises what `Trainer.step` raises."""
        start, step = time.perf_counter(), len(self.losses)
        loss = self.trainer.step(self.recipe.rate(step))
        self.losses.seconds += time.perf_counter() - start
        if self.held_out is not None and (len(self.losses) % self.held_out_every == 0 or self.done):
            self.losses.held_out.append((len(self.losses), self.held_out()))
        if len(self.losses) % self.recipe.save_every == 0 or self.done:
            self._save()
        if self.on_step is not None:
            self.on_step(step, loss)
        return loss


def train_together(trainings: Sequence[Training]) -> None:
    """Runs trainings side by side, step by step: what a step computes of the rows alone can serve all of them."""
    steps, first = sum(training.recipe.steps for training in trainings), trainings[0]
    made = sum(len(training.losses) for training in trainings)
    start, tokens = time.perf_counter(), 0
    with progress(total=steps, initial=made, desc=first.stage, unit="step", disable=ranks()[0] > 0) as bar:
        while left := [training for training in trainings if not training.done]:
            least = min(len(training.losses) for training in left)
            for training in left:
                if len(training.losses) == least:  # one that was saved later waits for the others
                    loss, tokens = training.step(), tokens + training.losses.tokens
                    speed = tokens / (time.perf_counter() - start)
                    bar.set_postfix_str(f"loss {loss:.4f}, {speed:,.0f} tokens/s", refresh=False)
                    bar.update()


def train(
    stage: str,
    parameters: Mapping[str, nn.Parameter],
    step_loss: Callable[[Tensor, int], Tensor | Iterable[Tensor]],
    loader: Loader,
    recipe: Recipe,
    facts: Mapping,
    checkpoint: str | Path | None = None,
    on_step: Callable[[int, float], None] | None = None,
    held_out: Callable[[], float] | None = None,
    held_out_every: int = 50,
) -> Losses:
    """Trains `parameters` in place and returns the loss of every step; the arguments are those of `Training`.

    A run that was killed goes on from its last checkpoint and ends with the same parameters and losses, bitwise for the
    same machine, threads and number of ranks: batches and random paths depend on the step number only.
    Under an initialised process group each rank takes its rows of every batch, and gradients are averaged.

    Raises:
        DifferentRun, ValueError: as `Training` does.
        RuntimeError: a loss or a gradient is not finite.
    """
    training = Training(
        stage, parameters, step_loss, loader, recipe, facts, checkpoint, on_step, held_out, held_out_every
    )
    train_together([training])
    return training.losses


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
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=PATIENCE)


def wait_for_ranks() -> None:
    """Under `torchrun`, returns when every process has come here: what rank 0 wrote before can be read after."""
    if dist.is_initialized():
        dist.barrier()
