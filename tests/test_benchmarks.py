"""What of the benchmarks can be checked without a GPU: floors, cases, tables, the parts of a run."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from benchmarks import counters, cpu, floors, library, on_gpu, op_tests, ops, parts, report, run, sanitizer, simulator
from benchmarks import provenance as facts
from benchmarks.floors import H200, Ceilings, Work
from benchmarks.shapes import SHAPES, Draw, Shape, conv_inputs, delta_rule_inputs, few_heads
from jetkernels import ops as _  # noqa: F401  (registers torch.ops.jet)

ROOT = Path(__file__).parent.parent
SHAPE_2B, SHAPE_4B = SHAPES[:2]
F32 = torch.float32


def ns(work: Work) -> float:
    return work.seconds(H200) * 1e9


# Floors: the numbers of the design, for the two models


def test_delta_rule_prefill_floor():
    work_2b, work_4b = floors.chunk_token(SHAPE_2B), floors.chunk_token(SHAPE_4B)
    assert (work_2b.bytes, work_4b.bytes) == (16_992, 24_704)
    assert work_2b.flop == pytest.approx(2.88e6, rel=2e-3) and work_4b.flop == pytest.approx(4.76e6, rel=1e-3)
    assert ns(work_2b) == pytest.approx(3.95, abs=0.005) and ns(work_4b) == pytest.approx(6.0, abs=0.05)


def test_decode_floor():
    for shape, fp32, bf16 in ((SHAPE_2B, 0.55, 0.27), (SHAPE_4B, 0.98, 0.49)):
        for itemsize, us in ((4, fp32), (2, bf16)):
            states = Work(2 * floors.state_bytes(shape, itemsize), 0)
            assert ns(states) / 1e3 == pytest.approx(us, abs=0.006)
            whole = floors.recurrent(shape, 1, 1, itemsize)
            assert states.bytes < whole.bytes == states.bytes + floors.token_bytes(shape)


def test_convolution_floor():
    for shape, flop, per_token, stored in ((SHAPE_2B, 9.44e6, 11.95, 11.4), (SHAPE_4B, 16.8e6, 21.2, 15.2)):
        work = floors.conv_token(shape)
        assert work.flop == pytest.approx(flop, rel=2e-3) and ns(work) == pytest.approx(per_token, abs=0.05)
        assert floors.stored_kernels(shape) / H200.bandwidth * 1e9 == pytest.approx(stored, abs=0.05)
    assert floors.conv_step(SHAPE_2B, 1).seconds(H200) == pytest.approx(2.2e-6, rel=0.02)
    assert floors.conv_step(SHAPE_4B, 1).seconds(H200) == pytest.approx(3.9e-6, rel=0.02)


def test_verify_reads_the_state_once_and_commit_twice():
    shape = SHAPE_2B
    state = floors.state_bytes(shape)
    assert floors.verify(shape, 3, 0, 4).bytes == 3 * state
    assert floors.commit(shape, 3, 0, 4).bytes == 6 * state


def test_floor_is_the_larger_of_bytes_and_flop():
    assert Work(10, 1).seconds(Ceilings(5, 1)) == 2 and Work(1, 10).seconds(Ceilings(5, 1)) == 10


def test_published_shapes():
    for shape in SHAPES:
        assert shape.D == shape.H * shape.V and shape.H % shape.Hk == 0
        small = few_heads(shape)
        assert small.H // small.Hk == shape.H // shape.Hk and (small.K, small.V) == (shape.K, shape.V)


# Cases: the same list is measured, compared, sanitised and counted


@pytest.mark.parametrize("case", ops.small(Shape("tiny", H=2, Hk=1, K=8, V=16, D=32, R=6, W=4)), ids=lambda c: c.name)
def test_small_cases_run_and_equal_plain_pytorch(case):
    args = case.make(Draw())
    expected = ops.plain_results(case.op, args)
    found = ops.results(case.op, args)
    assert found.keys() == expected.keys() and all(error < 5e-3 for error in ops.errors(found, expected).values())
    assert ops.served_by(case.op, case.make(Draw())) == "kernel"  # on a CPU: not plain PyTorch


def test_a_pool_is_among_the_results():
    case = ops.recurrent(Shape("tiny", H=2, Hk=1, K=8, V=16, D=32, R=6, W=4), 3, F32)
    args = case.make(Draw())
    found = ops.results(case.op, args)
    assert found["state"] is args[5] and len(found) == 2


def test_a_plain_path_is_named():
    script = """if True:
        from jetkernels import ops as _
        from benchmarks import ops
        from benchmarks.shapes import Draw, Shape
        case = ops.apply_conv(Shape("tiny", H=2, Hk=1, K=8, V=16, D=32, R=6, W=4), 1, 5)
        print(ops.served_by(case.op, case.make(Draw())))
    """
    environment = {**os.environ, "JETKERNELS_BACKEND": "plain"}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT, env=environment)
    assert done.stdout.strip() == "plain PyTorch: JETKERNELS_BACKEND=plain asks for it", done.stderr


def test_quick_measures_fewer_of_everything():
    whole, quick = ops.measured(list(SHAPES)), ops.measured(list(SHAPES), quick=True)
    assert {c.op for c in whole} == {c.op for c in quick} and len(quick) < len(whole) / 2
    assert len({c.name for c in whole}) == len(whole)


def test_inputs_repeat():
    for make in (delta_rule_inputs, conv_inputs):
        first, second = (make(few_heads(SHAPE_2B), 1, 3, F32) for _ in range(2))
        first, second = (list(x.values()) if isinstance(x, dict) else x for x in (first, second))
        assert all(a.equal(b) for a, b in zip(first, second))


# Tables


def test_table():
    rows = [{"op": "a|b", "us": 1234.5, "n": 7, "ok": True}, {"op": "c", "us": 0.00123, "extra": 1}]
    text = report.table(rows, {"op": "op", "us": "us", "n": "n", "ok": "fine", "gone": "gone"})
    assert text.splitlines() == [
        "| op   |      us |   n | fine |",
        "|------|--------:|----:|------|",
        "| a\\|b |   1,234 |   7 | yes  |",
        "| c    | 1.2e-03 |     |      |",
    ]
    assert report.table([], {"op": "op"}) == "(nothing)"


def test_reasons_are_grouped():
    rows = [{"op": f"op{i}", "skipped": "no time"} for i in range(6)] + [{"op": "x", "failed": "broken"}]
    assert report.reasons(rows) == ["* skipped: op0, op1, op2, op3 and 2 more: no time", "* failed: x: broken"]


# The parts of a run


def fake_part(tmp_path, monkeypatch, name: str, body: str, share: float = 1.0) -> on_gpu.Part:
    (tmp_path / f"fake_{name}.py").write_text(body)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setitem(report.TABLES, name, {"op": "op", "us": "us"})
    return on_gpu.Part(name, SimpleNamespace(__spec__=SimpleNamespace(name=f"fake_{name}")), share)


ROW = "import json, sys; f = open(sys.argv[sys.argv.index('--rows') + 1], 'a'); f.write(json.dumps({'op': 'x', 'us': 1.5}) + '\\n'); f.close()\n"


def test_a_part_that_fails_or_hangs_does_not_stop_the_others(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(on_gpu, "GRACE", 0.1)
    chosen = [
        fake_part(tmp_path, monkeypatch, "breaks", ROW + "raise RuntimeError('the reason')"),
        fake_part(tmp_path, monkeypatch, "hangs", ROW + "import time; time.sleep(60)", share=0.5),
        fake_part(tmp_path, monkeypatch, "idle", f"print('nothing here'); raise SystemExit({parts.SKIPPED})"),
        fake_part(tmp_path, monkeypatch, "works", ROW),
    ]
    done = on_gpu.run_all(chosen, tmp_path, 8, {}, [])
    assert [part["status"] for part in done] == ["failed", "out of time", "skipped", "ran"]
    assert [len(part["rows"]) for part in done] == [1, 1, 0, 1]
    assert "the reason" in done[0]["log_tail"] and done[2]["reason"] == "nothing here"
    written = json.loads((tmp_path / "results.json").read_text())
    assert [part["part"] for part in written["parts"]] == ["breaks", "hangs", "idle", "works"]
    summary = (tmp_path / "summary.md").read_text()
    assert "## breaks: failed" in summary and "RuntimeError: the reason" in summary and "## works: ran" in summary
    on_gpu.print_end(done, tmp_path)
    assert "out of time" in capsys.readouterr().out


def test_no_part_starts_when_the_time_is_over(tmp_path, monkeypatch):
    done = on_gpu.run_all([fake_part(tmp_path, monkeypatch, "late", ROW)], tmp_path, 0, {}, [])
    assert done[0]["status"] == "skipped" and "time" in done[0]["reason"]


def test_parts_are_selected_in_order():
    assert [p.name for p in on_gpu.chosen_parts("peers,tests,peers")] == ["peers", "tests"]
    with pytest.raises(ValueError, match="unknown part speed; there are tests, measure"):
        on_gpu.chosen_parts("tests,speed")
    assert [p.name for p in on_gpu.arguments_of(["out"]).parts] == [p.name for p in on_gpu.PARTS]
    assert all(p.name in report.TABLES for p in (*on_gpu.PARTS, on_gpu.LIBRARY))


def test_shares_fit_into_eight_minutes():
    assert on_gpu.SECONDS < 480


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens without a GPU")
def test_without_a_gpu_it_says_what_it_would_measure(tmp_path):
    done = subprocess.run([str(ROOT / "benchmarks" / "on_gpu.sh"), "out"], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == on_gpu.NO_GPU and not (tmp_path / "out").exists()
    assert "stands ready" in done.stdout and "no CUDA device" in done.stdout
    for part in on_gpu.PARTS:
        assert f"\n{part.name} (python -m benchmarks." in done.stdout
        assert part.module.describe()[0] in done.stdout


def test_rows_survive_and_resume(tmp_path):
    file = tmp_path / "rows"
    rows = parts.Rows(file)
    rows.attempt(parts.Clock(9), lambda: {"us": 1.0}, op="a")
    rows.attempt(parts.Clock(9), lambda: 1 / 0, op="b")
    rows.attempt(parts.Clock(0), lambda: {"us": 1.0}, op="c")
    rows.add(lost={"op": "d"}, failed="the device was lost")
    file.open("a").write('{"op": "cut o')
    resumed = parts.Rows(file, resume=True)
    assert resumed.has(op="a") and not resumed.has(op="e") and resumed.has(op="d", size="1")
    assert resumed.is_lost(op="d", peer="x") and not resumed.is_lost(op="a")
    assert "ZeroDivisionError" in resumed.rows[1]["failed"] and "time" in resumed.rows[2]["skipped"]


# What single parts make of the tools they run


def test_test_report_by_file(tmp_path):
    report_file = tmp_path / "r.xml"
    report_file.write_text(
        '<testsuites><testsuite><testcase classname="tests.test_a" name="1" time="0.5"/>'
        '<testcase classname="tests.test_a" name="2" time="0.5"><failure/></testcase>'
        '<testcase classname="tests.test_b" name="3" time="0"><skipped/></testcase></testsuite></testsuites>'
    )
    assert op_tests.by_file(report_file) == [
        {"file": "test_a", "passed": 1, "failures": 1, "not_run": 0, "seconds": 1.0},
        {"file": "test_b", "passed": 0, "failures": 0, "not_run": 1, "seconds": 0.0},
    ]


def test_no_test_on_cuda_is_a_failure(monkeypatch):
    monkeypatch.setattr(op_tests, "command", lambda report, quick: [sys.executable, "-c", "raise SystemExit(5)"])
    rows = parts.Rows()
    op_tests.run(rows, 30)
    assert "no test ran on CUDA" in rows.rows[-1]["failed"]


def test_sanitizer_verdicts():
    calls = "recurrent_gated_delta_rule 2b 3 bf16, fp32 pool: kernel\n"
    clean = sanitizer.verdict(calls + "========= ERROR SUMMARY: 0 errors\n", 0)
    assert clean == {"calls": 1, "findings": 0}
    found = sanitizer.verdict(calls + "========= RACECHECK SUMMARY: 2 hazards displayed (2 errors, 0 warnings)\n", sanitizer.FOUND)
    assert found["findings"] == 2 and "hazards" in found["failed"]
    assert "does not work here" in sanitizer.verdict("========= Error: Device not supported\n", 1)["skipped"]
    assert "exit code 1" in sanitizer.verdict("Traceback\nValueError: x\n", 1)["failed"]


def test_simulator_difference():
    x = torch.randn(50)
    assert simulator.difference(x, x) == {"rms_difference": 0.0, "max_difference": 0.0, "bitwise_equal": True}
    assert "failed" not in simulator.difference(x * (1 + 1e-6), x) and "failed" in simulator.difference(x * 1.01, x)
    nan = torch.full((3,), float("nan"))
    assert simulator.difference(nan, nan)["bitwise_equal"] and "failed" in simulator.difference(nan, x[:3])


def test_comparing_with_what_the_simulator_said(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch.Tensor, "cuda", lambda self: self.clone())
    entries = []
    for case in ops.small(few_heads(SHAPE_2B))[:2]:
        args = case.make(Draw())
        entries.append({"name": case.name, "op": case.op, "args": args, "results": ops.results(case.op, simulator.copies(args))})
    entries[1]["results"]["output 0"] *= 1.01
    file = tmp_path / "simulated.pt"
    torch.save({"commit": "abc", "entries": entries, "without_kernel": ["dynamic_conv"], "gemms": []}, file)
    rows = parts.Rows()
    simulator.compare(rows, parts.Clock(9), file)
    found = {(row.get("case"), row.get("output")): row for row in rows.rows}
    assert found[entries[0]["name"], "state"]["bitwise_equal"] and "failed" not in found[entries[0]["name"], "output 0"]
    assert "differ" in found[entries[1]["name"], "output 0"]["failed"] and found["dynamic_conv", None]["skipped"] == "no kernel"


def test_every_tool_of_the_sanitizer_runs(tmp_path, capsys):
    tool = tmp_path / "compute-sanitizer"
    tool.write_text('#!/bin/sh\necho "op 2b 3: kernel"\ncase $2 in\n racecheck) sleep 60;;\n *) echo "==== ERROR SUMMARY: 0 errors";;\nesac\n')
    tool.chmod(0o755)
    rows = parts.Rows()
    sanitizer.run_tools(rows, 1.0, "2b", str(tool))
    assert [row["tool"] for row in rows.rows] == list(sanitizer.TOOLS)
    assert rows.rows[0] == {"tool": "memcheck", "calls": 1, "findings": 0}
    assert rows.rows[1]["failed"] == "not finished in time; 1 calls were done"


def test_library_as_it_is_is_taken(monkeypatch):
    monkeypatch.setattr(library, "build_info", lambda: {"compiler": "c", "cuda_architectures": ["sm_90a"]})
    rows = parts.Rows()
    library.make_usable(rows)
    assert [row["step"] for row in rows.rows] == ["as it is"] and not parts.failed(rows.rows)


def test_architectures_of_a_library(tmp_path):
    (tmp_path / "library.so").write_bytes(b"\0-arch sm_90a \0\xff\0sm_90a\0sm_\0")
    assert library.architectures_of(tmp_path / "library.so") == ["sm_90a"]


def test_library_that_cannot_be_made_is_a_failure(monkeypatch):
    monkeypatch.setattr(library, "build_info", lambda: "ImportError: no")
    monkeypatch.setattr(library, "build_introspection", lambda: None)
    monkeypatch.setattr(library, "build_everything", lambda: (_ for _ in ()).throw(FileNotFoundError("cmake")))
    rows = parts.Rows()
    library.make_usable(rows)
    assert parts.failed(rows.rows) and any("cmake" in str(row.get("skipped")) for row in rows.rows)


# Counters


def launch(kernel: str, **changed) -> dict:
    names = ("tensor_flop", "global_read_bytes", "global_write_bytes", "global_read_sectors", "global_write_sectors", "bulk_read_bytes",
             "bulk_write_bytes", "shared_wavefronts", "shared_ideal_wavefronts")  # fmt: skip
    return {"kernel": kernel, "grid": (4, 1, 1), "counters": {**dict.fromkeys(names, 0), "instructions": {"ld": 3}, **changed}}


def test_counters_of_two_launches():
    case = ops.chunk(SHAPE_2B, 1, 64)
    launches = [
        launch("_ZN3jet7prepareEv", global_read_bytes=320, global_read_sectors=20, shared_wavefronts=3, shared_ideal_wavefronts=2),
        launch("_ZN3jet12sweep_kernelILi96EEEvv", bulk_read_bytes=430, tensor_flop=int(case.work.flop)),
    ]
    first, second, whole = counters.rows_of(case, launches)
    assert (first["kernel"], second["kernel"], whole["kernel"]) == ("prepare", "sweep_kernel", "all")
    assert first["per_sector"] == 0.5 and first["conflicts"] == 1.5 and first["bound_us"] == pytest.approx(640 / 4.3e6)
    assert whole["read"] == 750 and whole["flop_ratio"] == pytest.approx(1, rel=1e-6)
    assert whole["bound_us"] == pytest.approx(first["bound_us"] + second["bound_us"])


def test_an_op_without_kernel_is_named():
    assert counters.rows_of(ops.chunk(SHAPE_2B, 1, 64), [])[0]["kernel"] == "no kernel"


# Provenance and the CPU entry


def test_provenance(monkeypatch):
    found = facts.provenance("python -m benchmarks.run")
    assert {"device", "torch", "commit", "command", "date", "build"} <= found.keys()
    monkeypatch.setattr(facts, "_output", lambda *command: None)
    monkeypatch.setenv("JETKERNELS_COMMIT", "abc1234")
    assert facts.commit() == "abc1234"


def test_cpu_run_writes_json(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["run", "--only", "dynamic_conv_step", "--repeats", "1", "--output", str(tmp_path)])
    run.main()
    assert "generator GEMM" in capsys.readouterr().out
    (file,) = tmp_path.glob("*.json")
    rows = json.loads(file.read_text())["rows"]
    assert {row["dtype"] for row in rows} == set(cpu.DTYPES) and all(row["seconds"]["jetkernels"]["n"] == 1 for row in rows)
