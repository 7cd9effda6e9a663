"""What of the benchmarks can be checked without a GPU: floors, tables, the parts of a run, how peers are called."""

import contextlib
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from benchmarks import (
    adapters, counters, cpu, floors, library, measure, on_gpu, op_tests, ops, parts, peers, report, run, sanitizer, simulator, timing, versus,
)  # fmt: skip
from benchmarks import provenance as facts
from benchmarks.floors import H200, Ceilings, Work
from benchmarks.shapes import SHAPES, Draw, Shape, conv_inputs, delta_rule_inputs, few_heads
from cases import rms_error
from jetkernels import ops as _  # noqa: F401  (registers torch.ops.jet)

ROOT = Path(__file__).parent.parent
SHAPE_2B, SHAPE_4B, _SHAPE_128 = SHAPES
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
    if not ops.exists(case.op):
        pytest.skip("no such op yet")
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


# Peers: the adapters are exact, shown with our own op in the place of the peer


@pytest.fixture(params=[few_heads(shape) for shape in SHAPES], ids=lambda s: s.name)
def problem(request):
    shape = request.param
    inputs = delta_rule_inputs(shape, 2, 67, F32)
    ours = torch.ops.jet.chunk_gated_delta_rule(*inputs.values(), None, None, shape.K**-0.5, True)
    return shape, inputs, ours


def agrees(prepared, ours) -> None:
    run, read = prepared
    o, state = read(run())
    assert o.shape == ours[0].shape and state.shape == ours[1].shape
    assert rms_error(o, ours[0]) < 1e-5 and rms_error(state, ours[1]) < 1e-5


def chunk_of_128(q, k, v, g, beta, scale, output_final_state, use_qk_l2norm_in_kernel=False):
    """A peer that takes heads of 128 only."""
    assert q.shape[-1] == k.shape[-1] == v.shape[-1] == 128 and output_final_state
    return torch.ops.jet.chunk_gated_delta_rule(q, k, v, g, beta, None, None, scale, use_qk_l2norm_in_kernel)


def test_flash_qla_adapter(problem):
    _, inputs, ours = problem
    agrees(peers.flash_qla_chunk(chunk_of_128, inputs), ours)


def test_flashinfer_adapter(problem):
    _, inputs, ours = problem

    def peer(q, k, v, g, beta, scale, output_final_state, cu_seqlens):
        assert q.dim() == 3 and g.min() >= 0 and cu_seqlens.dtype == torch.int64
        tensors = (x[None] for x in (q, k, v, g.log(), beta))
        o, state = torch.ops.jet.chunk_gated_delta_rule(*tensors, None, cu_seqlens, scale, False)
        return o[0], state.transpose(-1, -2)

    agrees(peers.flashinfer_chunk(peer, inputs), ours)


def test_other_chunk_adapters(problem):
    import jetkernels

    _, inputs, ours = problem
    agrees(peers.fla_chunk(jetkernels.chunk_gated_delta_rule, inputs), ours)
    plain = next(peer for peer in peers.CHUNK if peer.name == "plain PyTorch")
    agrees(plain.prepare(plain.load(), inputs), ours)
    transformers = next(peer for peer in peers.CHUNK if peer.name == "transformers")
    agrees(transformers.prepare(transformers.load(), inputs), ours)


def test_recurrent_adapters():
    import jetkernels

    for shape in map(few_heads, SHAPES):
        inputs, a, b = adapters.rounded_gates(delta_rule_inputs(shape, 3, 1, F32))
        state = Draw(seed=1).normal(3, shape.H, shape.K, shape.V, scale=0.1)
        pool = state.clone()
        ours = torch.ops.jet.recurrent_gated_delta_rule(*inputs.values(), pool, None, shape.K**-0.5, True), pool

        def peer(q, k, v, state, A_log, a, dt_bias, b, scale, use_qk_l2norm):
            assert q.shape[-1] >= 128 and a.dtype == torch.bfloat16
            g = -A_log.exp() * torch.nn.functional.softplus(a.float() + dt_bias)
            return torch.ops.jet.recurrent_gated_delta_rule(q, k, v, g, b.float().sigmoid(), state, None, scale, use_qk_l2norm), state

        agrees(peers.flashinfer_recurrent(peer, inputs, state.clone(), a, b), ours)
        agrees(peers.fla_recurrent(jetkernels.fused_recurrent_gated_delta_rule, inputs, state.clone(), a, b), ours)
        for name in ("plain PyTorch", "transformers"):
            other = next(p for p in peers.RECURRENT if p.name == name)
            agrees(other.prepare(other.load(), inputs, state.clone(), a, b), ours)


