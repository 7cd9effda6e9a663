"""The tests of the suite that are marked `gpu`: a pytest per file, a large file in shares, several at once.

The supervisor's limit of silence is the time limit of a test, and a pytest that lost its device is replaced: neither
pytest-xdist nor pytest-timeout is needed, and the culprit of a hang is known by name.
"""

import importlib.util
import os
import sys
import time
from pathlib import Path

from benchmarks import ROOT, rows
from benchmarks.gpu_run import store, watchdog
from benchmarks.gpu_run.supervisor import Job, fault_of

NEEDS_LIBRARY = False  # pytest imports it
MARKER = "gpu"  # of pyproject.toml
TESTS = ROOT / "tests"
SHARES = 3  # of a file of tests of kernels
OP_OF_TEST = {  # the first that is in a test's name
    "jet_block_step": "jet_block_step",
    "attention_step": "attention_step",
    "gated_rms_norm_backward": "gated_rms_norm_backward",
    "add_rms_norm_backward": "add_rms_norm_backward",
    "rms_norm_backward": "rms_norm_backward",
    "delta_gates_backward": "delta_gates_backward",
    "swiglu_backward": "swiglu_backward",
    "gated_rms_norm": "gated_rms_norm",
    "add_rms_norm": "add_rms_norm",
    "norm_kernels": "rms_norm",
    "rms_norm": "rms_norm",
    "delta_gates": "delta_gates",
    "swiglu": "swiglu",
    "test_prefill_kernels": "prefill_gated_delta_rule",
    "prefill_gated_delta_rule": "prefill_gated_delta_rule",
    "gated_delta_rule_verify": "recurrent_gated_delta_rule_verify",
    "gated_delta_rule_commit": "recurrent_gated_delta_rule_commit",
    "draft": "recurrent_gated_delta_rule_verify",
    "accepted": "recurrent_gated_delta_rule_commit",
    "test_recurrent_kernels": "recurrent_gated_delta_rule",
    "test_step": "dynamic_conv_step",
    "chunk_gated_delta_rule_backward": "chunk_gated_delta_rule_backward",
    "apply_dynamic_conv_backward": "apply_dynamic_conv_backward",
    "dynamic_conv_backward": "dynamic_conv_backward",
    "apply": "apply_dynamic_conv",
    "test_dynamic_conv_kernels": "dynamic_conv",
    "chunk_gated_delta_rule": "chunk_gated_delta_rule",
    "recurrent_gated_delta_rule": "recurrent_gated_delta_rule",
    "dynamic_conv_step": "dynamic_conv_step",
    "dynamic_conv": "dynamic_conv",
}


def files() -> list[Path]:
    """Those with tests of kernels first, which are the longest."""
    marks = ("support.device_backends", f"pytest.mark.{MARKER}\n")
    found = [path for path in sorted(TESTS.glob("*/test_*.py")) if any(mark in path.read_text() for mark in marks)]
    return sorted(found, key=lambda path: "kernel" not in path.name)


def describe() -> list[str]:
    names = ", ".join(path.name for path in files())
    what = "every test of a kernel that also runs on the simulator, and of the model, on the GPU"
    return [f"pytest of the tests marked {MARKER} in {names}: {what}"]


def jobs(settings: dict) -> list[Job]:
    shares = [
        (path, i, SHARES if path.stem.endswith(("kernel", "kernels")) else 1) for path in files() for i in range(SHARES)
    ]
    return [Job(f"{path.relative_to(TESTS)} {i + 1}/{count}") for path, i, count in shares if i < count]


def op_of(test: str) -> str:
    return next((op for part, op in OP_OF_TEST.items() if part in test), "")


