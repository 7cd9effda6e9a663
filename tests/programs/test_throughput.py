"""`jetkernels throughput --against`: what fits, what is measured, what is written, also where the run is cut off."""

import json

import pytest
import torch
from support.model_cases import WINDOW, small_config

from jetkernels import _machine
from jetkernels.__main__ import main
from jetkernels.cli import against, memory, throughput
from jetkernels.cli.against import Contender, Plan
from jetkernels.model import JetNemotronForCausalLM
from jetkernels.model.speed import WARM_UP_STEPS, Decoder

F32 = torch.float32


@pytest.fixture
def command(tmp_path):
    small_config().save(tmp_path / "hybrid.json")
    small_config(["attn"] * 2).save(tmp_path / "attention.json")
    common = ["--random-weights", "--device", "cpu", "--against", tmp_path / "attention.json", "--new-tokens", 2]
    return ["throughput", "--config", tmp_path / "hybrid.json", *common, "--memory", 0.05]


def run(*arguments) -> int:
    return main(list(map(str, arguments)))


def contender(config, **changes) -> Contender:
    def load():
        return JetNemotronForCausalLM.random(config, dtype=F32).eval()

    return Contender("a", config, F32, load, Decoder, throughput._prefill, **changes)


def plan(**changes) -> Plan:
    values = dict(device="cpu", contexts=(8,), batches=(1,), limit=1e9, steps=2, seconds=1, prefill_chunk=None)
    return Plan(**values | {"until": float("inf")} | changes)


# What fits


@pytest.mark.parametrize("kinds", [["jet", "swa", "attn"], ["attn"] * 2])
def test_the_largest_batch_is_the_last_that_fits(kinds):
    one, tokens = contender(small_config(kinds)), WINDOW + 9
    for limit in (one.needed(0, tokens), one.needed(1, tokens) - 1, one.needed(1, tokens), 1e6, 1e7 + 1):
        batch = one.largest_batch(tokens, limit)
        assert one.needed(batch, tokens) <= limit or batch == 0
        assert one.needed(batch + 1, tokens) > limit
    assert one.largest_batch(tokens, 0) == 0 and one.largest_batch(tokens, 1e15) == against.LARGEST_BATCH


def test_the_memory_of_each_is_what_model_and_cache_take():
    config = small_config()
    one, model = contender(config), JetNemotronForCausalLM.random(config)
    held = one.bytes_of(3, WINDOW + 5)
    cache = model.new_cache(3, WINDOW + 5)
    assert held.pop("weights") == sum(p.numel() * 4 for p in model.parameters())
    assert held == {
        kind: sum(t.nbytes for layer, k in zip(cache.layers, config.layer_types) if k == kind for t in layer)
        for kind in ("jet", "swa", "attn")
    }
    assert one.needed(3, WINDOW + 5) > sum(held.values()) + one.weight_bytes
    twice = contender(config, copied_layers=config.num_hidden_layers)
    assert twice.needed(3, 9) - one.needed(3, 9) == memory.cache_bytes(config, F32, 3, 9)


def test_the_peak_counts_from_its_reset():
    memory.reset_peak("cpu")
    before = memory.peak_bytes("cpu")
    held = torch.ones(1 << 26, dtype=torch.uint8)
    assert memory.peak_bytes("cpu") - before > held.nbytes // 2
    del held
    memory.reset_peak("cpu")
    assert memory.peak_bytes("cpu") - before < 1 << 25


# What is measured


def test_rows():
    chosen = plan(contexts=(8, 20), batches=(2, 5), prefill_chunk=4)
    rows = list(against.measure([contender(small_config())], chosen))
    assert [(row["context"], row["batch"]) for row in rows] == [(c, b) for c in (8, 20) for b in (1, 2, 5)]
    for row in rows:
        if row["batch"] == 1:
            assert row["prefill_tokens_per_second"] == row["context"] / row["prefill_seconds"]
        else:
            assert row["tokens_per_second"] == pytest.approx(row["batch"] / row["step_ms"] * 1e3) and row["n"] == 2
            assert row["memory_gb"].keys() == {"weights", "jet", "swa", "attn"}


def test_what_does_not_fit_says_what_it_needs():
    one = contender(small_config())
    limit = one.needed(3, 8 + 2 + WARM_UP_STEPS) / (1 - against.RESERVE) + 1
    rows = list(against.measure([one], plan(contexts=(8, 4096), batches=(3, 4), limit=limit)))
    assert ["skipped" in row for row in rows] == [False, True, True, True]
    assert rows[1]["skipped"] == f"4 x 14 tokens need {one.needed(4, 14) / 0.95 / 1e9:.1f} GB"
    (row,) = against.measure([one], plan(batches=None, limit=1.0))
    assert row["batch"] == 0 and "1 x 14 tokens need" in row["skipped"]


def test_the_largest_batch_is_measured_by_default():
    one = contender(small_config())
    (row,) = against.measure([one], plan(batches=None, limit=one.needed(7, 14) / (1 - against.RESERVE) + 1))
    assert row["batch"] == 7 and row["tokens_per_second"] > 0


def test_models_side_by_side_keep_no_more_memory_than_glibc_does(monkeypatch, command):
    done = []
    monkeypatch.setattr(_machine, "keep_freed_memory", done.append)
    contenders = throughput._contenders
    monkeypatch.setattr(throughput, "_contenders", lambda arguments: (done.append("models"), contenders(arguments))[1])
    assert run(*command) == 0
    assert done == [_machine.KEPT_BY_GLIBC, "models"]


def test_no_model_is_loaded_when_the_time_is_over():
    one = Contender("a", small_config(), F32, lambda: pytest.fail("loaded"), Decoder, throughput._prefill)
    (row,) = against.measure([one], plan(until=0))
    assert row["skipped"] == "the time was over"


