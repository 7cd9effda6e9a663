"""PostNAS (arXiv 2508.15884, section 2): search for the hybrid that a trained full-attention model becomes.

One subcommand per stage, and `all` for the pipeline. Each writes into its output folder a report (report.md with
plots), checkpoints from which the same command goes on after it was killed, and the model it made, if it makes one.
Runs in one process, or data-parallel under torchrun:

torchrun --standalone --nproc-per-node 2 -m jetkernels search placement ...
"""

import argparse
import sys
from collections.abc import Callable
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

import torch

from jetkernels.postnas import OBJECTIVES, join_ranks
from jetkernels.postnas.base import PACKAGES
from jetkernels.postnas.blocks import BLOCKS
from jetkernels.postnas.checkpoints import DifferentRun
from jetkernels.postnas.comparisons import BlocksStage, DesignStage, ShapesStage
from jetkernels.postnas.design import DESIGNS
from jetkernels.postnas.options import StageOptions
from jetkernels.postnas.pipeline import CARRIED, Pipeline
from jetkernels.postnas.precision import PRECISIONS
from jetkernels.postnas.stages import BaseStage, FinalStage, PlacementStage

from .options import default_device, device, integer, new_folder, number, seed
from .search_checks import check, explained, several, shape, told

Add = Callable[[argparse.ArgumentParser], None]


