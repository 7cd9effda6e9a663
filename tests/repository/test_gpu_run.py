"""The run on a lent GPU, rehearsed without one: children that hang, fault, are wrong, or find no library."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from support.paths import ROOT

import jetkernels  # noqa: F401  (registers torch.ops.jet)
from benchmarks.gpu_run import __main__ as gpu_run
from benchmarks.gpu_run import (
    child,
    failures,
    forecasts,
    key,
    library,
    model,
    op_tests,
    plan,
    sanitizer,
    simulator,
    sizes,
    smoke,
    store,
    summary,
    supervisor,
    versus,
    watchdog,
)
from benchmarks.gpu_run.supervisor import Job, Part, Pool
from benchmarks.shapes import SHAPES, Draw, few_heads

# A worker whose cases do what kernels may do. It imports nothing that takes long.
WORKER = """
import os, time
from benchmarks import rows
from benchmarks.gpu_run.supervisor import Job

NEEDS_LIBRARY = False
SMOKE = ("right 2b 1", "hangs 2b 1", "faults 2b 1", "wrong 2b 1", "dies 2b 1", "last 2b 1")

def describe():
    return ["nothing"]

def jobs(settings):
    return [Job(case, (case,)) for case in SMOKE]

def failed(output):
    return []

def work(case, context):
    op = case.split(" ")[0]
    if op == "hangs":
        print("about to hang", flush=True)
        time.sleep(600)
    if op == "faults":
        rows.device_is_lost = lambda: True
        raise RuntimeError("CUDA error: an illegal memory access was encountered")
    if op == "wrong":
        return {"status": "wrong", "failed": "wrong: RMS errors o 3.0e-01"}
    if op == "dies":
        os.kill(os.getpid(), 11)
    if op == "library":
        raise ImportError("libjetkernels.so: cannot open shared object file")
    return {"status": "right", "us": 1.5}
"""
SMOKE_WORKER = WORKER + "\nJUDGES = True\n"
KEY_WORKER = (
    WORKER
    + """
def jobs(settings):
    one = ("right 2b 2", "faults 4b 2", "last 2b 2", "wrong 2b 2", "wrong 2b 2 / cuBLAS")
    return [Job("one process", one), Job("other", ("ceilings", "library 2b 2"))]