def test_a_step_that_runs_out_of_memory_ends_one_row():
    def decoder(model, batch, context, steps):
        if context == 8:
            raise RuntimeError(
                "[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"
            )
        return Decoder(model, batch, context, steps)

    one = contender(small_config())
    one = Contender(one.name, one.config, F32, one.load, decoder, one.prefill)
    first, second = against.measure([one], plan(contexts=(8, 9)))
    assert first["skipped"] == "out of memory" and second["n"] == 2
    broken = Contender(one.name, one.config, F32, one.load, lambda *a: 1 / 0, one.prefill)
    with pytest.raises(ZeroDivisionError):
        list(against.measure([broken], plan()))


def test_speed_ups_are_those_of_the_best_batches():
    def row(model, context, tokens_per_second):
        return {"model": model, "context": context, "tokens_per_second": tokens_per_second}

    rows = [row("a", 8, 6.0), row("a", 8, 4.0), row("a", 9, 5.0), row("b", 8, 2.0), row("c", 7, 1.0)]
    rows += [{"model": "b", "context": 9, "skipped": "the time was over"}]
    assert against.speed_ups(rows) == {"b": {8: 3.0}, "c": {}}
    assert against.summary(rows).splitlines() == [
        "a against b, tokens/s by context: 8 3.0x",
        "a against c, tokens/s by context: no context in common",
    ]
    assert against.speed_ups([]) == {} and against.summary(rows[:3]) == ""


# The command


def test_a_run_prints_and_writes_what_it_measured(capsys, tmp_path, command):
    pytest.importorskip("transformers")
    options = ["--contexts", "16,1K", "--batches", "1,3", "--peer", "transformers", "--output", tmp_path / "out"]
    assert run(*command, *options) == 0
    header, *table, first, second = capsys.readouterr().out.splitlines()
    assert header == against.HEADER and len(table) == 3 * 2 * 2 and all("weights" in line for line in table)
    assert first.startswith("hybrid against attention, tokens/s by context: 16 ") and "1,024 " in first
    assert second.startswith("hybrid against Qwen3 of transformers")
    written = json.loads((tmp_path / "out" / "throughput.json").read_text())
    assert {"device", "threads", "torch", "commit", "command", "date"} <= written["provenance"].keys()
    assert list(written["models"]) == list(dict.fromkeys(row["model"] for row in written["rows"]))
    assert len(written["rows"]) == 12 and all(row["n"] == 2 for row in written["rows"])
    assert (tmp_path / "out" / "throughput.png").read_bytes().startswith(b"\x89PNG")


def test_an_interrupted_run_keeps_what_it_has(capsys, tmp_path, command, monkeypatch):
    measured = throughput.against.time_steps

    def time_steps(*arguments):
        if written.exists():
            raise KeyboardInterrupt
        return measured(*arguments)

    written = tmp_path / "out" / "throughput.json"
    monkeypatch.setattr(throughput.against, "time_steps", time_steps)
    assert run(*command, "--contexts", "8,9", "--output", tmp_path / "out") == 130
    (row,) = json.loads(written.read_text())["rows"]
    assert row["context"] == 8 and (tmp_path / "out" / "throughput.png").exists()
    assert len(capsys.readouterr().out.splitlines()) == 2


def test_json_is_all_that_standard_output_gets(capsys, command):
    assert run(*command, "--contexts", "8", "--batches", "1", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert [row["batch"] for row in found["rows"]] == [1, 1] and found["memory_limit_gb"] == 0.05


def test_without_matplotlib_the_numbers_are_measured_all_the_same(capsys, tmp_path, command, monkeypatch):
    def need():
        raise ModuleNotFoundError("a plot needs the package matplotlib")

    monkeypatch.setattr("jetkernels.postnas.report.plots.need", need)
    assert run(*command, "--contexts", "8", "--batches", "1", "--output", tmp_path / "out") == 0
    assert "no throughput.png: a plot needs the package matplotlib" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["throughput.json"]


@pytest.mark.parametrize(
    ("options", "says", "code"),
    [
        (["--batch", "2"], "--batch does not go with --against", 2),
        (["--prompt-length", "2"], "--prompt-length does not go with --against", 2),
        (["--contexts", "1K,x"], "--contexts must be numbers of tokens, such as 512,4K, got '1K,x'", 2),
        (["--contexts", "0"], "--contexts must be numbers of tokens from 1 to 268435456, got '0'", 2),
        (["--memory", "0"], "--memory must be above 0, got 0", 2),
        (["--memory", "1e9"], "--memory 1e+09: models need at least", 1),
        (["--against", "2c"], "config: name must be one of 2b, 4b, full-attention, got '2c'", 1),
        (["--against", "2b", "--peer", "transformers"], "attn layers only, the config has jet, swa", 1),
    ],
    ids=str,
)
def test_wrong_options_end_with_one_line(capsys, command, monkeypatch, options, says, code):
    monkeypatch.setattr(throughput.against, "measure", lambda *arguments: pytest.fail("measured"))
    assert run(*command, *options) == code
    assert says in capsys.readouterr().err.splitlines()[-1]


def test_options_of_a_comparison_need_one(capsys, command):
    where = command.index("--against")
    alone = [*command[:where], *command[where + 2 :]]
    assert run(*alone) == 2
    assert "--memory goes with --against" in capsys.readouterr().err


@pytest.mark.parametrize(("text", "counts"), [("1K, 4k,512", (512, 1024, 4096)), ("7,7", (7,)), ("256K", (262144,))])
def test_token_counts(text, counts):
    assert throughput.token_counts(text) == counts
