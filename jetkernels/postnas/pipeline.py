"""The whole pipeline: every stage in order, each in a folder of its own, and a report over all of them."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, TypeVar

from jetkernels.model import JetNemotronForCausalLM, Tokenizer

from .comparisons import RESULT, BlocksStage, DesignStage, ShapesStage, placement_of, read_quality, read_result
from .costs import read_cost
from .hybrid import load_student
from .linear_path import JET, LinearPath
from .options import (
    DistillOptions,
    Integers,
    OutcomeOptions,
    QualityOptions,
    SearchOptions,
    ShapeOptions,
    SizeOptions,
    StageOptions,
    StartOptions,
)
from .precision import chosen_precision
from .report.overview import StageDone, write_overview
from .roadmap import Milestone, speed_of
from .stages import BaseStage, FinalStage, PlacementStage, load_base, scores_of
from .tasks import objective_of
from .training import ranks, wait_for_ranks

CARRIED = ("exportable", "best")  # what a candidate may be called that is not known yet
Stage = TypeVar("Stage", bound=StageOptions)
Value = TypeVar("Value")


def _given(value: Value | None, otherwise: Value) -> Value:
    return otherwise if value is None else value


@dataclass(frozen=True, kw_only=True)
class Pipeline(SizeOptions, SearchOptions, QualityOptions, ShapeOptions, DistillOptions, StartOptions, OutcomeOptions):
    """Every stage in order, each as its own command would run it, with that command's defaults where none is here.

    `steps` are those of a candidate. The super network gets twice as many, since a step trains about half of its paths,
    and both parts of stage 5 get as many, unless they are given their own. The grid of stage 4 keeps the state of
    `shape`.

    Attributes:
        output: folder for the folders of the stages, and for the report over all.
        base: folder of a base, or a GGUF file; None: there is none yet.
        pretrained: what `BaseStage` takes as the base; None: a small one is trained.
        FOR_TRAINING: names of the options that mean nothing where no base is trained.
        base_steps: of the training of the small base.
        placement_steps: of the super network.
        final_steps: of the distillation of stage 5.
        final_learning_rate: its peak in these.
        whole_steps: of the whole model in stage 5.
        whole_learning_rate: its peak in these; None: that of the distillation.
        linear_path: name of the block beside the attention of each layer in stage 1.
        block: that stages 3 and 4 go on with: a name; "best": that of stage 2; "exportable": the best of stage 2 that a
            model can be exported with. Stage 3 is left out where it is no JetBlock.
        design: that stage 4 goes on with, of stage 3, likewise.
    """

    NOT_REPORTED = (
        "base",
        "harness",
        "output",
        "prompts",
        "questions",
        "save_every",
        "text",
    )  # paths, and what changes no result

    FOR_TRAINING = ("layers", "hidden_size", "intermediate_size", "base_steps")

    base: Path | None = None
    pretrained: str | None = None
    steps: int = 300
    full: int = 1
    window: int = 1
    base_steps: int = 4000
    placement_steps: int | None = None
    final_steps: int | None = None
    final_learning_rate: float | None = None
    whole_steps: int | None = None
    whole_learning_rate: float | None = None
    seeds: int = 2
    linear_path: str = PlacementStage.linear_path
    block: str = "exportable"
    design: str = "exportable"

    def stages(self) -> dict[str, StageOptions]:
        """The stages by the names of their folders, in their order, as far as what they carry on is known.

        Until stage 2 has a result its block is taken for the JetBlock, and until stage 3 has one so is its design.
        """
        base = self.base or self.output / "base"
        shape, placement = self.shape, str(self.output / "placement")
        path = LinearPath(shape, self._carried("blocks", self.block))
        if path.block == JET:
            path = LinearPath(shape, design=self._carried("design", self.design))
        keys = Integers(sorted({max(1, shape.K // 2), shape.K, 2 * shape.K}))
        grid: dict[str, Any] = {"state": shape.state, "heads": Integers((shape.H, 2 * shape.H)), "keys": keys}
        grid |= {"blocks_folder": self.output / "blocks"}
        grid |= {"block": path.block, "design": path.design, "start": self.start if path.config() else "random"}
        model = self.output / "shapes" / "model"
        final: dict[str, Any] = {"base": base, "model": model, "placement_folder": Path(placement)}
        final |= {
            "steps": _given(self.final_steps, self.steps),
            "learning_rate": _given(self.final_learning_rate, self.learning_rate),
            "whole_steps": _given(self.whole_steps, self.steps),
        }
        placed = _given(self.placement_steps, 2 * self.steps)
        stages: dict[str, StageOptions] = {
            "base": self._base_stage(),
            "placement": self._stage("placement", PlacementStage, base=base, steps=placed),
            "blocks": self._stage("blocks", BlocksStage, base=base, placement=placement),
            "design": self._stage("design", DesignStage, base=base, placement=placement),
            "shapes": self._stage("shapes", ShapesStage, base=base, placement=placement, **grid),
            "final": self._stage("final", FinalStage, **final),
        }
        if self.base is not None:
            del stages["base"]
        if path.block != JET:
            del stages["design"]
        return stages

    def _base_stage(self) -> BaseStage:
        if self.pretrained is None:
            return self._stage("base", BaseStage, steps=self.base_steps, batch=BaseStage.batch)
        trained = {name: getattr(BaseStage, name) for name in BaseStage.FOR_TRAINING}
        return self._stage("base", BaseStage, **trained)

    def _carried(self, stage: str, choice: str) -> str:
        """The candidate of a stage that goes on: the one that was chosen, or the one that its result names."""
        folder = self.output / stage
        if choice not in CARRIED:
            return choice
        return (read_result(folder, choice) if (folder / RESULT).is_file() else None) or JET

    def _stage(self, name: str, kind: type[Stage], **others: Any) -> Stage:
        """The stage in the folder `name`: `others`, and what the pipeline is told, too."""
        told = {field.name for field in fields(self)} & {field.name for field in fields(kind)}
        return kind(**{each: getattr(self, each) for each in told} | {"output": self.output / name} | others)

    def _milestones(self, base: JetNemotronForCausalLM, tokenizer: Tokenizer) -> list[Milestone]:
        """The model behind each stage, as far as its quality is known: not behind stage 1 where none was exported."""
        corpus = self.corpus(tokenizer, base.config.vocab_size)
        task = next(task for task in self.tasks(corpus, tokenizer) if task.name == self.task)
        precision = chosen_precision(self.precision, base)

        def scored(model: JetNemotronForCausalLM) -> float:
            return objective_of(task.name, scores_of(model, [task], precision)[0], self.objective)

        def kept(stage: str, path: LinearPath, name: str) -> tuple[str, LinearPath, float | None]:
            return stage, path, read_quality(self.output / stage, name)

        stages, placed = self.stages(), self.output / "placement" / "model"
        shapes = stages["shapes"]
        assert isinstance(shapes, ShapesStage)
        best = read_result(shapes.output, "best")
        assert best is not None
        chosen = shapes.path_of(best)
        found: list[tuple[str, LinearPath | None, float | None]] = [
            ("base", None, scored(base)),
            (
                "placement",
                LinearPath(self.shape, self.linear_path),
                scored(load_student(placed, base)) if placed.is_dir() else None,
            ),
            kept("blocks", LinearPath(self.shape, shapes.block), shapes.block),
            kept("design", LinearPath(self.shape, shapes.block, shapes.design), shapes.design),
            kept("shapes", chosen, best),
            ("final", chosen, scored(load_student(self.output / "final" / "model", base))),
        ]
        placement = placement_of(str(self.output / "placement"))
        return [
            Milestone(
                stage,
                "attention everywhere" if path is None else f"{path}, {path.shape}",
                quality,
                speed_of(base, path, placement, self.window_size, self.context),
            )
            for stage, path, quality in found
            if quality is not None and stage in (*stages, "base")
        ]

    def run(self, run_stage: Callable[[StageOptions], str | None] = lambda stage: stage.run()) -> None:
        """Runs what is left to do of every stage, and writes report.md to `output`.

        Args:
            run_stage: runs a stage and returns what it found; for callers that check a stage first.
        """
        done: list[StageDone] = []
        # Asked for anew each time: what a stage is told may depend on what the one before it found.
        while left := [pair for pair in self.stages().items() if pair[0] not in {stage.name for stage in done}]:
            name, stage = left[0]
            if ranks()[0] == 0:
                print(f"== {name}", flush=True)
            start = time.perf_counter()
            found = run_stage(stage)
            wait_for_ranks()
            done.append(StageDone(name, found or "", time.perf_counter() - start, read_cost(stage.output)))
        if ranks()[0] == 0:
            base, tokenizer = load_base(self.base or self.output / "base", self.device)
            tokens = (self.layer_steps + self.steps) * self.batch * self.length
            none_trained = self.pretrained is not None or self.base is not None
            left_out = {*self.NOT_REPORTED, *(self.FOR_TRAINING if none_trained else ("pretrained",))}
            reported = sorted({field.name for field in fields(self)} - left_out)
            milestones = self._milestones(base, tokenizer)
            facts = self.named(reported)
            write_overview(self.output, base, done, tokens, self.seeds, milestones, self.quality, self.context, facts)
            print(f"report: {self.output}/report.md")
