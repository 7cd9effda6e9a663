"""The command line, run in this process through its entry point."""

import json
import math

import pytest
import torch

from jetkernels.__main__ import main
from jetkernels.cli import demo
from jetkernels.cli.info import OPS
from jetkernels.model import JetNemotronConfig, JetNemotronForCausalLM, Tokenizer


@pytest.fixture
def tiny_config(tmp_path):
    path = tmp_path / "tiny.json"
    JetNemotronConfig(**{**demo.CONFIG, "hidden_size": 48, "intermediate_size": 64}).save(path)
    return path


@pytest.fixture
def tiny_model(tmp_path, tiny_config):
    folder = tmp_path / "model"
    JetNemotronForCausalLM.random(JetNemotronConfig.from_file(tiny_config)).save_pretrained(folder)
    Tokenizer.byte_level().save_pretrained(folder)
    return folder


def test_info_names_every_op_and_its_backend(capsys):
    assert main(["info"]) == 0
    text = capsys.readouterr().out
    assert len(OPS) == 7
    for op in OPS:
        assert any(line.split()[:1] == [op] and "C++ (" in line for line in text.splitlines()), op


def test_info_json(capsys):
    assert main(["info", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["torch"] == torch.__version__
    assert set(facts["backends"]["cpu"]) == set(OPS)


def test_generate_streams_the_text_that_the_model_makes(capsys, tiny_model):
    assert main(["generate", "--model", str(tiny_model), "--prompt", "def f", "--max-new-tokens", "12", "--device", "cpu"]) == 0
    streamed = capsys.readouterr().out
    model, tokenizer = JetNemotronForCausalLM.from_pretrained(tiny_model), Tokenizer.from_pretrained(tiny_model)
    ids = torch.tensor([tokenizer.encode("def f")])
    expected = tokenizer.decode(model.generate(ids, max_new_tokens=12)[0, ids.shape[1] :])
    assert streamed == expected + "\n"


def test_generate_with_random_weights_prints_ids(capsys, tiny_config):
    arguments = ["generate", "--config", str(tiny_config), "--random-weights", "--device", "cpu"]
    assert main([*arguments, "--prompt-ids", "1,2,3", "--max-new-tokens", "5", "--temperature", "1"]) == 0
    ids = [int(part) for part in capsys.readouterr().out.split()]
    assert 1 <= len(ids) <= 5 and all(0 <= i < 257 for i in ids)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["generate", "--config", "2b", "--prompt", "x"], "add --random-weights"),
        (["generate", "--config", "7b", "--random-weights"], "must be one of 2b, 4b"),
        (["generate", "--model", "no-such-folder", "--prompt", "x"], "no-such-folder"),
        (["generate", "--config", "TINY", "--random-weights", "--prompt-ids", "1,999"], "below the vocabulary size 257"),
        (["generate", "--config", "TINY", "--random-weights", "--prompt-ids", "1,x"], "--prompt-ids must be integers"),
        (["throughput", "--config", "TINY", "--random-weights", "--batch", "0"], "--batch must be at least 1"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_wrong_arguments_end_with_one_line(capsys, tiny_config, arguments, sentence):
    arguments = [str(tiny_config) if a == "TINY" else a for a in arguments]
    assert main(arguments) == 1
    error = capsys.readouterr().err
    assert sentence in error.splitlines()[-1] and "Traceback" not in error


def test_throughput_reports_speed_and_cache(capsys, tiny_config):
    arguments = ["--batch", "2", "--prompt-length", "20", "--new-tokens", "3", "--repeats", "1", "--json", "--device", "cpu"]
    assert main(["throughput", "--config", str(tiny_config), "--random-weights", *arguments]) == 0
    result = json.loads(capsys.readouterr().out)
    model = JetNemotronForCausalLM.random(JetNemotronConfig.from_file(tiny_config))
    assert result["cache_mib"] == model.new_cache(2, 23).nbytes / 2**20
    assert result["prefill_tokens_per_second"] > 0 and result["decode_tokens_per_second"] > 0


UNUSED = ("apply_dynamic_conv", "recurrent_gated_delta_rule_verify", "recurrent_gated_delta_rule_commit")  # by the model


def test_demo_trains_saves_and_completes(capsys, tmp_path, monkeypatch):
    """The whole demo in a few seconds; so short a training may miss the loss that a full one must reach."""
    monkeypatch.setattr(demo, "WORST_LOSS", math.inf)
    assert main(["demo", "--minutes", "0.06", "--output", str(tmp_path / "out")]) == 0
    text = capsys.readouterr().out
    assert (tmp_path / "out" / "loss.png").read_bytes().startswith(b"\x89PNG")
    for op in [*OPS, "chunk_gated_delta_rule_backward", "dynamic_conv_backward"]:
        assert op in text or op in UNUSED, op
    assert "decode against prefill" in text
    assert main(["generate", "--model", str(tmp_path / "out"), "--prompt", "def ", "--max-new-tokens", "4"]) == 0