def test_splitting_values_is_a_change_of_view():
    v = torch.randn(2, 3, 4, 256)
    assert adapters.split_values(v).data_ptr() == v.data_ptr()
    assert adapters.merged_values(adapters.split_values(v), 4).equal(v)
    S = torch.randn(2, 4, 96, 256)
    assert adapters.merged_states(adapters.split_states(S), 4).equal(S)


def test_rounded_gates_stay_close():
    inputs = delta_rule_inputs(few_heads(SHAPE_2B), 8, 5, F32)
    rounded, a, b = adapters.rounded_gates(inputs)
    assert a.dtype == b.dtype == torch.bfloat16
    assert rms_error(rounded["g"], inputs["g"]) < 5e-3 and rms_error(rounded["beta"], inputs["beta"]) < 5e-3


def test_unfused_convolution_is_the_op():
    values = conv_inputs(few_heads(SHAPE_2B), 2, 9, F32)
    ours = torch.ops.jet.dynamic_conv(*values, None, None, True)[0]
    assert rms_error(peers.unfused_dynamic_conv(*values), ours) < 1e-5


# Timing


class FakeCuda:
    """Events and graphs on a clock that only the calls move."""

    def __init__(self, monkeypatch, capturable: bool = True):
        self.now, self.capturing, self.capturable, fake = 0.0, None, capturable, self

        class Event:
            def __init__(self, enable_timing):
                assert enable_timing

            def record(self):
                self.at = fake.now

            def elapsed_time(self, end):
                return (end.at - self.at) * 1e3

        class Graph:
            def replay(self):
                fake.now += self.seconds

        @contextlib.contextmanager
        def capture(graph):
            if not fake.capturable:
                raise RuntimeError("operation not permitted when stream is capturing")
            fake.capturing = graph
            graph.seconds = 0.0
            yield
            fake.capturing = None

        for name, value in {"Event": Event, "CUDAGraph": Graph, "graph": capture, "synchronize": lambda: None}.items():
            monkeypatch.setattr(torch.cuda, name, value)

    def call(self, seconds: float):
        def run():
            if self.capturing is None:
                self.now += seconds + 20e-6  # what launching from the host costs
            else:
                self.capturing.seconds += seconds

        return run


def test_short_calls_are_timed_as_a_graph(monkeypatch):
    cuda = FakeCuda(monkeypatch)
    found = timing.device_time([cuda.call(5e-6), cuda.call(7e-6)])
    assert found.median == pytest.approx(6e-6) and found.method == "graph of 16" and found.n >= 10


def test_long_calls_are_timed_one_by_one(monkeypatch):
    cuda = FakeCuda(monkeypatch)
    found = timing.device_time([cuda.call(5e-3)])
    assert found.median == pytest.approx(5.02e-3) and found.method == "events" and found.n >= 7


def test_what_cannot_be_captured_says_so(monkeypatch):
    found = timing.device_time([FakeCuda(monkeypatch, capturable=False).call(5e-6)])
    assert found.median == pytest.approx(25e-6) and found.method.startswith("events, not capturable: operation not")


@pytest.fixture
def as_if_on_a_gpu(monkeypatch):
    """The measuring parts on CPU tensors: everything but the clock."""

    def host_time(calls, seconds=0.0):
        return timing.side_by_side({"x": calls[0]}, repeats=1, warmup=1)["x"]

    for module in (measure, versus):
        monkeypatch.setattr(module, "device_time", host_time)
        monkeypatch.setattr(module, "l2_bytes", lambda device: 1 << 12)
    monkeypatch.setattr(measure, "COPY_BYTES", 1 << 12)
    monkeypatch.setattr(measure, "PRODUCT", 16)
    monkeypatch.setattr(measure, "empty_launch", lambda: None)
    monkeypatch.setattr(parts, "device_is_lost", lambda: False)
    monkeypatch.setattr(ops, "DECODE_BATCHES", (1, 4))
    for module, name in ((ops, "CONV_LENGTHS"), (versus, "CONV_LENGTHS")):
        monkeypatch.setattr(module, name, (70,))
    for module, name in ((ops, "CHUNK_SIZES"), (versus, "CHUNK_SIZES")):
        monkeypatch.setattr(module, name, ((2, 70),))
    monkeypatch.setattr(versus, "RECURRENT_BATCHES", (2,))
    monkeypatch.setattr(ops, "VERIFY_BATCHES", (1,))
    return torch.device("cpu"), [few_heads(SHAPE_4B)]