"""
)
QUICK = dict(start=20, silence=2.5)


@pytest.fixture
def workers(tmp_path, monkeypatch):
    """Fake workers, importable by the children."""
    folder = tmp_path / "workers"
    folder.mkdir()
    (folder / "fake_smoke.py").write_text(SMOKE_WORKER)
    (folder / "fake_key.py").write_text(KEY_WORKER)
    (folder / "fake_idle.py").write_text(WORKER + "\ndef jobs(settings):\n    return []\n")
    monkeypatch.setenv("PYTHONPATH", str(folder))
    monkeypatch.syspath_prepend(str(folder))
    idle = Part("warm", "fake_idle", "rest", share=0)
    monkeypatch.setattr(plan, "WARM", idle)
    monkeypatch.setattr(plan, "FAILURES", idle._replace(name="failures"))
    monkeypatch.setattr(gpu_run, "LEAST", 0.5)
    return folder


def settings_of(output: Path) -> dict:
    output.mkdir(exist_ok=True)
    return {"output": str(output), "device": "cpu"}


def rehearsed(output: Path, seconds: float = 60, **changed) -> dict[tuple[str, str], dict]:
    parts = [
        Part("smoke", "fake_smoke", "smoke", share=30, workers=6, culprits=1, **QUICK),
        Part("key", "fake_key", "key", share=30, ahead=1, quiet=True, **QUICK),
    ]
    gpu_run.Run([part._replace(**changed) for part in parts], output, seconds, settings_of(output)).go()
    return store.known(output)


def test_what_breaks_costs_one_row_each(tmp_path, workers):
    start = time.monotonic()
    rows = rehearsed(tmp_path / "out")
    assert time.monotonic() - start < 50
    smoked = {case.split(" ")[0]: row for (part, case), row in rows.items() if part == "smoke"}
    statuses = {op: row["status"] for op, row in smoked.items()}
    assert statuses == {
        "right": "right",
        "last": "right",
        "hangs": "hang",
        "faults": "illegal address",
        "wrong": "wrong",
        "dies": "broken process",
    }
    assert (
        "killed" in smoked["hangs"]["failed"]
        and "about to hang" in smoked["hangs"]["tail"]
        and "-11" in smoked["dies"]["failed"]
    )
    broken = json.loads((tmp_path / "out" / "broken.json").read_text())
    assert {entry["op"] for entry in broken["broken"]} >= {"hangs", "faults", "wrong", "dies"} and broken["right"] == [
        "last 2b",
        "right 2b",
    ]

    keyed = {case: row for (part, case), row in rows.items() if part == "key"}
    assert keyed["right 2b 2"]["us"] == keyed["last 2b 2"]["us"] == keyed["ceilings"]["us"] == 1.5
    # another shape, but none was right
    assert keyed["faults 4b 2"]["skipped"] == "faults is broken: illegal address at faults 2b 1"
    assert "wrong is broken" in keyed["wrong 2b 2"]["skipped"]
    assert "broken" not in str(keyed["wrong 2b 2 / cuBLAS"].get("skipped")), (
        "what stands beside a broken op still has its time"
    )
    assert "cannot open shared object file" in keyed["library 2b 2"]["failed"]

    files = {path.name for path in (tmp_path / "out").iterdir()}
    assert files == {"rows-smoke.jsonl", "rows-key.jsonl", "broken.json", "results.json", "summary.md", "run.log"}
    text = (tmp_path / "out" / "summary.md").read_text()
    assert "hang: no row within 2.5 s, killed" in text and "illegal address" in text
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert [part["part"] for part in results["parts"]] == ["smoke", "key"] and "about to hang" in (
        tmp_path / "out" / "run.log"
    ).read_text()
    assert not running_children()


def running_children() -> list[str]:
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            command = (folder / "cmdline").read_bytes()
        except OSError:
            continue
        if b"benchmarks.gpu_run.child\0fake_" in command:
            found.append(command.decode())
    return found


def test_a_second_run_does_only_what_was_not_good(tmp_path, workers):
    first, second = tmp_path / "first", tmp_path / "second"
    rehearsed(first)
    (workers / "fake_smoke.py").write_text(
        SMOKE_WORKER.replace("time.sleep(600)", "pass").replace('"us": 1.5', '"us": 2.5')
    )
    second.mkdir()
    assert store.carry_over(second, first) == 4
    rows = rehearsed(second)
    assert rows["smoke", "right 2b 1"]["us"] == 1.5 and rows["smoke", "right 2b 1"]["earlier"]
    assert rows["smoke", "hangs 2b 1"]["us"] == 2.5 and "earlier" not in rows["smoke", "hangs 2b 1"]
    assert rows["smoke", "faults 2b 1"]["status"] == "illegal address"
    assert "earlier" not in rows["key", "ceilings"], "the device may be another"


def test_what_the_time_does_not_reach_is_named(tmp_path, workers):
    rows = rehearsed(tmp_path / "out", seconds=8, workers=1, start=60, silence=60)
    skipped = {case: row["skipped"] for (part, case), row in rows.items() if part == "smoke" and "skipped" in row}
    assert set(skipped) >= {"last 2b 1"} and all("the time of smoke was over" in why for why in skipped.values())
    assert store.is_good(rows["smoke", "right 2b 1"]) and not running_children()


def test_the_rest_of_a_job_goes_on_after_each_culprit(tmp_path, workers):
    output = tmp_path / "out"
    part = Part("key", "fake_key", "key", share=1, culprits=2, **QUICK)
    job = Job("one", ("right 2b", "dies 2b", "right 4b", "faults 2b", "last 2b"))
    Pool(part, [job], settings_of(output), time.monotonic() + 60, tmp_path, say=lambda text: None).run()
    rows = {case: row for (_, case), row in store.known(output).items()}
    assert rows["right 2b"]["us"] and rows["right 4b"]["us"] and rows["faults 2b"]["status"] == "illegal address"
    assert rows["last 2b"]["skipped"] == "given up after 2 broken processes"


def test_a_child_that_cannot_start_is_told_once(tmp_path, workers):
    (workers / "fake_key.py").write_text("raise OSError('no such device')")
    output = tmp_path / "out"
    Pool(
        Part("key", "fake_key", "key", share=1),
        [Job("one", ("a 2b", "b 2b"))],
        settings_of(output),
        time.monotonic() + 30,
        tmp_path,
    ).run()
    rows = store.known(output)
    assert all(
        "before a case began: OSError: no such device" in rows["key", case]["failed"] for case in ("a 2b", "b 2b")
    )


def test_a_library_that_does_not_load(tmp_path, workers, monkeypatch):
    """The part says why, and what needs no library is done."""
    (workers / "fake_library.py").write_text(
        "from benchmarks.gpu_run.library import *\nfrom benchmarks.gpu_run import library\n"
        "def no(): raise FileNotFoundError('cmake is not here')\n"
        "library.build_everything = no\n"
    )
    monkeypatch.setenv("JETKERNELS_LIBRARY", str(tmp_path / "missing.so"))
    parts = [plan.LIBRARY._replace(module="fake_library"), Part("key", "fake_key", "key", share=9, **QUICK)]
    done = gpu_run.Run(parts, tmp_path / "out", 90, settings_of(tmp_path / "out")).go()
    rows = store.known(tmp_path / "out")
    assert done[0]["status"] == "failed"
    assert (
        "JETKERNELS_LIBRARY names" in rows["library", "library"]["failed"]
        and "cmake is not here" in rows["library", "library"]["failed"]
    )
    assert rows["key", "ceilings"]["us"] == 1.5 and "cannot open" in rows["key", "library 2b 2"]["failed"]


TESTS = """
import os, time
import pytest
from benchmarks import rows

