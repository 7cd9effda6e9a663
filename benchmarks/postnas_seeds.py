"""Does the placement that a search finds beat a uniform one? One base, several seeds of the super network, one table.

    python -m benchmarks.postnas_seeds --base FOLDER --output FOLDER [--seeds 3] [options of `jetkernels search placement`]

Writes report.md: for each seed what was found, then found against uniform, with the spread between seeds.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from pathlib import Path

from jetkernels.__main__ import main as jetkernels
from jetkernels.postnas import from_pretrained
from jetkernels.postnas.base import weights_digest
from jetkernels.postnas.report import markdown_table, provenance, write_text


def scores(folder: Path, name: str) -> dict[str, list[float]]:
    """{task: [loss, accuracy]} of the first compared placement whose name starts with `name`."""
    rows = json.loads((folder / "result.json").read_text())["compared"]
    return next(row["scores"] for row in rows if row["name"].startswith(name))


def placement(folder: Path, name: str) -> str:
    rows = json.loads((folder / "result.json").read_text())["compared"]
    return next(" ".join(row["placement"]) for row in rows if row["name"].startswith(name))


def spread(values: list[float]) -> str:
    """Mean and sample standard deviation."""
    return f"{statistics.mean(values):.4f} ± {statistics.stdev(values) if len(values) > 1 else 0.0:.4f}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--base", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=3)
    arguments, options = parser.parse_known_args()
    folders = [arguments.output / f"seed{seed}" for seed in range(arguments.seeds)]
    for seed, folder in enumerate(folders):
        words = ["--base", str(arguments.base), "--output", str(folder), "--seed", str(seed), *options]
        if jetkernels(["search", "placement", *words]) != 0:
            return 1
    names = ["base", "JetBlock everywhere", "uniform", "found"]
    tasks = list(scores(folders[0], "base"))
    each = [[seed, placement(folder, "uniform"), placement(folder, "found")] for seed, folder in enumerate(folders)]
    rows = []
    for name in names:
        found = [scores(folder, name) for folder in folders]
        rows.append([name, *(spread([s[task][i] for s in found]) for task in tasks for i in (0, 1))])
    gains = []
    for task in tasks:
        gain = [scores(f, "uniform")[task][0] - scores(f, "found")[task][0] for f in folders]
        gains.append([task, *(f"{value:.4f}" for value in gain), spread(gain)])
    text = [
        "# Found against uniform placement\n",
        markdown_table(["seed", "uniform", "found"], each),
        f"Mean ± standard deviation over {arguments.seeds} seeds of the super network; losses in nats per token of the right "
        "answer, on examples that the search has not seen.\n",
        markdown_table(["placement", *(f"{task}, {what}" for task in tasks for what in ("loss", "accuracy"))], rows),
        "## Loss of uniform minus loss of found\n",
        markdown_table(["task", *(f"seed {i}" for i in range(len(folders))), "mean ± deviation"], gains),
        "## Provenance\n",
        provenance([("options", " ".join(options) or "defaults"), ("base weights", weights_digest(from_pretrained(arguments.base)))]),
    ]
    write_text(arguments.output / "report.md", "\n".join(text))
    print((arguments.output / "report.md").read_text())
    return 0


if __name__ == "__main__":
    sys.exit(main())