def test_measuring_on_cpu_tensors(as_if_on_a_gpu):
    rows = parts.Rows()
    measure.measure(rows, parts.Clock(60), *as_if_on_a_gpu, model=False)
    timed = [row for row in rows.rows if "floor_us" in row]
    assert not parts.failed(rows.rows) and {row["op"] for row in timed} == {c.op for c in ops.measured([]) + ops.small(SHAPE_4B) if ops.exists(c.op)}
    assert all(row["us"] > 0 and row["reached_percent"] > 0 and row["n"] == 1 and row["served_by"] == "kernel" for row in timed)
    assert "TFLOP/s" in report.table(timed, report.TABLES["measure"])


def test_a_wrong_result_gets_no_time(as_if_on_a_gpu, monkeypatch):
    monkeypatch.setattr(ops, "plain_results", lambda op, args: {"o": torch.zeros(())})
    monkeypatch.setattr(ops, "results", lambda op, args: {"o": torch.ones(())})
    rows = parts.Rows()
    measure.measure(rows, parts.Clock(60), *as_if_on_a_gpu, only="dynamic_conv_step", model=False)
    judged = [row for row in rows.rows if row.get("op") == "dynamic_conv_step"]
    assert judged and all("wrong result" in row["failed"] and "us" not in row for row in judged)


def test_the_model_on_cpu_tensors(as_if_on_a_gpu, monkeypatch):
    from model_cases import small_config

    from jetkernels.model import JetNemotronForCausalLM

    monkeypatch.setattr(measure, "PROMPT", 8)
    model = JetNemotronForCausalLM.random(small_config()).eval()
    prefill, decode = measure.measure_model(model, 2, H200, SimpleNamespace(update=lambda: None))
    assert prefill["op"] == "model prefill" and decode["tokens_per_s"] > 0 and decode["floor_us"] > 0
    work, weights = measure.model_work(model, 3, 0), sum(p.nbytes for p in model.parameters())
    assert work.bytes > weights and measure.model_work(model, 3, 5).bytes > work.bytes


def test_peers_on_cpu_tensors(as_if_on_a_gpu):
    rows = parts.Rows()
    versus.versus(rows, parts.Clock(60), *as_if_on_a_gpu)
    timed = {(row["op"], row["peer"]): row for row in rows.rows if "times_ours" in row}
    assert not parts.failed(rows.rows)
    assert {("chunk_gated_delta_rule", "transformers"), ("dynamic_conv", "linear, unfold, sum"), ("dynamic_conv_step", "bare GEMM of the generator")} <= timed.keys()
    missing = [row["peer"] for row in rows.rows if "ModuleNotFoundError" in row.get("skipped", "")]
    assert "FlashQLA" in missing and "FlashQLA" in "".join(report.reasons(rows.rows))


def test_a_peer_that_differs_gets_no_time(as_if_on_a_gpu, monkeypatch):
    wrong = peers.Peer("wrong", lambda: None, lambda function, inputs: (lambda: (inputs["v"], None), lambda out: out))
    monkeypatch.setattr(peers, "CHUNK", (wrong,))
    rows = parts.Rows()
    versus.versus(rows, parts.Clock(60), *as_if_on_a_gpu)
    (row,) = (row for row in rows.rows if row.get("peer") == "wrong")
    assert "differs from ours" in row["failed"] and "us" not in row


def test_rotations():
    l2 = 50 << 20
    assert timing.rotations(10 * l2, l2) == 1 and timing.rotations(1, l2) == timing.LONGEST_GRAPH
    assert timing.rotations(l2, l2) * l2 >= timing.CACHES * l2


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


def test_library_as_it_is_is_taken(monkeypatch):
    monkeypatch.setattr(library, "build_info", lambda: {"compiler": "c", "cuda_architectures": ["sm_90a"]})
    rows = parts.Rows()
    library.make_usable(rows)
    assert [row["step"] for row in rows.rows] == ["as it is"] and not parts.failed(rows.rows)


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