def test_passes(): pass

@pytest.mark.parametrize("x", (1, 2))
def test_fails(x): assert x == 2, "the reason"

def test_hangs(): time.sleep(600)

def test_faults():
    rows.device_is_lost = lambda: True
    raise RuntimeError("CUDA error: an illegal memory access was encountered")

def test_is_skipped(): pytest.skip("no second device")

def test_draft_of_a_broken_op(): raise AssertionError("never run")

def test_comes_last(): pass
"""


def test_tests_have_a_row_each(tmp_path, workers):
    tests = tmp_path / "tests"
    tests.mkdir()
    (tests / "test_planted.py").write_text(TESTS)
    (workers / "fake_tests.py").write_text(
        "from pathlib import Path\n"
        "from benchmarks.gpu_run import op_tests\nfrom benchmarks.gpu_run.op_tests import run\n"
        f"op_tests.TESTS = Path({str(tests)!r})\nNEEDS_LIBRARY = False\n"
    )
    output = tmp_path / "out"
    settings = settings_of(output)
    entry = {"op": "recurrent_gated_delta_rule_verify", "shape": "2b", "case": "x", "status": "hang"}
    (output / store.BROKEN).write_text(json.dumps({"broken": [entry], "right": []}))
    part = Part("tests", "fake_tests", "tests", share=1, start=40, silence=2, culprits=6)
    assert Pool(part, [Job("test_planted.py 1/1")], settings, time.monotonic() + 120, tmp_path).run()
    rows = {case.partition("::")[2]: row for (_, case), row in store.known(output).items()}
    assert rows["test_passes"]["passed"] and rows["test_comes_last"]["passed"] and rows["test_fails[2]"]["passed"]
    assert "the reason" in rows["test_fails[1]"]["failed"] and rows["test_fails[1]"]["where"].startswith(
        "test_planted.py:"
    )
    assert rows["test_hangs"]["status"] == "hang" and rows["test_faults"]["status"] == "illegal address"
    assert rows["test_is_skipped"]["not_run"].endswith("no second device")
    assert (
        "recurrent_gated_delta_rule_verify is broken: hang" in rows["test_draft_of_a_broken_op"]["skipped"]
        and len(rows) == 8
    )
    (counts,) = op_tests.by_file(summary.rows_of("tests", store.known(output)))
    assert (counts["passed"], counts["failures"], counts["not_run"], counts["left_out"]) == (3, 3, 1, 1)


# The command


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens without a GPU")
def test_without_a_gpu_it_says_what_it_would_do(tmp_path, capsys):
    assert gpu_run.main([str(tmp_path / "out")]) == gpu_run.NO_GPU and not (tmp_path / "out").exists()
    said = capsys.readouterr().out
    assert "stands ready" in said and "no CUDA device" in said
    for module, part in (
        (library, plan.LIBRARY),
        (smoke, plan.PARTS[0]),
        (key, plan.PARTS[1]),
        (versus, plan.PARTS[4]),
    ):
        assert f"\n{part.name}\n  * {module.describe()[0]}" in said


def test_parts():
    assert [part.name for part in plan.chosen("peers,tests,peers")] == ["peers", "tests"]
    with pytest.raises(ValueError, match="unknown part speed; there are smoke, key"):
        plan.chosen("tests,speed")
    assert [part.name for part in plan.PARTS[:3]] == ["smoke", "key", "tests"]
    assert all(part.name in summary.TABLES for part in (plan.LIBRARY, *plan.PARTS))
    assert (
        len(
            {f"rows-{part.rows}.jsonl" for part in (plan.LIBRARY, *plan.PARTS)}
            | {"results.json", "summary.md", "broken.json", "run.log"}
        )
        <= 8
    )
    limits = {part.name: part.most for part in plan.PARTS}
    assert (limits["smoke"], limits["key"], limits["tests"], plan.SECONDS) == (45, 110, 110, 540)


def test_every_part_names_its_cases(tmp_path):
    for part in plan.PARTS:
        module = __import__(part.module, fromlist=["jobs"])
        jobs = module.jobs({"output": str(tmp_path), "device": "cuda"})
        names = [case for job in jobs for case in job.cases]
        assert len(set(names)) == len(names) and len({job.name for job in jobs}) == len(jobs) and module.describe()
    assert len(smoke.cases()) == 35 and not set(sizes.cases()) & set(key.cases())
    recurrent = {f"recurrent_gated_delta_rule{more}" for more in ("", "_verify", "_commit")}
    convolution = {"dynamic_conv", "dynamic_conv_step", "apply_dynamic_conv"}
    norms, pointwise = {"rms_norm", "add_rms_norm", "gated_rms_norm"}, {"swiglu", "delta_gates"}
    steps = {"jet_block_step", "attention_step"}
    trained = norms | pointwise | {"chunk_gated_delta_rule", "dynamic_conv", "apply_dynamic_conv"}
    backwards = {f"{op}_backward" for op in trained}
    chunked = {"chunk_gated_delta_rule", "prefill_gated_delta_rule"}
    every = chunked | recurrent | convolution | norms | pointwise | steps | backwards
    assert {case.op for case in smoke.cases().values()} == every
    assert set(model.OPS) <= every
    # Of every op that has a kernel some test is known by its name.
    assert {op_tests.op_of(f"test_x.py::test_y[{op}]") for op in every} == every


def test_tests_name_their_ops():
    for file, op in (
        ("test_jet_block_step_kernels.py::test_gates_of_any_size[cuda-1]", "jet_block_step"),
        ("test_attention_step_kernel.py::test_steps_are_causal_attention[cuda]", "attention_step"),
        ("test_norm_kernels.py::test_equals_the_definition[cuda-add_rms_norm]", "add_rms_norm"),
        ("test_norm_kernels.py::test_equals_the_definition[cuda-x]", "rms_norm"),
        ("test_pointwise_kernels.py::test_delta_gates_equal_the_definition[cuda]", "delta_gates"),
        ("test_recurrent_kernels.py::test_accepted[cuda]", "recurrent_gated_delta_rule_commit"),
    ):
        assert op_tests.op_of(file) == op


def test_a_shape_with_a_slash_can_be_broken(tmp_path):
    case = "dynamic_conv 128/128 1 x 130 bf16"
    store.append(tmp_path / "rows-x.jsonl", {"part": "smoke", "case": case, "status": "hang", "failed": "hang"})
    assert [entry["shape"] for entry in store.write_broken(tmp_path)] == ["128/128"]
    assert store.blocked("dynamic_conv 128/128 1 x 8192 bf16", tmp_path)
    assert not store.blocked("dynamic_conv 128/128 1 x 8192 bf16 / peer", tmp_path)


# Single parts


def context_of(output: Path, part: str = "key") -> child.Context:
    return child.Context(part, "x", output / "rows-x.jsonl", settings_of(output))


def test_smoke_of_a_right_kernel(tmp_path):
    name = next(name for name in smoke.cases() if name.startswith("recurrent_gated_delta_rule_commit"))
    row = smoke.work(name, context_of(tmp_path, "smoke"))
    assert row["status"] == "right" and row["rms_error"] < 5e-3


def test_smoke_verdicts():
    assert smoke.verdict("kernel", {"o": float("nan")})["status"] == "wrong"
    assert smoke.verdict("plain PyTorch: asked", {"o": 0.0})["status"] == "plain"


def test_a_failed_case_is_run_again_under_memcheck(tmp_path, monkeypatch):
    tool = tmp_path / "compute-sanitizer"
    tool.write_text(
        "#!/bin/sh\necho '========= Invalid __global__ write of size 4 bytes'\necho '=========     at sweep+0x90'\n"
        "echo '=========     by thread (3,0,0) in block (1,0,0)'\n[ $CUDA_LAUNCH_BLOCKING = 1 ] || exit 1\n"
        "echo '========= ERROR SUMMARY: 1 error'\nexit 86\n"
    )
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    output = tmp_path / "out"
    context = context_of(output, "failures")
    store.append(
        context.rows, {"part": "smoke", "case": "op 2b 1", "status": "illegal address", "failed": "illegal address"}
    )
    assert [job.cases for job in failures.jobs(context.settings)] == [("op 2b 1",)]
    failures.work("op 2b 1", context)
    row = store.known(output)["smoke", "op 2b 1"]
    assert row["status"] == "illegal address"
    assert row["memcheck"].startswith(
        "Invalid __global__ write of size 4 bytes | at sweep+0x90 | by thread (3,0,0) in block (1,0,0) | ERROR"
    )


def test_faults_are_named():
    assert supervisor.fault_of("CUDA error: an illegal memory access was encountered") == "illegal address"
    assert (
        supervisor.fault_of("CUDA error: unspecified launch failure") == "broken process"
        and supervisor.fault_of("ValueError: x") is None
    )


def test_watchdog_records():
    first, second = (watchdog.RECORD.pack(b, 0, 2, 37, 384, 0x420, 1, 1) for b in (5, 6))
    memory = first + bytes(watchdog.RECORD.size) + second
    assert watchdog.lines(memory) == [
        "jetkernels watchdog: block (5, 0, 2), thread 37 of 384, waits for parity 1 of the barrier at shared address "
        "0x420, and 1 other blocks"
    ]
    header = (ROOT / "csrc" / "hopper" / "barrier.h").read_text().lower()
    assert f"krecords = {watchdog.ADDRESS:#x};" in header and f"kslots = {watchdog.SLOTS};" in header


def test_forecasts_stand_beside(tmp_path):
    assert forecasts.forecasts.__wrapped__(tmp_path) == {}
    (tmp_path / "a.json").write_text(json.dumps([{"op": "x", "case": "x 2b 1", "us": 10.0, "limit": "issue"}]))
    expected = forecasts.forecasts.__wrapped__(tmp_path)
    near, far = (forecasts.beside({"case": "x 2b 1", "us": us}, expected) for us in (12.0, 16.0))
    assert near["times_forecast"] == 1.2 and near["far"] is None and far["far"] == "look here"
    assert "16 us where 10 us were forecast (issue)" in summary.far_off([far])[0]
    assert forecasts.beside({"case": "y"}, expected) == {"case": "y"}


def test_kernel_names():
    assert (
        key.kernel_name("void jet::hopper::(anonymous namespace)::sweep_kernel<jet::SweepConfig<256, true>>(Args)")
        == "sweep_kernel"
    )
    cuda, cpu = torch.autograd.DeviceType.CUDA, torch.autograd.DeviceType.CPU
    seen = ((cuda, "void a::sweep<1>(X)", 40.0), (cpu, "launch", 9.0), (cuda, "Memset (Device)", 5.0))
    events = [SimpleNamespace(device_type=device, key=name, self_device_time_total=us) for device, name, us in seen]
    assert key.per_kernel(events) == {"sweep": 4.0}


def test_sanitizer_verdicts():
    calls = "recurrent_gated_delta_rule 2b 3 bf16, fp32 pool: kernel\n"
    clean = sanitizer.verdict(calls + "========= ERROR SUMMARY: 0 errors\n", 0)
    assert clean == {"calls": 1, "findings": 0}
    found = sanitizer.verdict(
        calls + "========= RACECHECK SUMMARY: 2 hazards displayed (2 errors, 0 warnings)\n", sanitizer.FOUND
    )
    assert found["findings"] == 2 and "hazards" in found["failed"]
    assert "does not work here" in sanitizer.verdict("========= Error: Device not supported\n", 1)["skipped"]
    assert "exit code 1" in sanitizer.verdict("Traceback\nValueError: x\n", 1)["failed"]


def test_simulator_difference():
    x = torch.randn(50)
    assert simulator.difference(x, x) == {"rms_difference": 0.0, "max_difference": 0.0, "bitwise_equal": True}
    assert "failed" not in simulator.difference(x * (1 + 1e-6), x) and "failed" in simulator.difference(x * 1.01, x)
    nan = torch.full((3,), float("nan"))
    assert simulator.difference(nan, nan)["bitwise_equal"] and "failed" in simulator.difference(nan, x[:3])


def test_comparing_with_what_the_simulator_said(tmp_path):
    from benchmarks import ops

    entries = []
    for case in ops.small(few_heads(SHAPES[0]))[:2]:
        args = case.make(Draw())
        entries.append(
            {"name": case.name, "op": case.op, "args": args, "results": ops.results(case.op, simulator.copies(args))}
        )
    entries[1]["results"]["output 0"] *= 1.01
    torch.save(
        {"commit": "abc", "entries": entries, "without_kernel": ["dynamic_conv"], "gemms": []},
        tmp_path / "simulated.pt",
    )
    context = context_of(tmp_path / "out", "simulator")
    context.settings["simulated"] = str(tmp_path / "simulated.pt")
    (job,) = simulator.jobs(context.settings)
    same, other = (simulator.work(name, context) for name in job.cases)
    assert same["bitwise_equal"] and "failed" not in same
    assert other["output"] == "output 0" and "output 0: hardware and simulator differ" in other["failed"]
    assert simulator.jobs({"output": "x"}) == []


def test_the_library_as_it_is_is_taken(monkeypatch):
    monkeypatch.setattr(library, "build_info", lambda: {"compiler": "c", "cuda_architectures": ["sm_90a"]})
    assert library.make_usable() == ("as brought along", "c, sm_90a")


def test_another_library_is_loaded_where_it_is_named(tmp_path):
    script = "from jetkernels import _library; print(_library.path.name, _library.build_info()['torch'])"

    def loaded(path: Path) -> subprocess.CompletedProcess:
        environment = {**os.environ, "JETKERNELS_LIBRARY": str(path)}
        return subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT, env=environment)

    other = tmp_path / "libjetkernels_watchdog.so"
    other.write_bytes(library.LIBRARY.read_bytes())
    assert loaded(other).stdout.startswith("libjetkernels_watchdog.so ")
    assert "which does not exist" in loaded(tmp_path / "no.so").stderr.splitlines()[-1]
