"""What a run found, as results.json, summary.md and a last screen."""

import json
from collections.abc import Sequence
from pathlib import Path

from benchmarks.gpu_run import store
from benchmarks.gpu_run.forecasts import beside, forecasts
from benchmarks.gpu_run.op_tests import by_file
from benchmarks.report import Row, cell, reasons, table, write_text

TIMES = {
    "case": "case",
    "us": "us",
    "forecast_us": "forecast us",
    "times_forecast": "us / forecast",
    "far": "",
    "floor_us": "floor us",
    "reached_percent": "% of floor",
    "above_empty_us": "over empty us",
    "gb_per_s": "GB/s",
    "tflop_per_s": "TFLOP/s",
    "peer": "peer",
    "ours_us": "ours us",
    "times_ours": "peer / ours",
    "kernels": "us of each kernel",
    "rms_error": "RMS error",
    "served_by": "served by",
    "n": "n",
    "method": "method",
    "note": "note",
    "earlier": "earlier run",
}
TABLES: dict[str, dict[str, str]] = {
    "library": {"step": "step", "what": "what", "seconds": "s"},
    "smoke": {
        "case": "case",
        "status": "status",
        "rms_error": "RMS error",
        "served_by": "served by",
        "memcheck": "memcheck",
        "earlier": "earlier run",
    },
    "key": TIMES,
    "sizes": TIMES,
    "tests": {
        "file": "file",
        "passed": "passed",
        "failures": "failed",
        "not_run": "skipped",
        "left_out": "left out",
        "seconds": "s",
    },
    "peers": {
        "case": "case / peer",
        "us": "us",
        "ours_us": "ours us",
        "times_ours": "peer / ours",
        "rms_difference": "RMS difference",
        "n": "n",
        "method": "method",
        "note": "note",
        "earlier": "earlier run",
    },
    "model": {
        "case": "case",
        "us": "us a step",
        "eager_us": "us without a graph",
        "same_tokens": "same tokens",
        "tokens_per_s": "tokens/s",
        "floor_us": "floor us",
        "reached_percent": "% of floor",
        "prefill_us": "prefill us",
        "prefill_tokens_per_s": "prefill tokens/s",
        "slowest_us": "slowest us",
        "again_us": "us again",
        "times_again": "first / again",
        "launches": "launches",
        "kernels": "us of each kernel",
        "n": "n",
        "method": "method",
        "earlier": "earlier run",
    },
    "simulator": {
        "case": "case",
        "output": "output",
        "rms_difference": "RMS difference",
        "max_difference": "largest",
        "bitwise_equal": "bitwise",
    },
    "sanitizer": {"case": "tool", "calls": "calls", "findings": "findings"},
}
MOST_REASONS = 40


def overview(part: str, rows: Sequence[Row], finished: bool, seconds: float, earlier: int) -> dict[str, object]:
    """A part's line: status, and why it is not simply "ran"."""
    failed, skipped = sum("failed" in row for row in rows), sum("skipped" in row for row in rows)
    status = (
        "out of time" if not finished else "failed" if failed else "skipped" if rows and skipped == len(rows) else "ran"
    )
    told = [
        f"{failed} of {len(rows)} failed" * bool(failed),
        f"{skipped} left out" * bool(skipped),
        f"{earlier} of an earlier run" * bool(earlier),
    ]
    return {
        "part": part,
        "status": status if rows else "skipped",
        "reason": ", ".join(filter(None, told)),
        "seconds": seconds,
    }


def shown(part: str, rows: Sequence[Row]) -> list[Row]:
    """The rows of a part's table."""
    if part == "tests":
        return by_file(rows)
    flat = [
        {**row, "kernels": ", ".join(f"{name} {us:g}" for name, us in row["kernels"].items())}
        if "kernels" in row
        else row
        for row in rows
    ]
    if part == "smoke":
        return [row for row in flat if "status" in row]
    return [beside(row, forecasts()) for row in flat if store.is_good(row) or "rms_difference" in row]


def why(rows: Sequence[Row]) -> list[str]:
    lines = reasons(rows)
    return lines[:MOST_REASONS] + (
        [f"* and {len(lines) - MOST_REASONS} more reasons; results.json has them"] if len(lines) > MOST_REASONS else []
    )


def far_off(rows: Sequence[Row]) -> list[str]:
    far = [row for row in rows if row.get("far")]
    return [
        f"* {row['case']}: {cell(row['us'])} us where {cell(row['forecast_us'])} us were forecast ({row['limit']})"
        for row in far
    ]


def section(part: dict[str, object], rows: Sequence[Row]) -> str:
    lines = [f"## {part['part']}: {part['status']}, {part['seconds']:.0f} s"]
    if part.get("reason"):
        lines.append(str(part["reason"]))
    found = shown(str(part["part"]), rows)
    if found:
        lines.append(table(found, TABLES.get(str(part["part"]), {"case": "case", "us": "us"})))
    if far := far_off(found):
        lines.append("Far from the forecast, so the model of the kernel is wrong:\n" + "\n".join(far))
    if reasons_found := why(rows):
        lines.append("\n".join(reasons_found))
    return "\n\n".join(lines)


def rows_of(part: str, known: dict[tuple[str, str], Row]) -> list[Row]:
    """Of one part, without what says where they came from."""
    return [
        {key: value for key, value in row.items() if key not in ("part", "child")}
        for (name, _), row in known.items()
        if name == part
    ]


def facts_of(known: dict[tuple[str, str], Row]) -> Row:
    return known.get(("library", "library"), {}).get("provenance", {})


def write(output: Path, done: Sequence[dict[str, object]]) -> None:
    """After each part, so that a run that is cut off leaves what it had."""
    known = store.known(output)
    facts = facts_of(known)
    parts = [{**part, "rows": rows_of(str(part["part"]), known)} for part in done]
    write_text(output / "results.json", json.dumps({"provenance": facts, "parts": parts}, indent=1) + "\n")
    provenance = table(
        [{"fact": key, "value": cell(value)} for key, value in facts.items()], {"fact": "fact", "value": "value"}
    )
    sections = [section(part, part["rows"]) for part in parts]
    whole = [
        "# On a GPU",
        provenance,
        table(done, {"part": "part", "status": "status", "seconds": "s", "reason": "why"}),
        *sections,
    ]
    write_text(output / "summary.md", "\n\n".join(whole) + "\n")


def screen(output: Path, done: Sequence[dict[str, object]]) -> str:
    """The end of what the command prints: verdicts, key times, what went wrong.

    Short, because of a long output only the end may come back.
    """
    known = store.known(output)
    tables = [table(done, {"part": "part", "status": "status", "seconds": "s", "reason": "why"})]
    columns = {
        "smoke": ("case", "status", "rms_error"),
        "key": ("case", "us", "forecast_us", "times_forecast", "far", "reached_percent"),
    }
    for name in columns:
        if rows := [row for row in shown(name, rows_of(name, known)) if "/" not in row["case"]]:
            tables.append(f"{name}\n" + table(rows, {key: TABLES[name][key] for key in columns[name]}))
    if rows := shown("tests", rows_of("tests", known)):
        tables.append("tests\n" + table(rows, TABLES["tests"]))
    wrong = [f"{part['part']} {line[:300]}" for part in done for line in why(rows_of(str(part["part"]), known))[:12]]
    return "\n\n".join([*tables, "\n".join(wrong)])
