"""Score a checkpoint in tasks of lm-evaluation-harness (package lm_eval).

Prints a line for each metric of each task: task, metric, value, standard error. Answers that are not listed are greedy.
"""

import argparse
import json
import sys
import time
from pathlib import Path

from torch import Tensor

from jetkernels._optional import optional
from jetkernels.cli.models import add_model_arguments, check_memory, load_model, read_config
from jetkernels.cli.options import UsageError, integer
from jetkernels.model import Tokenizer

# Samples of the standard errors that have no formula.
BOOTSTRAP = 1000


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `jetkernels evaluate`."""
    add_model_arguments(parser)
    parser.add_argument("--task", action="append", required=True, help="name of a task or a group; may be repeated")
    parser.add_argument("--task-folder", type=Path, help="folder with YAML files of more tasks")
    parser.add_argument("--limit", type=integer(1), help="questions of each task (default: all)")
    parser.add_argument("--fewshot", type=integer(), help="examples in front of each (default: what the task says)")
    parser.add_argument(
        "--max-length",
        type=integer(2),
        default=2048,
        help="tokens that the model is shown; longer texts lose their front (default 2048)",
    )
    parser.add_argument(
        "--batch", type=integer(1, 2**16), default=16, help="texts that it is shown at once (default 16)"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object, task -> metric -> value and stderr")


def metrics(results: dict) -> dict[str, dict[str, dict[str, float | None]]]:
    """Task -> metric -> value and stderr (None where there is none), of the harness's results.

    Their keys are "metric,filter"; a metric of a filter keeps its name.
    """
    found: dict[str, dict[str, dict[str, float | None]]] = {}
    for task, values in results.items():
        found[task] = {}
        for key, value in values.items():
            metric, comma, kind = key.partition(",")
            if comma and not metric.endswith("_stderr"):
                error = values.get(f"{metric}_stderr,{kind}")
                of_metric = {"value": float(value), "stderr": None if isinstance(error, str | None) else float(error)}
                found[task][metric if kind == "none" else key] = of_metric
    return found


def run(arguments: argparse.Namespace) -> None:
    """Scores the model and prints the results."""
    if arguments.model is None:
        raise UsageError("--config names a shape without weights, which knows no answer: give --model FOLDER")
    optional("lm_eval", "harness", "scoring")
    from jetkernels.postnas.harness import HarnessModel, continue_with_cache, evaluate

    config = read_config(arguments)
    tokenizer = Tokenizer.from_pretrained(arguments.model)
    if arguments.task_folder is not None and not arguments.task_folder.is_dir():
        raise NotADirectoryError(f"--task-folder: {arguments.task_folder} is not a folder")
    check_memory(arguments, config, 1, arguments.max_length)
    model = load_model(arguments, config)

    def predict(ids: Tensor) -> Tensor:
        return model(ids.to(model.device)).logits

    judged = HarnessModel(predict, tokenizer, arguments.max_length, arguments.batch, continue_with_cache(model))
    start = time.perf_counter()
    found = evaluate(
        judged,
        arguments.task,
        limit=arguments.limit,
        fewshot=arguments.fewshot,
        folder=arguments.task_folder,
        bootstrap=BOOTSTRAP,
    )
    values = metrics(found["results"])
    if arguments.json:
        print(json.dumps(values))
    else:
        for task, of_task in values.items():
            for metric, got in of_task.items():
                error = "" if got["stderr"] is None else f"  ± {got['stderr']:.4f}"
                print(f"{task}  {metric}  {got['value']:.4f}{error}")
    print(f"{len(arguments.task)} tasks in {time.perf_counter() - start:.1f} s", file=sys.stderr)
