"""`--quantize` and `--loss-text`: what they print, what they refuse, what memory they ask for."""

import re

import pytest
import torch

from jetkernels.__main__ import main
from jetkernels.cli import demo, memory, models
from jetkernels.model import JetNemotronConfig, JetNemotronForCausalLM, Tokenizer
from jetkernels.model.text_loss import CHUNK, text_loss

TEXT = "def area(shape):\n    return shape.width * shape.height\n" * 4


@pytest.fixture
def folder(tmp_path):
    config = JetNemotronConfig(**demo.CONFIG | {"hidden_size": 96, "intermediate_size": 64, "initializer_range": 0.3})
    JetNemotronForCausalLM.random(config).save_pretrained(tmp_path / "model")
    Tokenizer.byte_level().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def generate(folder, capsys):
    """Runs `jetkernels generate` and gives exit code, standard output and standard error."""

    def run(*options):
        command = ["generate", "--model", str(folder), "--device", "cpu", "--max-new-tokens", "6", *map(str, options)]
        return main(command), *capsys.readouterr()

    return run


def quantised(folder, bits):
    model = JetNemotronForCausalLM.from_pretrained(folder).eval()
    return model, JetNemotronForCausalLM.from_pretrained(folder, quantize=bits).eval()


@pytest.mark.parametrize(("option", "bits"), [("int8", 8), ("int4", 4)])
def test_the_loss_before_and_after_is_that_of_both_models(generate, folder, tmp_path, option, bits):
    (tmp_path / "text").write_text(TEXT)
    code, out, err = generate("--prompt", "x", "--quantize", option, "--loss-text", tmp_path / "text")
    ids = torch.tensor(list(TEXT.encode()))
    before, after = (text_loss(model, ids) for model in quantised(folder, bits))
    assert code == 0 and f"loss {before:.4f} -> {after:.4f} nats per token ({len(ids) - 1} tokens of --loss-text" in err
    prompt = torch.tensor([list(b"x")])
    need = quantised(folder, bits)[1].generate(prompt, max_new_tokens=6)[0, 1:]
    assert out == Tokenizer.from_pretrained(folder).decode(need) + "\n"


def test_a_long_prompt_is_text_enough_and_a_short_one_is_not(generate):
    assert re.search(
        r"-> [\d.]+ nats per token \(99 tokens of the prompt\)",
        generate("--quantize", "int8", "--prompt", TEXT[:100])[2],
    )
    code, _, err = generate("--quantize", "int8", "--prompt", TEXT[:63])
    assert code == 0 and "to see what it costs in loss give --loss-text, a text of at least 64 tokens" in err


def test_where_only_the_quantised_weights_fit(generate, monkeypatch, folder):
    """Then no others are ever loaded, and the loss before is not known."""
    need = text_loss(quantised(folder, 4)[1], torch.tensor(list(TEXT[:100].encode())))
    config = JetNemotronConfig.from_file(folder)
    whole, small = (memory.weight_bytes(config, torch.float32, bits) for bits in (None, 4))
    monkeypatch.setattr(memory, "available_bytes", lambda device: (whole + small) // 2)
    load = JetNemotronForCausalLM.from_pretrained
    monkeypatch.setattr(
        JetNemotronForCausalLM, "from_pretrained", lambda *a, **o: load(*a, **o) if o["quantize"] else pytest.fail()
    )
    code, _, err = generate("--quantize", "int4", "--prompt", TEXT[:100])
    assert code == 0 and f"loss {need:.4f} nats per token (99 tokens of the prompt; unquantised the weights do" in err
    code, _, err = generate("--prompt", TEXT[:100])
    assert code == 1 and "weights and a cache of 1 x 106 tokens need at least" in err


def test_random_weights_have_no_loss_to_speak_of(tmp_path, capsys):
    JetNemotronConfig(**demo.CONFIG).save(tmp_path / "config.json")
    command = ["throughput", "--config", str(tmp_path / "config.json"), "--random-weights", "--device", "cpu"]
    assert main([*command, "--quantize", "int8", "--new-tokens", "2", "--prompt-length", "3", "--repeats", "1"]) == 0
    err = capsys.readouterr().err
    assert re.search(r"int8: [\d.]+ MiB of weights instead of [\d.]+; random weights predict nothing", err)


@pytest.mark.parametrize(
    ("options", "content", "code", "says"),
    [
        (["--quantize", "int2"], TEXT, 2, "--quantize: invalid choice: 'int2'"),
        (["--loss-text", "TEXT"], TEXT, 2, "--loss-text goes with --quantize"),
        (["--quantize", "int8", "--loss-text", "TEXT"], "short", 1, "must have at least 64 tokens, got 5"),
        (["--quantize", "int8", "--loss-text", "TEXT"], b"\xff" * 100, 1, "must be UTF-8 text"),
        (["--quantize", "int8", "--loss-text", "MISSING"], TEXT, 1, "MISSING: No such file"),
    ],
)
def test_wrong_options(generate, monkeypatch, tmp_path, options, content, code, says):
    monkeypatch.setattr(models, "_load", lambda *a: pytest.fail("weights were loaded"))
    file = tmp_path / "text"
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    got, _, err = generate("--prompt", "x", *(file if option == "TEXT" else option for option in options))
    assert got == code and says in err.splitlines()[-1]


@pytest.mark.parametrize("bits", [None, 8, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tied", [True, False])
def test_weight_bytes_are_those_of_the_model(bits, dtype, tied):
    config = JetNemotronConfig(**demo.CONFIG | {"tie_word_embeddings": tied})
    model = JetNemotronForCausalLM.random(config, dtype=dtype, quantize=bits)
    assert memory.weight_bytes(config, dtype, bits) == sum(
        tensor.nbytes for tensor in (*model.parameters(), *model.buffers())
    )


def test_the_loss_of_a_text_is_that_of_one_call(folder):
    model = JetNemotronForCausalLM.from_pretrained(folder).eval()
    ids = torch.randint(256, (CHUNK + 44,), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        need = model(ids[None], labels=ids[None]).loss
    assert text_loss(model, ids) == pytest.approx(float(need), rel=1e-4)
    with pytest.raises(ValueError, match=r"ids must be \[T\] with T >= 2, got \[1\]"):
        text_loss(model, ids[:1])
