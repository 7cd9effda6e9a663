"""Rows on disk: a JSON line each, written at once by whoever knows it. The last row of a case counts.

A row has a part and a case; ``failed`` or ``skipped`` says why it has no result. A line with ``begin`` says that a
child began a case.
The case of an op is named "op shape size dtype", and something about it has more behind a slash: "... / cuBLAS".
"""

import json
from pathlib import Path

from benchmarks.report import write_text

BROKEN = "broken.json"
ALWAYS = ("library", "ceilings")  # cases that each run does again: it may be on another device
FAULTS = ("hang", "illegal address", "wrong", "broken process")  # what a kernel may do that makes it not worth a time
BESIDE = " / "  # in the name of what stands beside a case; a slash alone is in the name of a shape
LOSING = ("hang", "illegal address", "broken process")  # of these, what ends a process


def append(path: Path, *rows: dict) -> None:
    """One write, so that rows of several processes do not mix."""
    text = "".join(json.dumps(row) + "\n" for row in rows)
    with open(path, "ab", buffering=0) as file:
        file.write(text.encode())


def parsed(text: bytes) -> list[dict]:
    rows = []
    for line in text.splitlines():
        try:
            rows.append(json.loads(line))
        except ValueError:  # its writer was stopped in the middle
            continue
    return rows


def read(path: Path) -> list[dict]:
    return parsed(path.read_bytes()) if path.exists() else []


class Tail:
    """The rows that were appended to a file since the last look."""

    def __init__(self, path: Path):
        self.path = path
        self.offset = path.stat().st_size if path.exists() else 0

    def new(self) -> list[dict]:
        if not self.path.exists():
            return []
        with open(self.path, "rb") as file:
            file.seek(self.offset)
            text = file.read()
        text = text[: text.rfind(b"\n") + 1]
        self.offset += len(text)
        return parsed(text)


def files(folder: Path) -> list[Path]:
    return sorted(folder.glob("rows-*.jsonl"))


def latest(rows: list[dict]) -> dict[tuple[str, str], dict]:
    """(part, case) -> its last row."""
    return {(row["part"], row["case"]): row for row in rows if "case" in row and "part" in row}


def known(folder: Path) -> dict[tuple[str, str], dict]:
    return latest([row for path in files(folder) for row in read(path)])


def is_good(row: dict) -> bool:
    return not ({"failed", "skipped"} & row.keys())


def carry_over(output: Path, earlier: Path) -> int:
    """Good rows of an earlier run stay, marked, so that only the others are done again. Returns how many."""
    count = 0
    for path in files(earlier):
        good = [row for row in latest(read(path)).values() if is_good(row) and row["case"] not in ALWAYS]
        write_text(output / path.name, "".join(json.dumps({**row, "earlier": True}) + "\n" for row in good))
        count += len(good)
    return count


def clear(output: Path) -> None:
    for path in (*files(output), *(output / name for name in (BROKEN, "run.log", "summary.md", "results.json"))):
        path.unlink(missing_ok=True)


# Broken ops


def op_of(case: str) -> str:
    return case.split(" ")[0]


def shape_of(case: str) -> str:
    return (case.split(" ") + [""])[1]


def broken_ops(rows: dict[tuple[str, str], dict]) -> list[dict]:
    """What the rows of smoke and of the measurements say of the kernels that went wrong."""
    return [
        {"op": op_of(case), "shape": shape_of(case), "case": case, "status": row["status"], "part": part}
        for (part, case), row in rows.items()
        if row.get("status") in FAULTS and part != "tests" and BESIDE not in case
    ]


def read_broken(output: Path) -> list[dict]:
    path = output / BROKEN
    return json.loads(path.read_text())["broken"] if path.exists() else []


def write_broken(output: Path) -> list[dict]:
    """An op is broken at a shape where it failed, and at all shapes that smoke has not seen right."""
    rows = known(output)
    found = broken_ops(rows)
    right = sorted(
        {
            f"{op_of(case)} {shape_of(case)}"
            for (part, case), row in rows.items()
            if part == "smoke" and row.get("status") == "right"
        }
    )
    write_text(output / BROKEN, json.dumps({"broken": found, "right": right}, indent=1) + "\n")
    return found


def blocked(case: str, output: Path) -> str | None:
    """Why a case is not worth its time: the kernel it needs is broken. None for what is beside it."""
    path = output / BROKEN
    if BESIDE in case or not path.exists():
        return None
    facts = json.loads(path.read_text())
    for entry in facts["broken"]:
        if entry["op"] == op_of(case) and (
            entry["shape"] == shape_of(case) or f"{op_of(case)} {shape_of(case)}" not in facts["right"]
        ):
            return f"{entry['op']} is broken: {entry['status']} at {entry['case']}"
    return None


def tidy_copy(log: Path, run_log: Path, name: str, code: object, most: int = 1 << 16) -> str:
    """Appends the end of a child's log to the run's and returns it."""
    size = log.stat().st_size if log.exists() else 0
    text = b""
    if size:
        with open(log, "rb") as file:
            file.seek(max(0, size - most))
            text = file.read()
    with open(run_log, "ab") as file:
        file.write(f"==== {name}: exit {code}\n".encode() + text + b"\n")
    return text.decode(errors="replace")
