"""PostNAS (arXiv 2508.15884, section 2): search for the hybrid that a trained full-attention model becomes.

One subcommand per stage, and `all` for the pipeline. Each writes into its output folder a report (report.md with
plots), checkpoints from which the same command goes on after it was killed, and the model it made, if it makes one.
Runs in one process, or data-parallel under torchrun:

torchrun --standalone --nproc-per-node 2 -m jetkernels search placement ...
"""

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from jetkernels.postnas import OBJECTIVES, join_ranks, ranks
from jetkernels.postnas.blocks import BLOCKS
from jetkernels.postnas.checkpoints import DifferentRun
from jetkernels.postnas.design import DESIGNS
from jetkernels.postnas.overview import StageDone, write_overview
from jetkernels.postnas.training import wait_for_ranks

from .options import default_device, device, integer, integers, new_folder, number, seed
from .search_checks import check, explained, shape, shape_of
from .search_stages import (
    NOT_TRAINING,
    load_base,
    run_base,
    run_blocks,
    run_design,
    run_final,
    run_placement,
    run_shapes,
)

# Options that no training depends on and that the report of `search all` names.
REPORTED = {"full", "window", "window_size", "objective", "examples", "seeds"}


def stages() -> dict[str, tuple[str, Callable, Callable]]:
    """Name of a stage -> what it does, adds its options, runs it; in the order of the pipeline."""
    return {
        "base": ("train a small full-attention model on real text, to search on a CPU", _add_base, run_base),
        "placement": (
            "stage 1: which layers keep full attention, which get a sliding window",
            _add_placement,
            run_placement,
        ),
        "blocks": ("stage 2: linear-attention blocks side by side, at equal cache", _add_blocks, run_blocks),
        "design": ("stage 3: the JetBlock with one choice of its design changed at a time", _add_design, run_design),
        "shapes": (
            "stage 4: K, V and H of the JetBlocks, at equal cache and sufficient generation speed",
            _add_shapes,
            run_shapes,
        ),
        "final": (
            "stage 5: train the found hybrid, first its token mixers by distillation, then all of it",
            _add_final,
            run_final,
        ),
    }


def add_arguments(parser: argparse.ArgumentParser) -> None:
    subcommands = parser.add_subparsers(dest="stage", metavar="stage")
    parser.set_defaults(usage=parser.print_help)
    for name, (summary, add, function) in stages().items():
        stage = subcommands.add_parser(name, help=summary, description=summary)
        stage.add_argument("--output", type=new_folder, required=True, help="folder for model, report and checkpoints")
        _add_training(stage)
        add(stage)
        stage.set_defaults(stage_run=function)
    summary = "the whole pipeline: every stage in order, each in a folder of its own below --output"
    whole = subcommands.add_parser("all", help=summary, description=summary)
    whole.add_argument("--output", type=new_folder, required=True, help="folder for the folders of the stages")
    whole.add_argument("--base", type=Path, help="folder of a base (default: train a small one)")
    whole.add_argument("--full", type=integer(0, 10**4), default=1, help="layers that keep full attention (default 1)")
    whole.add_argument(
        "--window", type=integer(0, 10**4), default=1, help="layers that get sliding-window attention (default 1)"
    )
    _add_shape(whole)
    whole.add_argument(
        "--base-steps",
        type=integer(),
        default=4000,
        help="training steps of the small base, on 16 rows each (default 4000)",
    )
    whole.add_argument(
        "--seeds", type=integer(1, 1000), default=2, help="of every candidate of stages 2 to 4 (default 2)"
    )
    _add_sizes(whole)
    _add_training(whole)
    _add_scoring(whole)
    whole.set_defaults(stage_run=run_all, steps=300)


