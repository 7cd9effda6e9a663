"""Compares the placement that a search finds with a uniform one, over several seeds.

    python -m benchmarks.postnas_seeds --output FOLDER [--seeds 3] [options of `jetkernels search placement`]

Each seed has a base and a super network of its own. Writes report.md: for every budget what each seed found, and found
against uniform with the spread between seeds. A run that was killed goes on when it is called again.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from pathlib import Path

from jetkernels.__main__ import main as jetkernels
from jetkernels.files import write_atomic
from jetkernels.postnas import from_pretrained
from jetkernels.postnas.base import weights_digest
from jetkernels.postnas.report import markdown_table, provenance, write_text

# Options that a base and its search have in common.
SHARED = ("text", "suffix", "length", "distances", "task-share", "device")
SUPER_NETWORK = "super_network.ckpt"  # in the output folder of `search placement`


def compared(folder: Path) -> dict[str, dict]:
    """{"base" | "JetBlock everywhere" | "uniform" | "found" and others: its row of the stage's result.json}."""
    found: dict[str, dict] = {}
    for row in json.loads((folder / "result.json").read_text())["compared"]:
        # Of two found placements the first has no windows, like the uniform one.
        found.setdefault(row["name"].split(",")[0], row)
    return found


def spread(values: list[float]) -> str:
    """Mean and sample standard deviation; one value has none."""
    deviation = f" ± {statistics.stdev(values):.4f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.4f}{deviation}"


def attention(row: dict) -> str:
    return ", ".join(str(i) for i, kind in enumerate(row["placement"]) if kind == "attn")


def budget_section(full: int, folders: list[Path]) -> str:
    """The tables of one budget; folders: of the seeds' searches."""
    seeds = [compared(folder) for folder in folders]
    tasks = list(seeds[0]["found"]["scores"])
    each = [[i, attention(seed["uniform"]), attention(seed["found"])] for i, seed in enumerate(seeds)]
    means = [
        [name, *(spread([seed[name]["scores"][task][i] for seed in seeds]) for task in tasks for i in (0, 1))]
        for name in seeds[0]
    ]
    gains = []
    for task in tasks:
        gain = [seed["uniform"]["scores"][task][0] - seed["found"]["scores"][task][0] for seed in seeds]
        gains.append([task, *gain, spread(gain)])
    return "\n".join(
        [
            f"## {full} full layer{'s' if full > 1 else ''}\n",
            markdown_table(["seed", "uniform: layers (0-based)", "found"], each),
            markdown_table(
                ["placement", *(f"{task}, {what}" for task in tasks for what in ("loss", "accuracy"))], means
            ),
            "Loss of uniform minus loss of found:\n",
            markdown_table(["task", *(f"seed {i}" for i in range(len(seeds))), "mean ± deviation"], gains),
        ]
    )


def curve_section(folders: list[Path]) -> str:
    """What `--budgets` gave: each number of full layers, found, by importance and uniform; nothing without it."""
    seeds = [json.loads((folder / "result.json").read_text()).get("budgets") or [] for folder in folders]
    if not all(seeds):
        return ""
    tasks = list(seeds[0][0]["scores"])
    rows = []
    for same in zip(*seeds, strict=True):
        budget, how = same[0]["budget"], same[0]["how"]
        layers = " / ".join(", ".join(map(str, row["layers"])) for row in same)
        rows.append([budget, how, layers, *(spread([row["scores"][task][0] for row in same]) for task in tasks)])
    return "\n".join(
        [
            "## By the number of full layers\n",
            "Layers of the seeds, one behind the other; the first is 0.\n",
            markdown_table(["full layers", "placed", "layers", *(f"{task}, loss" for task in tasks)], rows),
        ]
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--full", default="1,2", help="budgets, full layers (default 1,2)")
    parser.add_argument("--base", type=Path, help="one base for all seeds (default: each seed trains its own)")
    parser.add_argument("--base-steps", type=int, default=4000)
    for name in SHARED:
        parser.add_argument(f"--{name}", help="of base and search")
    arguments, options = parser.parse_known_args()
    given = {name: getattr(arguments, name.replace("-", "_")) for name in SHARED}
    shared = [word for name, value in given.items() if value is not None for word in (f"--{name}", value)]
    options += shared
    budgets = [int(word) for word in arguments.full.split(",")]
    for seed in range(arguments.seeds):
        folder = arguments.output / f"seed{seed}"
        base = arguments.base or folder / "base"
        if arguments.base is None:
            words = ["--output", str(base), "--seed", str(seed), "--steps", str(arguments.base_steps)]
            words += ["--save-every", "200", *shared]
            if jetkernels(["search", "base", *words]) != 0:
                return 1
        for before, full in zip([None, *budgets], budgets):
            output = folder / f"full{full}"
            trained = output / SUPER_NETWORK
            if before is not None and not trained.exists() and (folder / f"full{before}" / SUPER_NETWORK).exists():
                # One super network serves every budget.
                write_atomic(trained, (folder / f"full{before}" / SUPER_NETWORK).read_bytes())
            words = ["--base", str(base), "--output", str(output), "--seed", str(seed), "--full", str(full), *options]
            if jetkernels(["search", "placement", *words]) != 0:
                return 1
    digest = weights_digest(from_pretrained(arguments.base)) if arguments.base else ""
    described = f"weights {digest}" if arguments.base else f"{arguments.base_steps} steps each"
    text = [
        "# Found against uniform placement\n",
        f"Mean ± standard deviation over {arguments.seeds} seeds; "
        + (
            "a seed is that of the super network, the base is one"
            if arguments.base
            else "each seed trains its own base and super network"
        )
        + ". Losses in nats per token of the right answer, on examples that the search has not seen.\n",
        *(
            budget_section(full, [arguments.output / f"seed{seed}" / f"full{full}" for seed in range(arguments.seeds)])
            for full in budgets
        ),
        curve_section([arguments.output / f"seed{seed}" / f"full{budgets[-1]}" for seed in range(arguments.seeds)]),
        "## Provenance\n",
        provenance([("base", described), ("options of `search placement`", " ".join(options) or "defaults")]),
    ]
    write_text(arguments.output / "report.md", "\n".join(text))
    print((arguments.output / "report.md").read_text())
    return 0


if __name__ == "__main__":
    sys.exit(main())
