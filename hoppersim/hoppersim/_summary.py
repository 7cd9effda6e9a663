"""What the runs of a program say together: findings once each, a table of launches, the exit status."""

import os
import re
import signal
from collections import Counter

from ._run import Run

# Said of the simulator, not of the program.
NOT_SIMULATED = {"unsupported instruction", "unsupported runtime call", "ptx syntax", "no ptx", "unknown kernel"}
_SIZES = ["", "K", "M", "G", "T", "P"]


def findings(runs: list[Run]) -> list[dict]:
    """Each kind, kernel and line once, as its first run told it, with how many runs saw it."""
    found: dict[tuple, dict] = {}
    for run in runs:
        seen = set()
        for finding in run.findings:
            key = finding["kind"], finding["kernel"], finding["source"] or finding["ptx_line"]
            known = found.setdefault(key, {**finding, "runs": 0, "seed": run.seed, "timing": run.timing})
            known["runs"] += key not in seen
            seen.add(key)
    return list(found.values())


def launches(run: Run) -> list[dict]:
    """The launches of a run; those of one kernel and shape together, with their counters added up."""
    rows: dict[tuple, dict] = {}
    for launch in run.launches:
        shape = [launch[name] for name in ("kernel", "grid", "block", "cluster", "static_shared", "dynamic_shared")]
        row = rows.setdefault(str(shape), {**launch, "launches": 0})
        row["launches"] += 1
        if row["launches"] > 1:
            row["finished"] &= launch["finished"]
            for name in (name for name in launch if name.startswith(_ADDED)):
                row[name] += launch[name]
    return list(rows.values())


_ADDED = ("warp_", "tensor_", "global_", "bulk_", "shared_", "wgmma_", "barrier_")


def refusals(runs: list[Run]) -> list[tuple[str, str]]:
    """Kernel and error of the launches that hardware would refuse, each once."""
    return list({(refusal["kernel"], refusal["error"]): None for run in runs for refusal in run.refusals})


def told_status(status: int) -> str:
    """Such as "status 3", "SIGSEGV"."""
    return f"status {status}" if status >= 0 else signal.Signals(-status).name


def exit_status(runs: list[Run]) -> int:
    """0: no errors and the program returned 0. 1: errors, or it failed. 2: it could not be simulated."""
    kinds = {finding["kind"] for run in runs for finding in run.findings if finding["severity"] == "error"}
    if kinds and kinds <= NOT_SIMULATED:
        return 2
    return 1 if kinds or any(run.status for run in runs) else 0


def short_path(source: str) -> str:
    """A place with its files as seen from the working directory."""
    here = os.getcwd() + os.sep
    return source.replace(here, "")


_LINES = 6  # of a finding: a dead-lock tells every warp


def text_of_findings(runs: list[Run]) -> str:
    """A paragraph for each finding."""
    paragraphs = []
    for f in findings(runs):
        first = f"first with seed {f['seed']}, timing {f['timing']}"
        place = short_path(f["source"]) or (f"ptx line {f['ptx_line']}" if f["ptx_line"] else "")
        text = f["text"].removeprefix(f"{f['kind']}: ").replace(f"; kernel {f['kernel']}, {f['source']}, ", "; ")
        told = [re.sub(rf"^kernel {re.escape(f['kernel'])}(, |: |$)", "", line) for line in text.splitlines()]
        told = [line for line in told if line]
        if len(told) > _LINES:
            told[_LINES:] = [f"… {len(told) - _LINES} more lines (--json FILE has them)"]
        paragraphs.append(
            f"{'warning: ' * (f['severity'] == 'warning')}{f['kind']}: in {f['runs']} of {len(runs)} runs, {first}\n"
            + (f"  at     {place}\n" if place else "")
            + (f"  kernel {f['kernel']}\n" if f["kernel"] else "")
            + "\n".join(f"  {line}" for line in short_path("\n".join(told)).splitlines())
        )
    return "\n\n".join(paragraphs)


def _amount(value: float) -> str:
    power = 0
    while value >= 9999.5 and power + 1 < len(_SIZES):
        value, power = value / 1000, power + 1
    return f"{value:.4g}{_SIZES[power]}"


def _triple(values) -> str:
    values = list(values)
    while len(values) > 1 and values[-1] == 1:
        values.pop()
    return "x".join(map(str, values))


def table_of_launches(run: Run) -> str:
    """One line per kernel and shape."""
    header = "launches grid block cluster shared CTAs/SM read written TMA FLOP conflicts instructions".split()
    lines, unfinished = [header], False
    names = []
    for row in launches(run):
        ideal = row.get("shared_ideal_wavefronts", 0)
        counted = [
            _amount(row["global_read_bytes"]),
            _amount(row["global_write_bytes"]),
            _amount(row["bulk_read_bytes"] + row["bulk_write_bytes"]),
            _amount(row["tensor_flop"]),
            f"{row['shared_wavefronts'] / ideal:.2f}" if ideal else "-",
            _amount(row["warp_instructions"]),
        ]
        if not row["warp_instructions"]:
            counted = ["-"] * len(counted)
        names.append(row["kernel"])
        unfinished |= not row["finished"]
        lines.append(
            [
                str(row["launches"]) + ("" if row["finished"] else "*"),
                *(_triple(row[name]) for name in ("grid", "block", "cluster")),
                str(row["static_shared"] + row["dynamic_shared"]),
                str(row["occupancy"]) if row["registers"] else f">={row['occupancy']}",
                *counted,
            ]
        )
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    texts = ["  ".join(cell.rjust(width) for cell, width in zip(line, widths)) for line in lines]
    body = [f"{name}\n{text}" for name, text in zip(names, texts[1:])]
    note = "\n* a finding stopped a launch: its counters are missing" if unfinished else ""
    return "\n".join([texts[0], *body]) + note


def text_of_statuses(runs: list[Run]) -> str:
    """How the program itself ended."""
    counts = Counter(run.status for run in runs)
    if counts == {0: len(runs)}:
        return "The program returned 0 in every run."
    parts = []
    for status, count in counts.items():
        first = next(run for run in runs if run.status == status)
        where = f"(first with seed {first.seed}, timing {first.timing})"
        parts.append(f"{told_status(status)} in {count} of {len(runs)} runs {where}")
    return "The program ended with " + ", ".join(parts) + "."