def _add_training(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--text", type=Path, help="folder of text files (default: the source of Python's standard library)"
    )
    parser.add_argument("--suffix", default="", help="read only the files of --text whose names end so, such as .md")
    parser.add_argument("--steps", type=integer(), default=500, help="training steps (default %(default)s)")
    parser.add_argument("--learning-rate", type=number(0, 1000, above=True), default=3e-3, help="peak (default 0.003)")
    parser.add_argument(
        "--batch",
        type=integer(1, 2**16),
        default=8,
        help="rows of a training step, over all ranks (default %(default)s)",
    )
    parser.add_argument("--length", type=integer(1, 2**20), default=128, help="tokens of a row (default 128)")
    parser.add_argument(
        "--task-share", type=number(0, 1, below=True), default=0.5, help="of the rows: recall and copying (default 0.5)"
    )
    parser.add_argument(
        "--distances", type=integers(0, 2**20), default="8,24,48", help="of the recall task, tokens (default 8,24,48)"
    )
    parser.add_argument("--save-every", type=integer(1), default=50, help="steps between checkpoints (default 50)")
    parser.add_argument(
        "--recompute", action="store_true", help="keep only layer inputs for the backward pass; less memory"
    )
    parser.add_argument(
        "--device", type=device, default=default_device(), help="cpu, cuda or cuda:N (default %(default)s)"
    )
    parser.add_argument("--seed", type=seed, default=0)


def _add_base(parser: argparse.ArgumentParser) -> None:
    _add_sizes(parser)
    parser.set_defaults(steps=4000, batch=16)


def _add_sizes(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--layers", type=integer(1, 1000), default=6, help="of the small base (default 6)")
    parser.add_argument("--hidden-size", type=integer(1, 2**16), default=96, help="of the small base (default 96)")
    parser.add_argument(
        "--intermediate-size", type=integer(1, 2**18), default=256, help="of the small base (default 256)"
    )


def _add_scoring(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--window-size", type=integer(1), default=32, help="tokens, the current one included (default 32)"
    )
    parser.add_argument(
        "--objective", choices=OBJECTIVES, default="loss", help="minus the loss of the right answer, or accuracy"
    )
    _add_tasks(parser)


def _add_tasks(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--examples", type=integer(1, 10**6), default=64, help="of each task, of recall at each distance (default 64)"
    )
    parser.add_argument(
        "--questions", type=Path, action="append", default=[], help="JSON lines with query, choices, gold; another task"
    )
    parser.add_argument(
        "--harness", action="append", default=[], help="NAME or NAME:METRIC of lm-evaluation-harness; another task"
    )
    parser.add_argument("--harness-limit", type=integer(1), help="questions of each such task (default: all)")


def _add_search(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--base", type=Path, required=True, help="folder of a Qwen2/Qwen2.5 checkpoint, or of `search base`"
    )
    _add_scoring(parser)


def _add_placement(parser: argparse.ArgumentParser) -> None:
    _add_search(parser)
    parser.add_argument("--full", type=integer(0, 10**4), default=2, help="layers that keep full attention (default 2)")
    parser.add_argument(
        "--window", type=integer(0, 10**4), default=0, help="layers that get sliding-window attention (default 0)"
    )
    parser.add_argument("--full-task", default="recall", help="task that places full attention (default recall)")
    parser.add_argument("--window-task", default="language modelling", help="task that places windows")
    parser.add_argument("--width", type=integer(1, 10**6), default=4, help="of the beam (default 4)")
    parser.add_argument(
        "--exhaustive-up-to", type=integer(), default=64, help="evaluate all placements if no more than this"
    )
    parser.set_defaults(steps=600)
    _add_shape(parser)


def _add_shape(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--shape", type=shape, default="16x32x4", help="KxVxH of the JetBlocks (default 16x32x4)")


def _add_comparison(parser: argparse.ArgumentParser) -> None:
    _add_search(parser)
    parser.add_argument(
        "--placement", required=True, help="folder of `search placement`, or the layers: 'jet attn jet ...'"
    )
    parser.add_argument("--task", default="language modelling", help="whose objective is the quality")
    parser.add_argument(
        "--seeds", type=integer(1, 1000), default=1, help="of every candidate; the tables hold means (default 1)"
    )
    parser.set_defaults(steps=300)
    parser.add_argument(
        "--speed-batch", type=integer(1, 2**16), default=4, help="sequences of the speed measurement (default 4)"
    )
    parser.add_argument("--speed-prompt", type=integer(1, 2**20), default=64, help="tokens of its prompts (default 64)")
    parser.add_argument(
        "--speed-tokens", type=integer(1, 2**20), default=32, help="generated tokens that are timed (default 32)"
    )


def _add_blocks(parser: argparse.ArgumentParser) -> None:
    _add_comparison(parser)
    _add_shape(parser)
    equal = "what the other blocks have like it: the recurrent state, or the parameters (V then differs); default state"
    parser.add_argument("--equal", choices=("state", "parameters"), default="state", help=equal)
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
    parser.add_argument(
        "--state", type=integer(1, 2**40), default=2048, help="elements of state per JetBlock: K*V*H (default 2048)"
    )
    parser.add_argument("--heads", type=integers(1, 2**16), default="4,8", help="H to try (default 4,8)")
    parser.add_argument(
        "--keys", type=integers(1, 2**16), default="8,16,32", help="K to try; V follows (default 8,16,32)"
    )
    limit = parser.add_mutually_exclusive_group()
    limit.add_argument("--min-throughput", type=number(0), help="generated tokens per second that a shape must reach")
    limit.add_argument(
        "--min-share", type=number(0, 1), default=0.9, help="the same as a share of the fastest shape's (default 0.9)"
    )


def _add_final(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--base", type=Path, required=True, help="folder of the base, the teacher")
    parser.add_argument("--model", type=Path, required=True, help="folder of the hybrid that an earlier stage exported")
    parser.add_argument(
        "--whole-steps", type=integer(), default=500, help="steps of the whole model, after --steps of distillation"
    )
    _add_tasks(parser)


def _words(arguments: argparse.Namespace, *names: str) -> list[str]:
    """The options `names` as they are written on a command line; those that are not set are left out."""
    words = []
    for name in names:
        value, option = getattr(arguments, name), f"--{name.replace('_', '-')}"
        if value is True:
            words.append(option)
        elif value is not None and value is not False:
            words += [word for one in (value if isinstance(value, list) else [value]) for word in (option, str(one))]
    return words


def run_all(arguments: argparse.Namespace) -> None:
    """Each stage as its own command would run it, with the defaults of that command where `all` has no option.

    --steps are those of a candidate. The super network gets twice as many, since a step trains about half of its paths;
    the grid of stage 4 keeps the state of --shape.
    """
    output, shape = arguments.output, shape_of(arguments.shape)
    training = (
        "learning_rate",
        "length",
        "task_share",
        "distances",
        "save_every",
        "device",
        "seed",
        "suffix",
        "text",
        "recompute",
    )
    common = _words(arguments, *training)
    base = arguments.base or output / "base"
    tasks = ["--base", str(base), *_words(arguments, "batch", "examples", "questions", "harness", "harness_limit")]
    scored = [*tasks, *_words(arguments, "window_size", "objective")]
    compared = [
        *scored,
        *_words(arguments, "steps"),
        "--placement",
        str(output / "placement"),
        *_words(arguments, "seeds"),
    ]
    keys = sorted({max(1, shape.K // 2), shape.K, 2 * shape.K})
    grid = ["--state", str(shape.state), "--heads", f"{shape.H},{2 * shape.H}", "--keys", ",".join(map(str, keys))]
    plan = {
        "base": [
            "--steps",
            str(arguments.base_steps),
            *_words(arguments, "layers", "hidden_size", "intermediate_size"),
        ],
        "placement": [*scored, "--steps", str(2 * arguments.steps), *_words(arguments, "full", "window", "shape")],
        "blocks": [*compared, *_words(arguments, "shape")],
        "design": [*compared, *_words(arguments, "shape")],
        "shapes": [*compared, *grid],
        "final": [
            *tasks,
            *_words(arguments, "steps"),
            "--model",
            str(output / "shapes" / "model"),
            "--whole-steps",
            str(arguments.steps),
        ],
    }
    if arguments.base is not None:
        del plan["base"]
    parser = argparse.ArgumentParser(prog="jetkernels search")
    add_arguments(parser)
    planned = {
        name: parser.parse_args([name, "--output", str(output / name), *common, *options])
        for name, options in plan.items()
    }
    done = []
    for name, stage in planned.items():
        if ranks()[0] == 0:
            print(f"== {name}", flush=True)
        start = time.perf_counter()
        summary = run_stage(stage)
        wait_for_ranks()
        done.append(StageDone(name, summary or "", time.perf_counter() - start))
    if ranks()[0] == 0:
        model, _ = load_base(base, "cpu")
        facts = [
            (name, value)
            for name, value in sorted(vars(arguments).items())
            if name not in NOT_TRAINING or name in REPORTED
        ]
        write_overview(
            output, model, done, arguments.steps * arguments.batch * arguments.length, arguments.seeds, facts
        )
        print(f"report: {output}/report.md")


def run_stage(arguments: argparse.Namespace) -> str | None:
    check(arguments)
    try:
        return arguments.stage_run(arguments)
    except DifferentRun as error:
        raise ValueError(explained(error, arguments)) from error


def run(arguments: argparse.Namespace) -> int | None:
    if arguments.stage is None:
        arguments.usage(sys.stderr)
        return 2
    join_ranks(torch.device(arguments.device))
    run_stage(arguments)
