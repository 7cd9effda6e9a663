"""A folder that one of the two models saved is read by the other; what a hub has, by its name."""

import json
import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.hf_cases import of
from support.model_cases import small_model, tokens
from support.paths import ROOT
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from jetkernels.__main__ import main
from jetkernels.model import JetNemotronForCausalLM, Tokenizer
from jetkernels.modules.joined import joined

IDS = tokens(2, 9)
BYTES = {"vocab_size": 257, "eos_token_id": 256, "pad_token_id": 256, "bos_token_id": None, "initializer_range": 0.3}
TEMPLATE = "{% for message in messages %}{{ message.content }}{% endfor %}"


def saved_by_ours(folder, dtype=torch.float32, **changes):
    model = small_model(dtype=dtype, **BYTES | changes).eval()
    model.save_pretrained(folder)
    Tokenizer.byte_level().save_pretrained(folder)
    return model


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "own head"])
def test_ours_to_theirs_and_back(tmp_path, dtype, tied):
    ours = saved_by_ours(tmp_path, dtype, tie_word_embeddings=tied)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto")
    gates = ours.model.layers[0].self_attn.A_log.dtype
    assert theirs.dtype == dtype and theirs.model.layers[0].self_attn.A_log.dtype == gates
    assert not theirs.training and theirs.generation_config.eos_token_id == 256
    assert torch.equal(theirs(IDS).logits, ours(IDS).logits)
    for layer in theirs.model.layers:
        assert joined(tuple(layer.mlp.projections().values())) is not None
    theirs.save_pretrained(tmp_path / "again", max_shard_size="20KB")
    assert len(list((tmp_path / "again").glob("*.safetensors"))) > 1
    again = JetNemotronForCausalLM.from_pretrained(tmp_path / "again", dtype="auto")
    assert again.state_dict().keys() == ours.state_dict().keys()
    assert all(torch.equal(again.state_dict()[name], tensor) for name, tensor in ours.state_dict().items())
    known = again.config.to_dict()
    assert {key: known[key] for key in ours.config.to_dict()} == ours.config.to_dict() | {
        "torch_dtype": str(dtype).removeprefix("torch.")
    }


def test_a_cast_leaves_the_gates_in_fp32(tmp_path):
    saved_by_ours(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    kinds = {p.dtype for name, p in model.named_parameters() if name.endswith(("A_log", "dt_bias"))}
    assert model.dtype == torch.bfloat16 and kinds == {torch.float32}
    assert model.config.to_dict()["dtype"] == "bfloat16"


def test_template_and_generation_config_travel(tmp_path):
    saved_by_ours(tmp_path / "one")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "one")
    assert tokenizer("héllo").input_ids == list("héllo".encode())
    tokenizer.chat_template = TEMPLATE
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "one")
    model.generation_config = GenerationConfig(eos_token_id=[256, 10], pad_token_id=256, do_sample=True, top_p=0.7)
    model.save_pretrained(tmp_path / "two")
    tokenizer.save_pretrained(tmp_path / "two")
    JetNemotronForCausalLM.from_pretrained(tmp_path / "two").save_pretrained(tmp_path / "three")
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "three").generation_config
    assert found.top_p == 0.7 and found.do_sample and found.eos_token_id == [256, 10]
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "three")
    chat = [{"role": "user", "content": "ab"}]
    assert tokenizer.apply_chat_template(chat, return_dict=False) == list(b"ab")


def test_the_command_completes_what_transformers_saved(tmp_path, capsys):
    ours = saved_by_ours(tmp_path / "one")
    AutoModelForCausalLM.from_pretrained(tmp_path / "one").save_pretrained(tmp_path / "two")
    AutoTokenizer.from_pretrained(tmp_path / "one").save_pretrained(tmp_path / "two")
    arguments = ["generate", "--prompt", "def", "--max-new-tokens", "5", "--json", "--device", "cpu"]
    assert main([*arguments, "--model", str(tmp_path / "two")]) == 0
    found = json.loads(capsys.readouterr().out)
    expected = ours.generate(torch.tensor([list(b"def")]), max_new_tokens=5)[0, 3:].tolist()
    assert found["ids"] == [token for token in expected if token != 256]


