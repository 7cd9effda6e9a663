"""How the benchmarks measure: the clock on a GPU, what is done with a case, and that the peers are given the same
problem.
"""

import contextlib
import functools
import json
import tempfile
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from support.comparison import rms_error

import jetkernels
from benchmarks import adapters, measure, ops, peers, report, rows, timing
from benchmarks.floors import H200
from benchmarks.gpu_run import child, key, model, store, versus
from benchmarks.shapes import SHAPES, Draw, conv_inputs, delta_rule_inputs, few_heads

SHAPE_2B, SHAPE_4B = SHAPES[:2]
F32 = torch.float32


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

        fakes = {"Event": Event, "CUDAGraph": Graph, "graph": capture, "synchronize": lambda: None}
        fakes |= {"current_stream": lambda: "before", "set_stream": self.set_stream}
        for name, value in fakes.items():
            monkeypatch.setattr(torch.cuda, name, value)

    def set_stream(self, stream):
        self.stream = stream

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
    cuda = FakeCuda(monkeypatch, capturable=False)
    found = timing.device_time([cuda.call(5e-6)])
    assert cuda.stream == "before"
    assert found.median == pytest.approx(25e-6) and found.method.startswith("events, not capturable: operation not")


def test_rotations():
    l2 = 50 << 20
    assert timing.rotations(10 * l2, l2) == 1 and timing.rotations(1, l2) == timing.LONGEST_GRAPH
    assert timing.rotations(l2, l2) * l2 >= timing.CACHES * l2


# The measuring parts on CPU tensors

SMALL_SIZES = {"CONV_LENGTHS": (70,), "SHAPES": (few_heads(SHAPE_4B),), "DECODE_BATCHES": (1, 4)}


def small(name: str, sizes: tuple) -> tuple:
    return SMALL_SIZES.get(name, ((2, 70),) if isinstance(sizes[0], tuple) else (3,))


@pytest.fixture
def as_if_on_a_gpu(monkeypatch):
    """The measuring parts on CPU tensors: everything but the clock."""

    def host_time(calls, seconds=0.0):
        return timing.side_by_side({"x": calls[0]}, repeats=1, warmup=1)["x"]

    for module in (measure, versus, key):
        monkeypatch.setattr(module, "device_time", host_time)
        monkeypatch.setattr(module, "l2_bytes", lambda device: 1 << 12)
    by_name = functools.cache(versus.by_name.__wrapped__)  # the lists are other ones
    monkeypatch.setattr(versus, "by_name", by_name)
    monkeypatch.setattr(measure, "COPY_BYTES", 1 << 12)
    monkeypatch.setattr(measure, "PRODUCT", 16)
    monkeypatch.setattr(measure, "empty_launch", lambda: None)
    for module in (ops, versus):
        for name, value in list(vars(module).items()):
            if name.isupper() and isinstance(value, tuple) and isinstance(value[0], int | tuple):
                monkeypatch.setattr(module, name, small(name, value))
    return torch.device("cpu"), [few_heads(SHAPE_4B)]


@pytest.fixture
def context(as_if_on_a_gpu, tmp_path):
    return child.Context("peers", "x", tmp_path / "rows-x.jsonl", {"output": str(tmp_path), "device": "cpu"})


def peers_rows(context) -> dict[tuple[str, str], dict]:
    """(op, peer) -> row, as a child writes them."""
    for job in versus.jobs({}):
        for name in job.cases:
            child.do(versus, name, context)
    rows = store.known(context.output).values()
    return {(store.op_of(row["case"]), row["case"].partition(" / ")[2]): row for row in rows}


def test_measuring_on_cpu_tensors(as_if_on_a_gpu):
    found = rows.Rows()
    measure.measure(found, rows.Clock(60), *as_if_on_a_gpu, model=False)
    timed = [row for row in found.rows if "floor_us" in row]
    assert not rows.failed(found.rows) and {row["op"] for row in timed} == {
        c.op for c in ops.measured([]) + ops.small(SHAPE_4B) if ops.exists(c.op)
    }
    assert all(
        row["us"] > 0 and row["reached_percent"] > 0 and row["n"] == 1 and row["served_by"] == "kernel" for row in timed
    )
    assert "TFLOP/s" in report.table(timed, report.MEASURED)


def test_a_wrong_result_gets_no_time(as_if_on_a_gpu, monkeypatch):
    monkeypatch.setattr(ops, "plain_results", lambda op, args: {"o": torch.zeros(())})
    monkeypatch.setattr(ops, "results", lambda op, args: {"o": torch.ones(())})
    found = rows.Rows()
    measure.measure(found, rows.Clock(60), *as_if_on_a_gpu, op="dynamic_conv_step", model=False)
    judged = [row for row in found.rows if row.get("op") == "dynamic_conv_step"]
    assert judged and all("wrong result" in row["failed"] and "us" not in row for row in judged)


def test_the_model_on_cpu_tensors(as_if_on_a_gpu, monkeypatch):
    from support.model_cases import small_config

    from jetkernels.model import JetNemotronForCausalLM

    monkeypatch.setattr(measure, "PROMPT", 8)
    model = JetNemotronForCausalLM.random(small_config()).eval()
    prefill, decode = measure.measure_model(model, 2, H200, SimpleNamespace(update=lambda: None))
    assert prefill["op"] == "model prefill" and decode["tokens_per_s"] > 0 and decode["floor_us"] > 0


