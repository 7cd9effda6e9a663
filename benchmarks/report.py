"""Readable tables of results: Markdown, columns aligned. And how results get on the disk."""

import os
from collections.abc import Sequence
from pathlib import Path

Row = dict[str, object]

MEASURED = {
    "op": "op",
    "shape": "shape",
    "size": "size",
    "dtype": "dtype",
    "us": "us",
    "above_empty_us": "over empty us",
    "floor_us": "floor us",
    "reached_percent": "% of floor",
    "gb_per_s": "GB/s",
    "tflop_per_s": "TFLOP/s",
    "tokens_per_s": "tokens/s",
    "rms_error": "RMS error",
    "served_by": "served by",
    "n": "n",
    "method": "method",
}


def write_text(path: Path, text: str) -> None:
    """In one step. The library has a writer that does more, but a run may begin before there is a library."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_text(text)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def cell(value: object) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        if value != value or value in (float("inf"), float("-inf")):
            return str(value)
        if value == 0:
            return "0"
        if abs(value) < 1e-2:
            return f"{value:.1e}"
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    return str(value).replace("|", "\\|").replace("\n", " ")


def table(rows: Sequence[Row], columns: dict[str, str]) -> str:
    """A Markdown table of ``columns`` (key: title), without those that have no value; numbers stand to the right."""
    used = {key: title for key, title in columns.items() if any(row.get(key) is not None for row in rows)}
    if not rows or not used:
        return "(nothing)"
    numeric = [
        all(isinstance(r.get(k), (int, float, type(None))) and not isinstance(r.get(k), bool) for r in rows)
        for k in used
    ]
    cells = [list(used.values()), *([cell(row.get(key)) for key in used] for row in rows)]
    widths = [max(3, *(len(line[i]) for line in cells)) for i in range(len(used))]

    def line(values: list[str]) -> str:
        return "| " + " | ".join(v.rjust(w) if n else v.ljust(w) for v, w, n in zip(values, widths, numeric)) + " |"

    rule = "|" + "|".join("-" * (w + 1) + (":" if n else "-") for w, n in zip(widths, numeric)) + "|"
    return "\n".join([line(cells[0]), rule, *map(line, cells[1:])])


def named(row: Row) -> str:
    """What a row without numbers is about."""
    return str(row.get("case") or " ".join(str(row[key]) for key in ("op", "shape", "size", "dtype") if row.get(key)))


def reasons(rows: Sequence[Row]) -> list[str]:
    """The rows that have a reason instead of numbers, alike ones together."""
    found: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        for kind in ("failed", "skipped"):
            if kind in row:
                found.setdefault((kind, str(row[kind])), []).append(named(row))
    lines = []
    for (kind, reason), names in found.items():
        names = [name for name in names if name]
        listed = ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
        lines.append(f"* {kind}: {listed or 'the part'}: {cell(reason)}")
    return lines