class Plugin:
    """Chooses this share's tests, without those that have a row, and writes a row for each as it ends."""

    def __init__(self, context, share: int, shares: int):
        self.context, self.share, self.shares = context, share, shares
        self.done = {case for (part, case) in store.known(context.output) if part == context.part}
        self.losing = {
            entry["op"]: entry for entry in store.read_broken(context.output) if entry["status"] in store.LOSING
        }
        self.reports: list = []

    def pytest_collection_modifyitems(self, config, items):
        anywhere = self.context.settings.get("device", "cuda") != "cuda"
        marked = [item for item in items if anywhere or item.get_closest_marker(MARKER)]
        run = []
        for item in marked[self.share :: self.shares]:
            if item.nodeid in self.done:
                continue
            if (entry := self.losing.get(op_of(item.nodeid))) is not None:
                self.context.add(item.nodeid, skipped=f"{entry['op']} is broken: {entry['status']} at {entry['case']}")
            else:
                run.append(item)
        config.hook.pytest_deselected(items=[item for item in items if item not in run])
        items[:] = run

    def pytest_runtest_logstart(self, nodeid):
        self.context.begin(nodeid)
        self.reports, self.start = [], time.monotonic()

    def pytest_runtest_logreport(self, report):
        self.reports.append(report)

    def pytest_runtest_logfinish(self, nodeid):
        from benchmarks.gpu_run.child import leave_lost

        row = verdict(self.reports, time.monotonic() - self.start)
        lost = rows.device_is_lost()
        if lost:
            row = {
                **row,
                "status": fault_of(row.get("failed", "")) or "broken process",
                "failed": row.get("failed", "the device was lost after it"),
            }
            if said := watchdog.said():
                row |= {"status": "hang", "failed": said[0]}
        self.context.add(nodeid, **row)
        if lost:
            leave_lost()
        give_back_memory()


def give_back_memory() -> None:
    """What a test of far addresses took, the other processes need."""
    torch = sys.modules.get("torch")
    if torch and torch.cuda.is_initialized() and torch.cuda.memory_reserved() > 1 << 30:
        torch.cuda.empty_cache()


def verdict(reports: list, seconds: float) -> dict[str, object]:
    """A test's row from the reports of its phases."""
    row: dict[str, object] = {"seconds": round(seconds, 2)}
    if failed := next((report for report in reports if report.failed), None):
        crash = getattr(failed.longrepr, "reprcrash", None)
        said = crash.message if crash else str(failed.longrepr)
        return {
            **row,
            "failed": " ".join(said.split())[:300],
            "where": f"{os.path.basename(crash.path)}:{crash.lineno}" if crash else failed.when,
        }
    if skipped := next((report for report in reports if report.skipped), None):
        said = skipped.longrepr[2] if isinstance(skipped.longrepr, tuple) else skipped.longrepr
        return {**row, "not_run": str(said)[:200]}
    return {**row, "passed": True}


def run(context) -> None:
    """The job's name says which file, and which share of it."""
    for module in ("pytest", "hypothesis"):
        if importlib.util.find_spec(module) is None:
            context.begin(module)
            context.add(module, failed=f"the tests need {module}, which is not installed here")
            return
    import pytest

    watchdog.records()
    _, file, share = context.name.split(" ")[:3]
    number, shares = map(int, share.split("/"))
    plugin = Plugin(context, number - 1, shares)
    code = pytest.main(
        [str(TESTS / file), "-q", "-p", "no:cacheprovider", "--tb=short", "--capture=no"], plugins=[plugin]
    )
    if code not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED, pytest.ExitCode.NO_TESTS_COLLECTED):
        context.begin(file)
        context.add(f"{file} {share}", failed=f"pytest ended with {code!r}; run.log says why")


def by_file(found: list[dict]) -> list[dict[str, object]]:
    """Counts per file of the rows of single tests."""
    files: dict[str, dict] = {}
    for row in found:
        name = row["case"].partition("::")[0].split("/")[-1]
        counts = files.setdefault(
            name, {"file": name, "passed": 0, "failures": 0, "not_run": 0, "left_out": 0, "seconds": 0.0}
        )
        counts[
            "failures"
            if "failed" in row
            else "left_out"
            if "skipped" in row
            else "not_run"
            if "not_run" in row
            else "passed"
        ] += 1
        counts["seconds"] += row.get("seconds", 0.0)
    return list(files.values())
