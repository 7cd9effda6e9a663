"""Configurations and checkpoints on disk."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from support.model_cases import JET, content, small_config, small_model, tokens

from jetkernels.model import JetNemotronConfig, JetNemotronForCausalLM, Tokenizer, checkpoint
from jetkernels.model.mixers import MIXERS

PUBLISHED = {
    "architectures": ["JetNemotronForCausalLM"],
    "auto_map": {"AutoConfig": "configuration_jet_nemotron.JetNemotronConfig"},
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "efficient_attention_config": {"jet": JET, "swa": {"window_size": 5}},
    "eos_token_id": 151643,
    "hidden_act": "silu",
    "hidden_size": 32,
    "initializer_range": 0.02,
    "intermediate_size": 48,
    "layer_types": ["jet", "swa", "jet", "attn"],
    "max_position_embeddings": 131072,
    "max_window_layers": 28,
    "model_type": "jet_nemotron",
    "num_attention_heads": 4,
    "num_hidden_layers": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1000000.0,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.51.3",
    "use_cache": True,
    "use_mrope": False,
    "vocab_size": 61,
}


def same_state(a, b):
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(a[k].dtype == b[k].dtype and torch.equal(a[k], b[k]) for k in a)


# ---- config


def test_published_config_is_read_as_it_is(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(PUBLISHED))
    config = JetNemotronConfig.from_file(tmp_path)
    assert config.jet.norm_eps == 1e-5 and config.jet.head_v_dim == 12 and config.window_size == 5
    assert config.tie_word_embeddings and config.num_hidden_layers == 4 and config.head_dim == 8
    assert config.dtype == torch.bfloat16 and config.padding_token_id == 151643
    # Unknown keys and the spelling of known ones survive.
    config.save(tmp_path / "again.json")
    again = json.loads((tmp_path / "again.json").read_text())
    assert again.pop("tie_word_embeddings") is True and again == PUBLISHED
    assert JetNemotronConfig.from_dict(config.to_dict()) == config


@pytest.mark.parametrize(
    "name, V, R, window, swa, attn",
    [("2b", 256, 384, 1152, [20, 21], [14, 19]), ("4b", 256, 512, 2048, [5, 16, 19, 21, 22, 25, 27], [17, 20, 32])],
)
def test_shipped_configs(name, V, R, window, swa, attn):
    config = JetNemotronConfig.from_name(name)
    assert (config.jet.head_v_dim, config.jet.value_dim // config.jet.dconv_generator_reduction) == (V, R)
    assert config.window_size == window and config.rms_norm_eps == 1e-6 and config.rope_theta == 1e6
    assert [i for i, kind in enumerate(config.layer_types) if kind == "swa"] == swa
    assert [i for i, kind in enumerate(config.layer_types) if kind == "attn"] == attn


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"model_type": "qwen2"}, "model_type must be jet_nemotron, got 'qwen2'"),
        ({"hidden_size": None}, "hidden_size must be a positive integer, got None"),
        ({"hidden_size": 30}, "hidden_size must be a multiple of num_attention_heads = 4, got 30"),
        ({"num_key_value_heads": 3}, "num_attention_heads must be a multiple of num_key_value_heads = 3, got 4"),
        (
            {"layer_types": ["jet", "mamba"], "num_hidden_layers": 2},
            rf"layer_types\[1\] must be one of {', '.join(MIXERS)}, got 'mamba'",
        ),
        ({"num_hidden_layers": 5}, "layer_types must have num_hidden_layers = 5 entries, got 4"),
        ({"rope_scaling": {"factor": 2}}, "rope_scaling must be None, got"),
        ({"hidden_act": "gelu"}, "hidden_act must be 'silu', got 'gelu'"),
        ({"torch_dtype": "bfloat17"}, "torch_dtype must name a dtype, got 'bfloat17'"),
        (
            {"efficient_attention_config": {"jet": JET}},
            "efficient_attention_config.swa is needed by a swa layer, got None",
        ),
        ({"efficient_attention_config": {"swa": {}, "jet": JET}}, "window_size must be a positive integer, got None"),
        (
            {"efficient_attention_config": {"swa": {"window_size": 4}, "jet": {"num_heads": 2}}},
            "jet must have head_dim, expand_v",
        ),
        (
            {"efficient_attention_config": {"swa": {"window_size": 4}, "jet": JET | {"norm_eps": "x"}}},
            "norm_eps must be a number",
        ),
    ],
)
def test_bad_configs_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        JetNemotronConfig.from_dict(PUBLISHED | changes)


def test_missing_config_keys_are_named(tmp_path):
    with pytest.raises(ValueError, match="missing vocab_size, layer_types"):
        JetNemotronConfig.from_dict({k: v for k, v in PUBLISHED.items() if k not in ("vocab_size", "layer_types")})
    with pytest.raises(FileNotFoundError, match="no file"):
        JetNemotronConfig.from_file(tmp_path / "nowhere")
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match="is not JSON"):
        JetNemotronConfig.from_file(tmp_path)
    with pytest.raises(ValueError, match="must be one of 2b, 4b, full-attention, got '3b'"):
        JetNemotronConfig.from_name("3b")


# ---- weights


@pytest.mark.parametrize("shard_bytes", [10**9, 20_000, 1])
@pytest.mark.parametrize("tied", [True, False])
def test_round_trip(tmp_path, shard_bytes, tied):
    model = small_model(tie_word_embeddings=tied)
    model.save_pretrained(tmp_path / "deep" / "model", shard_bytes)
    folder = tmp_path / "deep" / "model"
    again = JetNemotronForCausalLM.from_pretrained(folder)
    assert same_state(model, again) and again.config.tie_word_embeddings == tied
    assert torch.equal(model(tokens(2, 9)).logits, again(tokens(2, 9)).logits)
    files = list(folder.glob("*.safetensors"))
    stored = {name for file in files for name in load_file(file)}
    assert ("lm_head.weight" in stored) == (not tied)
    assert (folder / "model.safetensors.index.json").exists() == (len(files) > 1)
    if shard_bytes == 20_000:
        assert 1 < len(files) < len(stored)
    assert [p.name for p in folder.parent.iterdir()] == ["model"]


def test_low_precision_round_trip_keeps_fp32_gates(tmp_path):
    model = small_model(dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "m")
    again = JetNemotronForCausalLM.from_pretrained(tmp_path / "m")
    assert again.dtype == torch.bfloat16 and again.model.layers[0].self_attn.A_log.dtype == torch.float32
    assert same_state(model, again)
    wide = JetNemotronForCausalLM.from_pretrained(tmp_path / "m", dtype=torch.float32)
    assert wide.dtype == torch.float32 and torch.equal(wide.head_weight, model.head_weight.float())


@pytest.mark.parametrize("name", ["float64", "float32", "bfloat16", "float16"])
def test_a_dtype_may_be_given_by_name(tmp_path, name):
    saved(tmp_path / "m")
    need = JetNemotronForCausalLM.from_pretrained(tmp_path / "m", dtype=getattr(torch, name))
    assert need.dtype == getattr(torch, name)
    for given in (name, f"torch.{name}"):
        assert same_state(JetNemotronForCausalLM.from_pretrained(tmp_path / "m", dtype=given), need)
    assert JetNemotronForCausalLM.random(small_config(), dtype=name).dtype == need.dtype


def test_auto_is_the_dtype_of_the_config(tmp_path):
    saved(tmp_path / "m", dtype=torch.bfloat16)
    for given in ("auto", None):
        assert JetNemotronForCausalLM.from_pretrained(tmp_path / "m", dtype=given).dtype == torch.bfloat16


NO_WEIGHTS = [
    torch.int8,
    torch.bool,
    torch.complex64,
    torch.float8_e4m3fn,
    "int8",
    "bf16",
    "",
    "Auto",
    np.float32,
    16,
    ["auto"],
]


@pytest.mark.parametrize("dtype", NO_WEIGHTS)
def test_other_dtypes_are_refused_by_name(tmp_path, dtype):
    saved(tmp_path / "m")
    with pytest.raises(
        ValueError,
        match=r"^dtype must be one of float64, float32, bfloat16, float16, of torch or by name, or 'auto', got ",
    ):
        JetNemotronForCausalLM.from_pretrained(tmp_path / "m", dtype=dtype)


def test_loading_and_saving_import_no_python_references_of_torch(tmp_path):
    """They are sympy and seconds."""
    saved(tmp_path / "m")
    code = (
        "import sys; from jetkernels.model import JetNemotronForCausalLM as Model\n"
        "for _ in range(2): Model.from_pretrained(sys.argv[1]).save_pretrained(sys.argv[1])\n"
        "assert 'sympy' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "m")], check=True)


def test_gates_stored_in_bf16_are_loaded_as_fp32(tmp_path):
    model = small_model()
    model.save_pretrained(tmp_path / "m")
    state = {name: t.bfloat16() for name, t in load_file(tmp_path / "m" / "model.safetensors").items()}
    save_file(state, tmp_path / "m" / "model.safetensors")
    again = JetNemotronForCausalLM.from_pretrained(tmp_path / "m", dtype=torch.bfloat16)
    gates = again.model.layers[0].self_attn
    assert gates.A_log.dtype == torch.float32 and torch.equal(
        gates.A_log, model.model.layers[0].self_attn.A_log.bfloat16().float()
    )


def test_saving_again_replaces_the_weights_and_nothing_else(tmp_path):
    folder = tmp_path / "m"
    small_model().save_pretrained(folder, 20_000)
    Tokenizer.byte_level().save_pretrained(folder)
    (folder / "notes").mkdir()
    (folder / "notes" / "a.txt").write_text("kept")
    linked = tmp_path / "link"
    linked.hardlink_to(folder / "config.json")
    before = linked.read_bytes()
    other = small_model(seed=7, max_position_embeddings=7)
    other.save_pretrained(folder)
    assert sorted(content(folder)) == ["config.json", "model.safetensors", "notes/a.txt", "tokenizer.json"]
    assert same_state(JetNemotronForCausalLM.from_pretrained(folder), other)
    assert linked.read_bytes() == before != (folder / "config.json").read_bytes()


@pytest.mark.parametrize("exists", [True, False])
def test_a_failed_save_changes_nothing(tmp_path, exists, monkeypatch):
    folder = tmp_path / "m"
    if exists:
        small_model().save_pretrained(folder, 20_000)
    before = content(tmp_path)
    written = []

    def fail_at_third(tensors, path):
        written.append(path)
        if len(written) == 3:
            raise OSError("No space left on device")
        save_file(tensors, path)

    monkeypatch.setattr(checkpoint, "_save_file", fail_at_third)
    with pytest.raises(OSError, match="No space left"):
        small_model(seed=7).save_pretrained(folder, 20_000)
    assert len(written) == 3 and content(tmp_path) == before and folder.exists() == exists
    assert [p.name for p in tmp_path.iterdir()] == (["m"] if exists else [])


def rewrite(folder, change):
    file = folder / "model.safetensors"
    state = load_file(file)
    change(state)
    save_file(state, file)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda s: s.pop("model.norm.weight"), "missing model.norm.weight$"),
        (lambda s: s.update(extra=torch.zeros(1)), "unexpected extra$"),
        (lambda s: s.update(extra=s.pop("model.norm.weight")), "missing model.norm.weight; unexpected extra$"),
        (lambda s: s.clear() or s.update(extra=torch.zeros(1)), r"missing .* and \d+ more; unexpected extra"),
        (lambda s: s.update({"model.norm.weight": torch.zeros(31)}), r"model.norm.weight must be \[32\], got \[31\]"),
        (
            lambda s: s.update({"lm_head.weight": torch.zeros(61, 32)}),
            "lm_head.weight must equal model.embed_tokens.weight",
        ),
    ],
)
def test_weights_that_do_not_fit_are_refused(tmp_path, change, message):
    small_model().save_pretrained(tmp_path / "m")
    rewrite(tmp_path / "m", change)
    with pytest.raises(ValueError, match=message):
        JetNemotronForCausalLM.from_pretrained(tmp_path / "m")


def test_a_stored_copy_of_the_tied_head_is_accepted(tmp_path):
    model = small_model()
    model.save_pretrained(tmp_path / "m")
    rewrite(tmp_path / "m", lambda s: s.update({"lm_head.weight": s["model.embed_tokens.weight"].clone()}))
    assert same_state(JetNemotronForCausalLM.from_pretrained(tmp_path / "m"), model)


def test_broken_folders_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        JetNemotronForCausalLM.from_pretrained(tmp_path / "nowhere")
    folder = tmp_path / "m"
    small_model().save_pretrained(folder, 20_000)
    shard = sorted(folder.glob("*.safetensors"))[1]
    data = shard.read_bytes()
    shard.write_bytes(data[: len(data) // 2])
    with pytest.raises(ValueError, match=f"{shard.name} is not a whole safetensors file"):
        JetNemotronForCausalLM.from_pretrained(folder)
    shard.unlink()
    with pytest.raises(FileNotFoundError, match=f"names {shard.name}, which"):
        JetNemotronForCausalLM.from_pretrained(folder)
    for text, message in (("[]", "must hold a JSON object, got list"), ("{}", "must be JSON with a weight_map")):
        (folder / "model.safetensors.index.json").write_text(text)
        with pytest.raises(ValueError, match=message):
            JetNemotronForCausalLM.from_pretrained(folder)
    (folder / "model.safetensors.index.json").unlink()
    with pytest.raises(FileNotFoundError, match="has neither"):
        JetNemotronForCausalLM.from_pretrained(folder)
    (tmp_path / "file").write_text("")
    with pytest.raises(NotADirectoryError, match="is not a folder"):
        small_model().save_pretrained(tmp_path / "file")


def test_an_index_that_names_the_wrong_file_is_refused(tmp_path):
    folder = tmp_path / "m"
    small_model().save_pretrained(folder, 20_000)
    index = folder / "model.safetensors.index.json"
    values = json.loads(index.read_text())
    shards = sorted(set(values["weight_map"].values()))
    wrong = next(s for s in shards if s != values["weight_map"]["model.norm.weight"])
    values["weight_map"]["model.norm.weight"] = wrong
    index.write_text(json.dumps(values))
    with pytest.raises(ValueError, match=f"{wrong} must hold model.norm.weight, as the index says"):
        JetNemotronForCausalLM.from_pretrained(folder)


# ---- random initialisation


def test_random_model_is_seeded_and_leaves_the_global_generator_alone():
    torch.manual_seed(5)
    need = torch.rand(3)
    torch.manual_seed(5)
    a, b, c = (JetNemotronForCausalLM.random(small_config(), seed=s) for s in (1, 1, 2))
    assert torch.equal(torch.rand(3), need)
    assert same_state(a, b) and not same_state(a, c)
    low = JetNemotronForCausalLM.random(small_config(), dtype=torch.bfloat16)
    assert low.dtype == torch.bfloat16 and low.model.layers[0].self_attn.dt_bias.dtype == torch.float32


def test_random_model_leaves_no_parameter_unset(monkeypatch):
    """Every allocation of the empty model is poisoned; all of it must be overwritten."""
    empty = JetNemotronForCausalLM.empty.__func__

    def poisoned(cls, *args, **kwargs):
        model = empty(cls, *args, **kwargs)
        for parameter in model.parameters():
            parameter.data.fill_(float("nan"))
        return model

    monkeypatch.setattr(JetNemotronForCausalLM, "empty", classmethod(poisoned))
    for tied in (True, False):
        model = JetNemotronForCausalLM.random(small_config(tie_word_embeddings=tied))
        assert all(p.isfinite().all() for p in model.parameters())
        assert model.model.embed_tokens.weight.std().item() == pytest.approx(0.1, rel=0.1)
        loss = model(tokens(2, 9), labels=tokens(2, 9)).loss
        assert loss.isfinite()


def test_large_tensors_have_the_same_spread(monkeypatch):
    from jetkernels.modules import initialization

    monkeypatch.setattr(initialization, "LARGE", 1000)
    x = initialization.init_weight_(torch.empty(100_000), 0.02)
    assert x.std().item() == pytest.approx(0.02, rel=0.02) and abs(x.mean().item()) < 3e-4


# ---- what a folder may hold


def saved(folder: Path, max_shard_bytes: int = 10**9, **changes):
    model = small_model(**changes)
    model.save_pretrained(folder, max_shard_bytes)
    return model


@pytest.mark.parametrize(
    "name",
    [
        "../m/{}",
        "/etc/passwd",
        "{0}/../{0}",
        "./{}",
        "sub/{}",
        "..",
        "",
        ".{}",
        "a\0.safetensors",
        "\ud800.safetensors",
        "{}\n",
        "config.json",
        "a" * 300 + ".safetensors",
        None,
        3,
        ["{}"],
        {"a": "{}"},
    ],
)
def test_an_index_names_plain_files_only(tmp_path, name):
    saved(tmp_path / "m", 20_000)
    index = tmp_path / "m" / "model.safetensors.index.json"
    values = json.loads(index.read_text())
    file = values["weight_map"]["model.norm.weight"]
    values["weight_map"]["model.norm.weight"] = name.format(file) if isinstance(name, str) else name
    index.write_text(json.dumps(values))
    with pytest.raises(
        ValueError,
        match=r"index\.json: weight_map must name a \.safetensors file in the same folder for "
        r"'model\.norm\.weight', got",
    ):
        JetNemotronForCausalLM.from_pretrained(tmp_path / "m")


def test_links_to_files_are_followed_as_downloads_lay_them(tmp_path):
    model = saved(tmp_path / "m")
    (tmp_path / "blobs").mkdir()
    for path in list((tmp_path / "m").iterdir()):
        path.rename(tmp_path / "blobs" / path.name)
        path.symlink_to(Path("..") / "blobs" / path.name)
    assert same_state(JetNemotronForCausalLM.from_pretrained(tmp_path / "m"), model)


@pytest.mark.parametrize(
    "dtype", [torch.int8, torch.int64, torch.bool, torch.complex64, torch.float8_e4m3fn, torch.float8_e5m2]
)
def test_weights_that_are_not_floating_are_refused(tmp_path, dtype):
    saved(tmp_path / "m")
    rewrite(tmp_path / "m", lambda s: s.update({"model.norm.weight": s["model.norm.weight"].to(dtype)}))
    with pytest.raises(
        ValueError, match=r"model\.norm\.weight in model\.safetensors must be one of F64, F32, F16, BF16, got"
    ):
        JetNemotronForCausalLM.from_pretrained(tmp_path / "m")


@pytest.mark.parametrize(
    "stored, value, dtype",
    [
        (torch.float32, 65520.0, torch.float16),
        (torch.float32, -3.4e38, torch.bfloat16),
        (torch.float64, 1e39, torch.float32),
        (torch.bfloat16, 1e5, torch.float16),
    ],
)
def test_numbers_too_large_for_the_dtype_are_refused(tmp_path, stored, value, dtype):
    saved(tmp_path / "m")

    def plant(state):
        weight = state["model.norm.weight"].to(stored)
        weight[3] = value
        state["model.norm.weight"] = weight

    rewrite(tmp_path / "m", plant)
    with pytest.raises(
        ValueError,
        match=r"model\.norm\.weight \(model\.safetensors in .*\) holds .*, too large for (float16|bfloat16|float32)",
    ):
        JetNemotronForCausalLM.from_pretrained(tmp_path / "m", dtype=dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_inf_and_nan_are_loaded_as_they_are_stored(tmp_path, dtype):
    saved(tmp_path / "m")
    special = torch.tensor([float("nan"), float("inf"), -float("inf"), 65504.0])

    def plant(state):
        state["model.norm.weight"][:4] = special
        state["model.embed_tokens.weight"][0, :4] = special
        state["lm_head.weight"] = state["model.embed_tokens.weight"].clone()

    rewrite(tmp_path / "m", plant)
    model = JetNemotronForCausalLM.from_pretrained(tmp_path / "m", dtype=dtype)
    for got in (model.model.norm.weight[:4], model.model.embed_tokens.weight[0, :4]):
        assert torch.equal(
            got.nan_to_num(nan=-1.0, posinf=-2.0, neginf=-3.0),
            special.to(dtype).nan_to_num(nan=-1.0, posinf=-2.0, neginf=-3.0),
        )


def test_nothing_is_allocated_for_a_config_that_the_weights_do_not_fit(tmp_path):
    saved(tmp_path / "m")
    config = tmp_path / "m" / "config.json"
    values = json.loads(config.read_text())
    for changes, message in (
        (
            {"vocab_size": 1 << 24, "intermediate_size": 1 << 24},
            r"embed_tokens.weight must be \[16777216, 32\], got \[61, 32\]",
        ),
        ({"layer_types": ["attn"] * 4000, "num_hidden_layers": 4000}, "4000 layers, but only"),
    ):
        config.write_text(json.dumps(values | changes))
        with pytest.raises(ValueError, match=message):
            JetNemotronForCausalLM.from_pretrained(tmp_path / "m")


@pytest.mark.parametrize("load", [JetNemotronForCausalLM.from_pretrained, Tokenizer.from_pretrained])
def test_the_name_of_a_model_on_a_hub_says_how_to_download_it(load, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match="`hf download jet-ai/Jet-Nemotron-2B --local-dir Jet-Nemotron-2B`"):
        load("jet-ai/Jet-Nemotron-2B")
    (tmp_path / "jet-ai").mkdir()
    for name in ("jet-ai/Jet-Nemotron-2B", "models", "/a/b", "a/b/c", "../a"):
        with pytest.raises(FileNotFoundError, match=f"there is no folder {name}$"):
            load(name)
    (tmp_path / "file").write_text("")
    with pytest.raises(NotADirectoryError, match="file must be a folder"):
        load("file")


def test_damaged_folders_are_refused_with_a_sentence(tmp_path):
    """A few hundred; the command damages ten thousand."""
    from campaigns.damaged_folders import campaign

    found = campaign(240, 7, tmp_path)
    assert not found["which"], found


# ---- what lies beside the weights


def test_what_lies_beside_the_weights_goes_where_the_model_goes(tmp_path):
    """Tokenizer, chat template, generation config; nothing else, and nothing that the target has already."""
    folder, target = tmp_path / "m", tmp_path / "t"
    saved(folder, 20_000)
    kept = {name: f"{name}, as published".encode() for name in checkpoint.COMPANIONS}
    for name, text in kept.items():
        (folder / name).write_bytes(text)
    for name in ("README.md", "pytorch_model.bin", "model.safetensors.bak"):
        (folder / name).write_text("stays where it is")
    model = JetNemotronForCausalLM.from_pretrained(folder)
    for path in list(folder.iterdir()):
        path.unlink()
    target.mkdir()
    (target / "chat_template.jinja").write_text("its own")
    model.save_pretrained(target)
    need = {"config.json", "model.safetensors"}
    found = content(target)
    assert found.keys() == need | kept.keys() and found.pop("chat_template.jinja") == b"its own"
    assert all(found[name] == kept[name] for name in found.keys() - need)
    again = JetNemotronForCausalLM.from_pretrained(target)
    assert again.companions == kept | {"chat_template.jinja": b"its own"}


def test_a_full_disk_is_an_os_error_that_names_the_file(tmp_path):
    from safetensors import SafetensorError

    def full(*arguments, **options):
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("safetensors.torch.save_file", full)
        with pytest.raises(OSError, match="No space left on device: .*model.safetensors") as caught:
            saved(tmp_path / "m")
    assert (
        caught.value.errno == 28
        and caught.value.filename == str(tmp_path / "m" / "model.safetensors")
        and list(tmp_path.iterdir()) == []
    )


def test_a_model_without_values_is_not_saved(tmp_path):
    with torch.device("meta"):
        model = JetNemotronForCausalLM(small_config())
    with pytest.raises(ValueError, match=r"save: model\.embed_tokens\.weight.* must hold values"):
        model.save_pretrained(tmp_path / "m")
    assert list(tmp_path.iterdir()) == []
