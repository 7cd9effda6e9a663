"""Rows of results as they become known, and the seconds that are left."""

import sys
import time
import traceback
from collections.abc import Callable

SAMPLES = "samples"  # of a row: the timings behind its numbers, for the JSON and not for the screen


class Clock:
    """The seconds that are left."""

    def __init__(self, seconds: float):
        self.end = time.monotonic() + seconds

    def left(self) -> float:
        return self.end - time.monotonic()


class Rows:
    """Rows of results, each printed as soon as it is known."""

    def __init__(self):
        self.rows: list[dict] = []

    def add(self, **row) -> dict:
        self.rows.append(row)
        print(line(row), flush=True)
        return row

    def attempt(self, clock: Clock, work: Callable[[], dict | None], **what) -> None:
        """Adds ``what`` with the results of ``work``, or with the reason why there are none."""
        if clock.left() <= 0:
            self.add(**what, skipped="the time was over")
            return
        try:
            found = work()
        except Exception as error:  # one case must not stop the others
            traceback.print_exc()
            self.add(**what, failed=reason(error))
        else:
            self.add(**what, **(found or {}))


def reason(error: BaseException) -> str:
    """The first line of an exception, with its type."""
    said = str(error).strip().splitlines()
    return f"{type(error).__name__}: {said[0] if said else ''}"[:300]


def line(row: dict) -> str:
    shown = {key: value for key, value in row.items() if value not in (None, "") and key != SAMPLES}
    return "  ".join(f"{key}={_short(value)}" for key, value in shown.items())


def _short(value) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def failed(rows: list[dict]) -> bool:
    return any("failed" in row for row in rows)


def device_is_lost() -> bool:
    """Whether a kernel broke this process's context: then every later call fails, whatever it is."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return False
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False
