"""What of the benchmarks can be checked without a GPU: floors, cases, tables, rows, counters."""

import json
import os
import subprocess
import sys
from functools import partial

import pytest
import torch
from support.model_cases import small_config
from support.paths import ROOT

import jetkernels  # noqa: F401  (registers torch.ops.jet)
from benchmarks import counters, cpu, floors, machine, model, ops, report, rows, run
from benchmarks import provenance as facts
from benchmarks.floors import H200, Ceilings, Work
from benchmarks.shapes import SHAPES, Draw, Shape, conv_inputs, delta_rule_inputs, few_heads
from jetkernels.model import JetNemotronConfig, JetNemotronForCausalLM

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
        assert floors.stored_taps(shape) / H200.bandwidth * 1e9 == pytest.approx(stored, abs=0.05)
    assert floors.conv_step(SHAPE_2B, 1).seconds(H200) == pytest.approx(2.2e-6, rel=0.02)
    assert floors.conv_step(SHAPE_4B, 1).seconds(H200) == pytest.approx(3.9e-6, rel=0.02)


def test_pointwise_floors():
    assert floors.swiglu(SHAPE_2B, 1).bytes == 53_760 and floors.swiglu(SHAPE_4B, 1).bytes == 66_048
    assert floors.delta_gates(SHAPE_2B, 10).bytes == 10 * 144 + 96


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


@pytest.mark.parametrize(
    "case", ops.small(Shape("tiny", H=2, Hk=1, K=8, V=16, D=32, R=6, W=4, F=20)), ids=lambda c: c.name
)
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


def test_measured_cases_have_names_of_their_own():
    cases = ops.measured(list(SHAPES))
    assert len({c.name for c in cases}) == len(cases)


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


def test_rows_are_kept_whatever_the_work_does():
    found = rows.Rows()
    found.attempt(rows.Clock(9), lambda: {"us": 1.0}, op="a")
    found.attempt(rows.Clock(9), lambda: 1 / 0, op="b")
    found.attempt(rows.Clock(0), lambda: {"us": 1.0}, op="c")
    assert found.rows[0] == {"op": "a", "us": 1.0} and rows.failed(found.rows)
    assert "ZeroDivisionError" in found.rows[1]["failed"] and "time" in found.rows[2]["skipped"]


# Counters


def launch(mangled: str, **changed) -> dict:
    names = (
        "tensor_flop",
        "global_read_bytes",
        "global_write_bytes",
        "global_read_sectors",
        "global_write_sectors",
        "bulk_read_bytes",
        "bulk_write_bytes",
        "shared_wavefronts",
        "shared_ideal_wavefronts",
    )
    return {
        "mangled": mangled,
        "grid": (4, 1, 1),
        "counters": {**dict.fromkeys(names, 0), "instructions": {"ld": 3}, **changed},
    }