def test_missing_weights_are_drawn_and_the_others_stay(tmp_path):
    ours = saved_by_ours(tmp_path, torch.bfloat16)
    file = tmp_path / "model.safetensors"
    gone = ("model.layers.0.self_attn.A_log", "model.layers.0.self_attn.q_proj.weight", "model.norm.weight")
    state = load_file(file)
    for name in gone:
        del state[name]
    save_file(state, file, metadata={"format": "pt"})
    model, report = AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto", output_loading_info=True)
    assert set(report["missing_keys"]) == set(gone)
    found, expected = model.state_dict(), ours.state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items() if name not in gone)
    rates, weight, norm = (found[name] for name in gone)
    assert rates.dtype == torch.float32 and (rates >= 0).all() and (rates < 3).all() and rates.std() > 0
    assert weight.std().item() == pytest.approx(0.3, rel=0.2) and (norm == 1).all()


@torch.no_grad()
def test_layers_on_the_disk(tmp_path):
    pytest.importorskip("accelerate", reason="needs the package accelerate")
    ours = saved_by_ours(tmp_path)
    places = {"model.embed_tokens": "cpu", "lm_head": "cpu", "model.norm": "cpu"}
    places |= {f"model.layers.{i}": "disk" if i % 2 else "cpu" for i in range(4)}
    model = AutoModelForCausalLM.from_pretrained(tmp_path, device_map=places, offload_folder=tmp_path / "offloaded")
    assert model.model.layers[1].mlp.gate_proj.weight.is_meta
    torch.testing.assert_close(model(IDS).logits, ours(IDS).logits, rtol=1e-4, atol=1e-4)
    got = model.generate(IDS, max_new_tokens=5, do_sample=False)
    assert torch.equal(got, ours.generate(IDS, max_new_tokens=5))
    for place in ("cpu", "auto"):
        whole = AutoModelForCausalLM.from_pretrained(tmp_path, device_map=place)
        assert torch.equal(whole(IDS).logits, ours(IDS).logits)


def test_a_name_on_the_hub(tmp_path, monkeypatch):
    """What huggingface_hub has downloaded is found by the model's name; there is no network here."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    commit = "0" * 40
    repository = tmp_path / "models--some-lab--Jet-Nemotron-2B"
    ours = saved_by_ours(repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    where = {"cache_dir": tmp_path}
    model = AutoModelForCausalLM.from_pretrained("some-lab/Jet-Nemotron-2B", **where)
    assert torch.equal(model(IDS).logits, ours(IDS).logits)
    assert AutoTokenizer.from_pretrained("some-lab/Jet-Nemotron-2B", **where)("a").input_ids == [97]
    # Ours takes folders, and says how to get one.
    with pytest.raises(FileNotFoundError, match="hf download some-lab/Jet-Nemotron-2B --local-dir Jet-Nemotron-2B"):
        JetNemotronForCausalLM.from_pretrained("some-lab/Jet-Nemotron-2B")


def python(code: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env=os.environ | environment,
        capture_output=True,
        text=True,
    )
    return done.stdout + done.stderr


def test_transformers_is_imported_by_those_who_ask_for_it():
    code = "import jetkernels, jetkernels.model, jetkernels.cli.generate, sys; print('transformers' in sys.modules)"
    assert python(code).strip() == "False"


@pytest.mark.parametrize(
    ("stub", "says"),
    [
        (None, "needs the package transformers, which is not installed: pip install 'jetkernels[hf]'"),
        ("__version__ = '4.57.1'", "needs transformers 5.23 or newer, got 4.57.1: pip install 'jetkernels[hf]'"),
    ],
    ids=["missing", "old"],
)
def test_without_transformers_a_sentence_says_what_to_install(stub, says, tmp_path):
    code = "import jetkernels.hf"
    if stub is None:
        code = (
            "import sys\n"
            "class Hide:\n"
            "    def find_spec(self, name, path=None, target=None):\n"
            "        if name == 'transformers': raise ModuleNotFoundError(f'No module named {name!r}', name=name)\n"
            "sys.meta_path.insert(0, Hide())\n"
        ) + code
    else:
        (tmp_path / "transformers.py").write_text(stub)
        code = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); " + code
    assert f"jetkernels.hf {says}" in python(code)


def test_a_model_that_was_never_saved_can_be_saved(tmp_path):
    theirs = of(small_model())
    theirs.save_pretrained(tmp_path)
    assert torch.equal(JetNemotronForCausalLM.from_pretrained(tmp_path)(IDS).logits, theirs(IDS).logits)
