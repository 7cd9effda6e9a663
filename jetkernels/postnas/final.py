"""Stage 5: the found hybrid is trained on, first its token mixers by distillation, then the whole model on text."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from jetkernels.model import JetNemotronForCausalLM

from .base import next_token_loss, weights_digest
from .completions import Completion
from .data import Loader
from .precision import computing
from .tasks import Score
from .training import Losses, Recipe, train

BASE, BEFORE, AFTER = "base", "hybrid before", "hybrid after"  # the models that are scored
TEXT = "language modelling"  # the task whose loss is followed during the training


@dataclass(frozen=True)
class Outcome:
    """What stage 5 ends with.

    Attributes:
        layer_types: of the hybrid.
        linear: what its linear layers are, where no model can be exported with it; else None.
        scores: {model: {task: score}}, of BASE, BEFORE and AFTER.
        losses: of the distillation and of the training of the whole model, by step.
        completions: of prompts, by base and hybrid.
        context: tokens behind which both were timed.
        speeds: {model: (decode tokens per second of one sequence, bytes of its cache)}, of BASE and AFTER.
        files: folder of the trained hybrid.
    """

    layer_types: Sequence[str]
    linear: str | None
    scores: Mapping[str, Mapping[str, Score]]
    losses: tuple[Losses, Losses]
    completions: Sequence[Completion]
    context: int
    speeds: Mapping[str, tuple[float, int]]
    files: Path

    @property
    def curve(self) -> list[tuple[int, float]]:
        """(tokens that were trained on, loss on held-out text), from the start to the end of both trainings."""
        points = [(0, self.scores[BEFORE][TEXT].loss)]
        for part in self.losses:
            behind = points[-1][0]
            points += [(behind + steps * part.tokens, loss) for steps, loss in part.held_out]
        return points


def logit_distillation_loss(
    student: JetNemotronForCausalLM, teacher: JetNemotronForCausalLM, input_ids: Tensor, precision: str = "fp32"
) -> Tensor:
    """KL(teacher || student) of the next token, nats, mean over tokens; input_ids [B, T]."""
    with computing(precision, student.device):
        with torch.no_grad():
            wanted = teacher(input_ids).logits
        got = student(input_ids).logits
    wanted, got = (logits.float().log_softmax(-1) for logits in (wanted, got))
    return F.kl_div(got.flatten(0, 1), wanted.flatten(0, 1), reduction="batchmean", log_target=True)


def train_final(
    student: JetNemotronForCausalLM,
    base: JetNemotronForCausalLM,
    loader: Loader,
    distillation: Recipe,
    whole: Recipe,
    facts: Mapping,
    folder: str | Path | None = None,
    precision: str = "fp32",
    held_out: Callable[[], float] | None = None,
    held_out_every: int = 50,
) -> tuple[Losses, Losses]:
    """Trains a hybrid in place and returns the losses of both parts, by step.

    First, with embeddings, norms, MLPs and head frozen, every token mixer (JetBlock and attention) is distilled from
    the base's logits (`logit_distillation_loss`). Then all parameters are trained on the next token.

    Args:
        student: the hybrid, as an earlier stage exported it.
        base: its teacher.
        loader: of the rows of both parts.
        distillation: recipe of the first part.
        whole: recipe of the second part.
        facts: JSON values that the result depends on.
        folder: of the two checkpoints; None: none.
        precision: of products, "fp32" or "bf16" (`precision.computing`).
        held_out: the student's loss on held-out rows, asked for on the way (`training.Training`); None: never.
        held_out_every: steps between two of these.

    Raises:
        ValueError: student and base have different vocabularies.
    """
    if student.config.vocab_size != base.config.vocab_size:
        raise ValueError(
            f"student and base must have one vocabulary, got {student.config.vocab_size} and "
            f"{base.config.vocab_size} tokens"
        )
    paths = [None if folder is None else Path(folder) / name for name in ("distillation.ckpt", "whole.ckpt")]
    facts = dict(facts) | {"student": weights_digest(student), "base": weights_digest(base), "precision": precision}
    base.requires_grad_(False)
    student.requires_grad_(True)
    student.train()
    mixers = {name: p for name, p in student.named_parameters() if ".self_attn." in name}
    for name, parameter in student.named_parameters():
        parameter.requires_grad_(name in mixers)
    losses = train(
        "distillation",
        mixers,
        lambda rows, step: logit_distillation_loss(student, base, rows[:, :-1].to(student.device), precision),
        loader,
        distillation,
        facts,
        paths[0],
        held_out=held_out,
        held_out_every=held_out_every,
    )
    student.requires_grad_(True)
    facts |= {"distillation steps": distillation.steps, "distilled": weights_digest(student)}

    def whole_loss(rows: Tensor, step: int) -> Tensor:
        with computing(precision, student.device):
            return next_token_loss(student, rows)

    more = train(
        "whole model",
        dict(student.named_parameters()),
        whole_loss,
        loader,
        whole,
        facts,
        paths[1],
        held_out=held_out,
        held_out_every=held_out_every,
    )
    student.eval()
    return losses, more