def stages() -> dict[str, tuple[str, Add, type[StageOptions]]]:
    """Name of a subcommand -> what it does, what adds its options, and what it runs; in the order of the pipeline."""
    return {
        "base": (
            "the full-attention model to start from: train a small one on real text, or take a pre-trained one",
            _add_base,
            BaseStage,
        ),
        "placement": (
            "stage 1: which layers keep full attention, which get a sliding window",
            _add_placement,
            PlacementStage,
        ),
        "blocks": ("stage 2: linear-attention blocks side by side, at equal cache", _add_blocks, BlocksStage),
        "design": ("stage 3: the JetBlock with one choice of its design changed at a time", _add_design, DesignStage),
        "shapes": (
            "stage 4: K, V and H of the JetBlocks, at equal cache and sufficient generation speed",
            _add_shapes,
            ShapesStage,
        ),
        "final": (
            "stage 5: train the found hybrid, first its token mixers by distillation, then all of it",
            _add_final,
            FinalStage,
        ),
        "all": (
            "the whole pipeline: every stage in order, each in a folder of its own below --output",
            _add_all,
            Pipeline,
        ),
    }


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds a subcommand for each stage; the defaults are those of the stages."""
    subcommands = parser.add_subparsers(dest="stage", metavar="stage")
    parser.set_defaults(usage=parser.print_help)
    for name, (summary, add, kind) in stages().items():
        stage = subcommands.add_parser(name, help=summary, description=summary)
        whole = kind is Pipeline
        where = "folder for the folders of the stages" if whole else "folder for model, report and checkpoints"
        stage.add_argument("--output", type=new_folder, required=True, help=where)
        if not whole:
            _add_training(stage)
        add(stage)
        stage.set_defaults(**_defaults(kind) | {"kind": kind, "device": default_device()})


def _defaults(kind: type[StageOptions]) -> dict[str, Any]:
    """The options of a stage that have a default, and it."""
    given = {field.name: field.default for field in fields(kind) if field.default is not MISSING}
    made = {field.name: field.default_factory() for field in fields(kind) if field.default_factory is not MISSING}
    return given | made


def _add_training(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--text", type=Path, help="folder of text files (default: the source of Python's standard library)"
    )
    parser.add_argument("--suffix", help="read only the files of --text whose names end so, such as .md")
    parser.add_argument("--steps", type=integer(), help="training steps (default %(default)s)")
    parser.add_argument("--learning-rate", type=number(0, 1000, above=True), help="peak (default %(default)s)")
    parser.add_argument(
        "--batch",
        type=integer(1, 2**16),
        help="rows of a training step, over all ranks (default %(default)s)",
    )
    parser.add_argument("--length", type=integer(1, 2**20), help="tokens of a row (default %(default)s)")
    parser.add_argument(
        "--task-share", type=number(0, 1, below=True), help="of the rows: recall and copying (default %(default)s)"
    )
    parser.add_argument("--distances", type=several(0, 2**20), help="of the recall task, tokens (default %(default)s)")
    parser.add_argument("--save-every", type=integer(1), help="steps between checkpoints (default %(default)s)")
    parser.add_argument(
        "--recompute", action="store_true", help="keep only layer inputs for the backward pass; less memory"
    )
    parser.add_argument("--device", type=device, help="cpu, cuda or cuda:N (default %(default)s)")
    parser.add_argument("--seed", type=seed)


def _add_base(parser: argparse.ArgumentParser) -> None:
    _add_pretrained(parser)
    _add_sizes(parser)


def _add_pretrained(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--pretrained",
        metavar="MODEL",
        help=f"take this one: {', '.join(PACKAGES)} (of an installed package); or a folder or a GGUF file of a Llama, "
        "Qwen2 or Qwen3 (default: train a small one)",
    )


def _add_sizes(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--layers", type=integer(1, 1000), help="of the small base (default %(default)s)")
    parser.add_argument("--hidden-size", type=integer(1, 2**16), help="of the small base (default %(default)s)")
    parser.add_argument("--intermediate-size", type=integer(1, 2**18), help="of the small base (default %(default)s)")


def _add_scoring(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--window-size", type=integer(1), help="tokens, the current one included (default %(default)s)")
    _add_tasks(parser)


def _add_objective(parser: argparse.ArgumentParser, of: str, does: str) -> None:
    """`--task`, which `does` this, and `--objective`; `of` stands in front of both names."""
    parser.add_argument(f"--{of}task", help=f"{does} (default %(default)s)")
    what = "what of it: minus the loss of the right answer, or accuracy (default %(default)s)"
    parser.add_argument(f"--{of}objective", choices=OBJECTIVES, help=what)


def _add_quality(parser: argparse.ArgumentParser) -> None:
    _add_objective(parser, "", "by which candidates are compared")
    parser.add_argument(
        "--seeds", type=integer(1, 1000), help="of every candidate; the tables hold means (default %(default)s)"
    )


def _add_placing(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--full", type=integer(0, 10**4), help="layers that keep full attention (default %(default)s)")
    parser.add_argument(
        "--window", type=integer(0, 10**4), help="layers that get sliding-window attention (default %(default)s)"
    )
    budgets = "other numbers of full layers, such as 1,2,4,7,12: the report has a curve over them (default: none)"
    parser.add_argument("--budgets", type=several(1, 10**4), help=budgets)
    _add_objective(parser, "full-", "that places full attention")
    _add_objective(parser, "window-", "that places windows")
    parser.add_argument("--width", type=integer(1, 10**6), help="of the beam (default %(default)s)")
    parser.add_argument("--exhaustive-up-to", type=integer(), help="evaluate all placements if no more than this")


def _add_precision(parser: argparse.ArgumentParser) -> None:
    what = "of products; auto: bf16 where the machine multiplies it faster and the base is not narrow"
    parser.add_argument("--precision", choices=PRECISIONS, help=f"{what} (default %(default)s)")


def _add_start(parser: argparse.ArgumentParser) -> None:
    what = "from what JetBlocks begin: random values, or (warm) the attention that they replace (default %(default)s)"
    parser.add_argument("--start", choices=("random", "warm"), help=what)


def _add_distilling(parser: argparse.ArgumentParser) -> None:
    _add_precision(parser)
    layers = "steps in front of --steps in which each path learns from the base's own input of its layer"
    parser.add_argument("--layer-steps", type=integer(), help=f"{layers} (default %(default)s)")
    parser.add_argument(
        "--train-attention", action="store_true", help="train a copy of the base's attention beside the linear paths"
    )


def _add_linear_path(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--linear-path", choices=BLOCKS, help="block beside the attention of each layer (default %(default)s)"
    )


def _add_tasks(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--examples", type=integer(1, 10**6), help="of each task, of recall at each distance (default %(default)s)"
    )
    sentences = "questions which sentence of the text comes next; another task (default %(default)s)"
    parser.add_argument("--continuations", type=integer(0, 10**6), help=sentences)
    parser.add_argument(
        "--questions", type=Path, action="append", help="JSON lines with query, choices, gold; another task"
    )
    parser.add_argument("--harness", action="append", help="NAME or NAME:METRIC of lm-evaluation-harness; another task")
    parser.add_argument("--harness-limit", type=integer(1), help="questions of each such task (default: all)")


def _add_search(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--base", type=Path, required=True, help="folder of `search base`, or folder or GGUF file of a published model"
    )
    _add_scoring(parser)


def _add_placement(parser: argparse.ArgumentParser) -> None:
    _add_search(parser)
    _add_placing(parser)
    _add_linear_path(parser)
    _add_start(parser)
    _add_distilling(parser)
    _add_shape(parser)


def _add_shape(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--shape", type=shape, help="KxVxH of the JetBlocks (default %(default)s)")


def _add_comparison(parser: argparse.ArgumentParser) -> None:
    _add_search(parser)
    parser.add_argument(
        "--placement", required=True, help="folder of `search placement`, or the layers: 'jet attn jet ...'"
    )
    _add_quality(parser)
    _add_distilling(parser)
    parser.add_argument(
        "--together",
        type=integer(1, 1000),
        help="candidates trained side by side, for which the base computes once; more memory (default %(default)s)",
    )
    parser.add_argument(
        "--speed-batch", type=integer(1, 2**16), help="sequences of the speed measurement (default %(default)s)"
    )
    parser.add_argument("--speed-prompt", type=integer(1, 2**20), help="tokens of its prompts (default %(default)s)")
    parser.add_argument(
        "--speed-tokens", type=integer(1, 2**20), help="generated tokens that are timed (default %(default)s)"
    )


def _add_blocks(parser: argparse.ArgumentParser) -> None:
    _add_comparison(parser)
    _add_shape(parser)
    equal = "what the other blocks have like it: the recurrent state, or the parameters (V then differs); "
    parser.add_argument("--equal", choices=("state", "parameters"), help=f"{equal}default %(default)s")
    parser.add_argument(
        "--only", action="append", choices=BLOCKS, help="compare only this block; may be repeated (default: all)"
    )


def _add_design(parser: argparse.ArgumentParser) -> None:
    _add_comparison(parser)
    _add_shape(parser)
    parser.add_argument(
        "--only", action="append", choices=DESIGNS, help="compare only this variant; may be repeated (default: all)"
    )


def _add_shapes(parser: argparse.ArgumentParser) -> None:
    _add_comparison(parser)
    _add_start(parser)
    parser.add_argument("--block", choices=BLOCKS, help="whose sizes are searched (default %(default)s)")
    parser.add_argument("--design", choices=DESIGNS, help="of the JetBlock (default: its own)")
    parser.add_argument(
        "--state", type=integer(1, 2**40), help="elements of state per block: K*V*H (default %(default)s)"
    )
    parser.add_argument("--heads", type=several(1, 2**16), help="H to try (default %(default)s)")
    parser.add_argument("--keys", type=several(1, 2**16), help="K to try; V follows (default %(default)s)")
    parser.add_argument(
        "--blocks-folder", type=Path, help="of `search blocks`: its JetBlock is a line in the picture (default: none)"
    )
    limit = parser.add_mutually_exclusive_group()
    limit.add_argument("--min-throughput", type=number(0), help="generated tokens per second that a shape must reach")
    limit.add_argument(
        "--min-share", type=number(0, 1), help="the same as a share of the fastest shape's (default %(default)s)"
    )


def _add_final(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--base", type=Path, required=True, help="folder of the base, the teacher")
    parser.add_argument("--model", type=Path, required=True, help="folder of the hybrid that an earlier stage left")
    parser.add_argument(
        "--placement-folder", type=Path, help="of `search placement`: the report compares its budgets (default: none)"
    )
    parser.add_argument("--whole-steps", type=integer(), help="steps of the whole model, after --steps of distillation")
    rate = "peak in these (default: --learning-rate)"
    parser.add_argument("--whole-learning-rate", type=number(0, 1000, above=True), help=rate)
    _add_outcome(parser)
    _add_precision(parser)
    _add_tasks(parser)


def _add_outcome(parser: argparse.ArgumentParser) -> None:
    every = "steps between two losses on held-out text in the final training (default %(default)s)"
    parser.add_argument("--evaluate-every", type=integer(1), help=every)
    prompts = "file of prompts that base and hybrid complete in the report, one a line (default: four of its own)"
    parser.add_argument("--prompts", type=Path, help=prompts)
    context = "tokens behind which decoding of base and hybrid is timed (default %(default)s)"
    parser.add_argument("--context", type=integer(1, 2**24), help=context)


def _add_all(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--base", type=Path, help="folder of a base, from which the search goes on")
    _add_pretrained(parser)
    _add_placing(parser)
    _add_linear_path(parser)
    _add_start(parser)
    for stage, names in (("block", BLOCKS), ("design", DESIGNS)):
        what = f"{stage} that the next stages get: a name, the best one, or the best that a model can be exported with"
        parser.add_argument(f"--{stage}", choices=(*CARRIED, *names), help=f"{what} (default %(default)s)")
    _add_quality(parser)
    _add_distilling(parser)
    _add_shape(parser)
    parser.add_argument(
        "--base-steps", type=integer(), help="training steps of the small base, on 16 rows each (default %(default)s)"
    )
    own = {
        "placement-steps": "training steps of stage 1's super network (default: twice --steps)",
        "final-steps": "steps of distillation in stage 5 (default: --steps)",
        "whole-steps": "steps of the whole model in stage 5 (default: --steps)",
    }
    for name, what in own.items():
        parser.add_argument(f"--{name}", type=integer(), help=what)
    for part, otherwise in (("final", "--learning-rate"), ("whole", "that of its distillation")):
        what = f"peak in these {part} steps (default: {otherwise})"
        parser.add_argument(f"--{part}-learning-rate", type=number(0, 1000, above=True), help=what)
    _add_outcome(parser)
    _add_sizes(parser)
    _add_training(parser)
    _add_scoring(parser)


def run_stage(stage: StageOptions) -> str | None:
    """Checks a stage and runs it; a checkpoint of another run is explained in the words of the command line."""
    check(stage)
    try:
        if isinstance(stage, Pipeline):
            stage.run(run_stage)
            return None
        return stage.run()
    except DifferentRun as error:
        raise ValueError(explained(error, stage)) from error


def run(arguments: argparse.Namespace) -> int:
    """Runs the stage that was named, under `torchrun` on all of its processes."""
    if arguments.stage is None:
        arguments.usage(sys.stderr)
        return 2
    join_ranks(torch.device(arguments.device))
    run_stage(told(arguments.kind, arguments))
    return 0