def test_counters_of_two_launches():
    case = ops.chunk(SHAPE_2B, 1, 64)
    launches = [
        launch(
            "_ZN3jet7prepareEv",
            global_read_bytes=320,
            global_read_sectors=20,
            shared_wavefronts=3,
            shared_ideal_wavefronts=2,
        ),
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
    assert {"device", "torch", "commit", "command", "date", "build", "waiting"} <= found.keys()
    assert 0 < found["processors"]["got"] <= found["processors"]["count"] + 0.1
    monkeypatch.setattr(machine, "answer", lambda *command: None)
    monkeypatch.setenv("JETKERNELS_COMMIT", "abc1234")
    assert machine.commit() == "abc1234"


def test_cpu_run_writes_json(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["run", "--op", "dynamic_conv_step", "--repeats", "1", "--output", str(tmp_path)])
    run.main()
    assert "generator GEMM" in capsys.readouterr().out
    (file,) = tmp_path.glob("*.json")
    rows = json.loads(file.read_text())["rows"]
    assert {row["dtype"] for row in rows} == set(cpu.DTYPES) and all(
        row["seconds"]["jetkernels"]["n"] == 1 for row in rows
    )


# The whole model


def test_bytes_of_a_step_of_the_2b_model():
    """Those of the design at 64 K: weights 3.93 GB; of a sequence 57 MB of states read and written, 134 MB of keys."""
    published = JetNemotronForCausalLM(JetNemotronConfig.from_name("2b"), device="meta", dtype=torch.bfloat16)
    weights = sum(p.nbytes for p in published.parameters())
    works = {batch: model.step_work(published, batch, 64 * 1024) for batch in (0, 1, 128)}
    assert works[0].bytes == weights == pytest.approx(3.93e9, rel=1e-3)
    jet = 24 * 2 * (4 * 12 * 96 * 256 + 2 * 3072 * 3)
    keys = 2 * 2 * 2 * 2 * 128 * (2 * 64 * 1024 + 2 * 1152) // 2
    assert works[1].bytes - weights == jet + keys
    assert works[1].bytes == pytest.approx(4.12e9, rel=2e-3) and works[128].bytes == pytest.approx(28.8e9, rel=2e-3)


def test_products_of_a_model():
    small = JetNemotronForCausalLM.random(small_config(tie_word_embeddings=False))
    weights = model.product_weights(small)
    assert weights[-1] is small.lm_head.weight and all(w is not small.model.embed_tokens.weight for w in weights)
    linears = [module.weight for module in small.modules() if isinstance(module, torch.nn.Linear)]
    assert {id(w) for w in weights} == {id(w) for w in linears}
    products = model.Products(small, 7, 1)
    assert products.flop == sum(2 * 7 * w.numel() for w in weights[:-1]) + 2 * weights[-1].numel()
    products()


def test_every_part_of_the_model_run(monkeypatch, tmp_path, capsys):
    quantized, quantize_ = [], JetNemotronForCausalLM.quantize_
    monkeypatch.setattr(JetNemotronForCausalLM, "quantize_", lambda m, bits: quantized.append(quantize_(m, bits)))
    monkeypatch.setattr(model, "COPIED", 1 << 16)
    tiny = partial(model.measure, config=small_config(), prompt_tokens=9, lengths=(16, 64))
    monkeypatch.setattr(model, "measure", tiny)
    words = ["model", "--cases", "2x6", "1x1K", "--rounds", "3", "--output", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", words)
    model.main()
    (file,) = tmp_path.glob("*-model.json")
    found = json.loads(file.read_text())["rows"]
    decode, step, int8, prompt, short, long = found
    assert (decode["batch"], decode["context"], step["batch"], step["context"]) == (2, 6, 1, 1024)
    assert decode["floor_ms"] == max(decode["bytes_ms"], decode["products_ms"]) and decode["ratio"] > 0
    assert "lm_head" in quantized[0].replaced and int8["speed_up"] > 0 and prompt["tokens"] == 9 and prompt["ratio"] > 0
    assert (short["tokens"], short["against_first"], long["tokens"]) == (16, 1, 64)
    out = capsys.readouterr().out
    assert "time / floor" in out and rows.SAMPLES not in out


def test_an_interrupted_model_run_keeps_what_it_has(monkeypatch, tmp_path):
    def decode(small, batch, context, rounds):
        if batch == 2:
            raise KeyboardInterrupt
        return {"ms": 1.0, "n": rounds}

    monkeypatch.setattr(model, "decode", decode)
    monkeypatch.setattr(model, "measure", partial(model.measure, config=small_config()))
    monkeypatch.setattr(sys, "argv", ["model", "--cases", "1x6", "2x6", "--output", str(tmp_path)])
    with pytest.raises(KeyboardInterrupt):
        model.main()
    (file,) = tmp_path.glob("*-model.json")
    assert [row["batch"] for row in json.loads(file.read_text())["rows"]] == [1]


@pytest.mark.parametrize(("text", "case"), [("64x64K", (64, 65536)), ("1X4k", (1, 4096)), ("8x100", (8, 100))])
def test_a_case_of_the_model_run(text, case):
    assert model.case(text) == case
