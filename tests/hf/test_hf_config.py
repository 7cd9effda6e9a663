"""The published config.json, read and written by transformers."""

import json

import pytest
from support.hf_cases import NO_STOP
from support.model_cases import LLAMA3, WINDOW, small_config
from support.paths import ROOT
from transformers import AutoConfig

import jetkernels.hf as hf
from jetkernels.model import JetNemotronConfig

PUBLISHED = sorted((ROOT / "jetkernels" / "model" / "configs").glob("*.json"))


@pytest.mark.parametrize("file", PUBLISHED, ids=lambda file: file.stem)
def test_published_configs_are_read_and_written_as_they_are(file, tmp_path):
    published = json.loads(file.read_text())
    (tmp_path / "config.json").write_text(file.read_text())
    config = AutoConfig.from_pretrained(tmp_path)
    assert type(config) is hf.JetNemotronConfig
    assert config.network_config().to_dict().items() >= JetNemotronConfig.from_dict(published).to_dict().items()
    config.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    assert written.pop("dtype") == published.pop("torch_dtype")
    assert {key: written.get(key) for key in published} == published
    added = {"head_dim": 128, "pad_token_id": None, "tie_word_embeddings": True}
    added |= {"transformers_version": written["transformers_version"]}
    assert {key: value for key, value in written.items() if key not in published}.items() <= added.items()
    assert AutoConfig.from_pretrained(tmp_path).to_dict() == config.to_dict()


def test_layers_have_the_names_of_transformers():
    config = hf.JetNemotronConfig(**small_config().to_dict())
    names = ["linear_attention", "sliding_attention", "linear_attention", "full_attention"]
    assert config.layer_types == names and config.num_hidden_layers == 4 and config.sliding_window == WINDOW
    assert config.rope_parameters == {"rope_type": "default", "rope_theta": 1e6}
    assert config.to_dict()["layer_types"] == ["jet", "swa", "jet", "attn"]
    again = hf.JetNemotronConfig(**config.to_dict() | {"layer_types": names})
    assert again.to_dict() == config.to_dict()
    assert hf.JetNemotronConfig(**small_config(["jet", "attn"]).to_dict()).sliding_window is None


def test_scaled_rotations_are_named_as_transformers_does():
    config = hf.JetNemotronConfig(**small_config(rope_scaling=LLAMA3, attention_bias=False).to_dict())
    assert config.rope_parameters == LLAMA3 | {"rope_theta": 1e6} and config.attention_bias is False
    assert config.to_dict()["rope_scaling"] == LLAMA3 and "use_qk_norm" not in config.to_dict()
    assert hf.JetNemotronConfig(**config.to_dict()).to_dict() == config.to_dict()
    assert "rope_scaling" not in hf.JetNemotronConfig(**small_config().to_dict()).to_dict()


def test_defaults_are_ours():
    needed = {name: small_config().to_dict()[name] for name in _REQUIRED}
    assert hf.JetNemotronConfig(**needed).network_config().to_dict().items() >= (
        JetNemotronConfig.from_dict(needed).to_dict().items()
    )
    assert hf.JetNemotronConfig(**needed, **NO_STOP).network_config().eos_token_id is None


_REQUIRED = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "layer_types",
    "num_attention_heads",
    "num_key_value_heads",
    "efficient_attention_config",
)


@pytest.mark.parametrize(
    ("changes", "error", "says"),
    [
        (
            {"layer_types": ["jet", "mambas", "jet", "jet"]},
            ValueError,
            r"layer_types\[1\] must be one of jet, attn, swa",
        ),
        ({"num_hidden_layers": 3}, ValueError, "layer_types must have num_hidden_layers = 3 entries, got 4"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, ValueError, "of its kinds only rope_type 'default'"),
        ({"hidden_act": "gelu"}, ValueError, "hidden_act must be 'silu', got 'gelu'"),
        ({"quantization_config": {"quant_method": "gptq"}}, ValueError, "quantization_config must be None"),
        ({"num_key_value_heads": 3}, ValueError, "num_attention_heads must be a multiple of num_key_value_heads = 3"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_the_model_cannot_be_is_refused(changes, error, says):
    with pytest.raises(error, match=says):
        hf.JetNemotronConfig(**small_config().to_dict() | changes)


def test_a_missing_size_is_named():
    values = small_config().to_dict()
    del values["hidden_size"]
    with pytest.raises(TypeError, match="hidden_size"):
        hf.JetNemotronConfig(**values)


def test_a_window_beside_that_of_the_layers_is_refused():
    config = hf.JetNemotronConfig(**small_config(["jet", "swa"]).to_dict())
    config.sliding_window += 1
    with pytest.raises(ValueError, match="sliding_window must be that of efficient_attention_config.swa"):
        hf.JetNemotronForCausalLM(config)