def test_steps_at_lengths_not_seen_on_cpu_tensors(as_if_on_a_gpu):
    from support.model_cases import small_config

    from jetkernels.model import JetNemotronForCausalLM

    row = model.unseen(JetNemotronForCausalLM.random(small_config()).eval(), 6, 4)
    assert row["slowest_us"] > 0 and row["times_again"] == row["us"] / row["again_us"] and row["n"] == 4


def test_decode_steps_on_cpu_tensors(as_if_on_a_gpu):
    from support.model_cases import small_model

    row = model.decode(small_model(), 2, 6, H200)
    assert row["us"] > 0 and row["eager_us"] > 0 and row["floor_us"] > 0 and row["same_tokens"] is True
    assert row["tokens_per_s"] == pytest.approx(2e6 / row["us"])


def test_key_on_cpu_tensors(context, monkeypatch):
    shape = few_heads(SHAPE_4B)
    few = (
        ops.chunk(shape, 2, 70),
        ops.conv(shape, 1, 70),
        ops.attention_step(shape, 2, 70),
        ops.jet_block_step(shape, 2),
    )
    cases = {case.name: case for case in few}
    monkeypatch.setattr(key, "cases", lambda: cases)
    context.part = "key"
    for name in (key.CEILINGS, *key.names_of(list(cases.values()))):
        if not name.endswith(key.KERNELS):
            child.do(key, name, context)
    found = {name: row for (_, name), row in store.known(context.output).items()}
    assert not rows.failed(list(found.values())) and found[key.CEILINGS]["gb_per_s"] > 0
    for name in cases:
        assert found[name]["floor_us"] > 0 and "note" not in found[name], "the ceilings of this run"
        assert found[name + key.PEER]["times_ours"] == pytest.approx(found[name + key.PEER]["us"] / found[name]["us"])


def test_peers_on_cpu_tensors(context):
    found = peers_rows(context)
    timed = {what for what, row in found.items() if "times_ours" in row}
    assert not rows.failed(list(found.values()))
    assert {
        ("chunk_gated_delta_rule", "transformers"),
        ("dynamic_conv", versus.UNFUSED),
        ("dynamic_conv_step", versus.GEMM),
    } <= timed
    assert "ModuleNotFoundError" in found["chunk_gated_delta_rule", "FlashQLA"]["skipped"]
    assert "FlashQLA" in "".join(report.reasons(list(found.values())))


def test_peers_of_a_broken_op_are_timed_alone(context):
    entry = {"op": "dynamic_conv", "shape": "4b", "case": "x", "status": "hang"}
    (context.output / store.BROKEN).write_text(json.dumps({"broken": [entry], "right": []}))
    row = versus.work(next(name for name in versus.jobs({})[0].cases if versus.UNFUSED in name), context)
    assert row["us"] > 0 and "times_ours" not in row


def test_a_peer_that_differs_gets_no_time(context, monkeypatch):
    wrong = peers.Peer("wrong", lambda: None, lambda function, inputs: (lambda: (inputs["v"], None), lambda out: out))
    monkeypatch.setattr(peers, "CHUNK", (wrong,))
    row = peers_rows(context)["chunk_gated_delta_rule", "wrong"]
    assert "differs from ours" in row["failed"] and "us" not in row


def test_what_tunes_itself_comes_after_what_does_not():
    for job in versus.jobs({}):
        tuning = [name.partition(" / ")[2] in versus.TUNING for name in job.cases]
        assert tuning == sorted(tuning)


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
            return torch.ops.jet.recurrent_gated_delta_rule(
                q, k, v, g, b.float().sigmoid(), state, None, scale, use_qk_l2norm
            ), state

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
    split = S.unflatten(-1, (-1, adapters.HEAD)).transpose(2, 3).flatten(1, 2)  # [N, H V/128, K, 128]
    assert adapters.merged_states(split, 4).equal(S)


def test_rounded_gates_stay_close():
    inputs = delta_rule_inputs(few_heads(SHAPE_2B), 8, 5, F32)
    rounded, a, b = adapters.rounded_gates(inputs)
    assert a.dtype == b.dtype == torch.bfloat16
    assert rms_error(rounded["g"], inputs["g"]) < 5e-3 and rms_error(rounded["beta"], inputs["beta"]) < 5e-3


def test_unfused_convolution_is_the_op():
    values = conv_inputs(few_heads(SHAPE_2B), 2, 9, F32)
    ours = torch.ops.jet.dynamic_conv(*values, None, None, True)[0]
    assert rms_error(peers.unfused_dynamic_conv(*values), ours) < 1e-5


def test_wheels_are_installed_without_a_network(tmp_path, monkeypatch):
    with zipfile.ZipFile(tmp_path / "a_peer-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("a_peer.py", "x = 1\n")
        wheel.writestr(
            "a_peer-1.0.dist-info/METADATA",
            "Metadata-Version: 2.1\nName: a-peer\nVersion: 1.0\nRequires-Dist: torch<1\n",
        )
        wheel.writestr(
            "a_peer-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nGenerator: x\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        wheel.writestr("a_peer-1.0.dist-info/RECORD", "")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    assert (Path(versus.install_wheels(tmp_path)) / "a_peer.py").read_text() == "x = 1\n"
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="no wheels in"):
        versus.install_wheels(tmp_path / "empty")
