"""What a model of the kernels' machine code expects of each case, beside what was measured.

benchmarks/results/forecast/*.json: rows {"op", "case", "kernel", "us", "limit"}, of which those of kernel "call" count
here; the case is named as benchmarks/ops.py names it. The newest file counts.
"""

import json
from functools import cache
from pathlib import Path

from benchmarks import ROOT

FOLDER = ROOT / "benchmarks" / "results" / "forecast"
FAR = 1.5  # a ratio beyond which the model of the kernel is wrong


@cache
def forecasts(folder: Path = FOLDER) -> dict[str, dict]:
    """Case -> row."""
    files = sorted(folder.glob("*.json"))
    if not files:
        print(f"no forecasts: there is no JSON file in {folder}")
        return {}
    found = json.loads(files[-1].read_text())
    rows = found if isinstance(found, list) else found["rows"]
    return {row["case"]: row for row in rows if row.get("us") and row.get("kernel", "call") == "call"}


def beside(row: dict, expected: dict[str, dict]) -> dict:
    """The row with its forecast, their ratio, and a flag where they are far apart."""
    if (forecast := expected.get(row.get("case", ""))) is None or not row.get("us"):
        return row
    ratio = row["us"] / forecast["us"]
    far = "look here" if max(ratio, 1 / ratio) > FAR else None
    return {**row, "forecast_us": forecast["us"], "times_forecast": ratio, "limit": forecast.get("limit"), "far": far}
