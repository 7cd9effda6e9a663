"""Bases from published checkpoints: Llama, Qwen2 and Qwen3, as transformers reads them."""

import copy
import json

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from support.model_cases import stir_
from support.postnas_cases import TINY_JET

from jetkernels.model import JetNemotronForCausalLM
from jetkernels.model.architectures import DEFAULTS, published_config
from jetkernels.postnas import SuperNetwork, export, from_pretrained

transformers.utils.logging.disable_progress_bar()
SIZES = {
    "hidden_act": "silu",
    "hidden_size": 24,
    "initializer_range": 0.2,
    "intermediate_size": 40,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "num_key_value_heads": 2,
    "use_cache": True,
    "vocab_size": 50,
}
LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "mlp_bias": False,
    "model_type": "llama",
    "pretraining_tp": 1,
    "torch_dtype": "float32",
}
# The keys of the published config.json files, with small numbers.
PUBLISHED = {
    "SmolLM2-135M-Instruct": SIZES
    | LLAMA
    | {
        "is_llama_config": True,
        "max_position_embeddings": 8192,
        "pad_token_id": 2,
        "rms_norm_eps": 1e-5,
        "rope_interleaved": False,
        "rope_scaling": None,
        "rope_theta": 100000,
        "tie_word_embeddings": True,
    },
    "TinyLlama-1.1B": SIZES
    | {key: value for key, value in LLAMA.items() if key not in ("attention_dropout", "mlp_bias")}
    | {"max_position_embeddings": 2048, "rms_norm_eps": 1e-5, "rope_scaling": None, "tie_word_embeddings": False},
    "Llama-3.2-1B-Instruct": SIZES
    | LLAMA
    | {
        "eos_token_id": [2, 3, 4],
        "head_dim": 8,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5,
        "rope_scaling": {
            "factor": 32.0,
            "high_freq_factor": 4.0,
            "low_freq_factor": 1.0,
            "original_max_position_embeddings": 64,
            "rope_type": "llama3",
        },
        "rope_theta": 500000.0,
        "tie_word_embeddings": True,
    },
    "Qwen2.5-0.5B": SIZES
    | {
        "architectures": ["Qwen2ForCausalLM"],
        "attention_dropout": 0.0,
        "bos_token_id": 7,
        "eos_token_id": 7,
        "max_position_embeddings": 32768,
        "max_window_layers": 24,
        "model_type": "qwen2",
        "rms_norm_eps": 1e-6,
        "rope_theta": 1000000.0,
        "sliding_window": 32768,
        "tie_word_embeddings": True,
        "torch_dtype": "float32",
        "use_mrope": False,
        "use_sliding_window": False,
    },
    "Qwen3-0.6B": SIZES
    | {
        "architectures": ["Qwen3ForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": 7,
        "eos_token_id": 8,
        "head_dim": 16,
        "max_position_embeddings": 40960,
        "max_window_layers": 28,
        "model_type": "qwen3",
        "rms_norm_eps": 1e-6,
        "rope_scaling": None,
        "rope_theta": 1000000,
        "sliding_window": None,
        "tie_word_embeddings": True,
        "torch_dtype": "float32",
        "use_sliding_window": False,
    },
}
each = pytest.mark.parametrize("name", PUBLISHED)


def peer_of(values):
    """The model of transformers that a config.json describes, drawn."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        kind = transformers.AutoConfig.for_model(values["model_type"])
        # It writes into the values that it is given.
        model = transformers.AutoModelForCausalLM.from_config(type(kind)(**copy.deepcopy(values)))
        return stir_(model.float()).eval()


def published_folder(folder, values):
    """config.json and model.safetensors as they are published, the weights those of `peer_of`; and the peer."""
    peer = peer_of(values)
    state = dict(peer.state_dict())
    if values["tie_word_embeddings"]:
        del state["lm_head.weight"]
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(values))
    save_file(state, str(folder / "model.safetensors"), metadata={"format": "pt"})
    return peer


@each
@torch.no_grad()
def test_logits_and_text_are_those_of_transformers(name, tmp_path):
    values = PUBLISHED[name]
    published_folder(tmp_path / name, values)
    base = from_pretrained(tmp_path / name)
    peer = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / name)
    ids = torch.randint(50, (2, 90), generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(base(ids).logits, peer(ids).logits, rtol=0, atol=2e-5)
    text = peer.generate(ids[:1, :9], max_new_tokens=16, do_sample=False, eos_token_id=None, pad_token_id=0)
    cache = base.new_cache(1, 25)
    step, found = base(ids[:1, :9], cache=cache).logits[:, -1].argmax(-1), []
    for _ in range(16):
        found.append(step.item())
        step = base.step(step, cache).argmax(-1)
    assert found == text[0, 9:].tolist()


@each
def test_the_config_says_what_is_in_the_file(name):
    values, config = PUBLISHED[name], published_config(PUBLISHED[name])
    assert config.layer_types == ["attn"] * 2 and config.max_position_embeddings == values["max_position_embeddings"]
    for key in ("bos_token_id", "eos_token_id", "tie_word_embeddings", "rms_norm_eps"):
        assert getattr(config, key) == values[key]
    assert config.rope_theta == values.get("rope_theta", 10000.0) and config.rope_scaling == values.get("rope_scaling")
    assert (config.attention_bias, config.use_qk_norm) == (name.startswith("Qwen2"), name.startswith("Qwen3"))


@each
@torch.no_grad()
def test_checkpoints_that_transformers_writes_now_are_read_too(name, tmp_path):
    """Newer files have the rotary base and its scaling under rope_parameters and the dtype as `dtype`."""
    peer = peer_of(PUBLISHED[name])
    peer.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    assert "rope_theta" not in written and "torch_dtype" not in written
    ids = torch.randint(50, (1, 80), generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(from_pretrained(tmp_path)(ids).logits, peer(ids).logits, rtol=0, atol=2e-5)


@each
def test_saved_here_a_base_is_the_same_and_a_model(name, tmp_path):
    published_folder(tmp_path / "published", PUBLISHED[name])
    base = from_pretrained(tmp_path / "published")
    base.save_pretrained(tmp_path / "ours")
    again, model = from_pretrained(tmp_path / "ours"), JetNemotronForCausalLM.from_pretrained(tmp_path / "ours")
    assert again.config == model.config == base.config
    stored = load_file(tmp_path / "published" / "model.safetensors")
    assert stored.keys() == load_file(tmp_path / "ours" / "model.safetensors").keys()
    assert all(torch.equal(tensor, again.state_dict()[key]) for key, tensor in stored.items())


@each
@torch.no_grad()
def test_a_hybrid_of_it_is_exported_whole(name, tmp_path):
    """The windowed path is the layer's attention, its norms of q and k and its scaling too."""
    published_folder(tmp_path / "published", PUBLISHED[name])
    base = from_pretrained(tmp_path / "published")
    network = SuperNetwork(base, TINY_JET, window_size=7)
    export(network, ("swa", "jet"), tmp_path / "hybrid")
    hybrid = JetNemotronForCausalLM.from_pretrained(tmp_path / "hybrid")
    assert hybrid.config.layer_types == ["swa", "jet"]
    for key in ("use_qk_norm", "attention_bias", "rope_scaling", "rope_theta", "head_dim"):
        assert getattr(hybrid.config, key) == getattr(base.config, key), key
    ids = torch.randint(50, (1, 40), generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(hybrid(ids).logits, network(ids, ("swa", "jet")), rtol=0, atol=1e-5)
    wide = SuperNetwork(base, TINY_JET, window_size=40)
    torch.testing.assert_close(wide(ids, ("swa", "attn")), base(ids).logits, rtol=0, atol=2e-5)


@pytest.mark.parametrize("kind", DEFAULTS)
def test_what_a_file_does_not_name_is_what_transformers_means_by_that(kind):
    few = ("vocab_size", "hidden_size", "intermediate_size", "num_attention_heads", "num_hidden_layers")
    values = {key: SIZES[key] for key in few} | {"num_key_value_heads": 2, "model_type": kind}
    ours, theirs = published_config(values), type(transformers.AutoConfig.for_model(kind))(**values)
    for key in ("head_dim", "rms_norm_eps", "initializer_range", "max_position_embeddings", "tie_word_embeddings"):
        assert getattr(ours, key) == getattr(theirs, key, 6), key
    assert (ours.bos_token_id, ours.eos_token_id) == (theirs.bos_token_id, theirs.eos_token_id)
    assert ours.rope_theta == theirs.rope_parameters["rope_theta"]
    assert published_config(values | {"bos_token_id": None}).bos_token_id is None


def test_frequencies_that_older_llama_files_hold_are_not_read(tmp_path):
    published_folder(tmp_path / "base", PUBLISHED["TinyLlama-1.1B"])
    file = tmp_path / "base" / "model.safetensors"
    weights = load_file(file)
    save_file(weights | {"model.layers.1.self_attn.rotary_emb.inv_freq": torch.ones(3)}, file)
    assert from_pretrained(tmp_path / "base").state_dict().keys() == weights.keys()
    save_file(weights | {"model.layers.1.self_attn.inv_freq": torch.ones(3)}, file)
    with pytest.raises(ValueError, match="unexpected model.layers.1.self_attn.inv_freq"):
        from_pretrained(tmp_path / "base")


@pytest.mark.parametrize(
    ("name", "changes", "sentence"),
    [
        ("Qwen2.5-0.5B", {"model_type": "gemma"}, "model_type must be one of llama, qwen2, qwen3, got 'gemma'"),
        ("Qwen2.5-0.5B", {"model_type": ["qwen2"]}, "model_type must be one of llama, qwen2, qwen3, got"),
        ("Qwen2.5-0.5B", {"use_sliding_window": True}, "use_sliding_window must be False, got True"),
        ("Qwen2.5-0.5B", {"rope_scaling": {"type": "yarn", "factor": 4.0}}, "rope_scaling must be None"),
        ("Qwen2.5-0.5B", {"rope_parameters": {"rope_type": "yarn"}}, "rope_parameters must be None"),
        ("Qwen2.5-0.5B", {"hidden_act": "gelu"}, "hidden_act must be 'silu', got 'gelu'"),
        ("Qwen2.5-0.5B", {"num_attention_heads": None}, "must have num_attention_heads"),
        ("Qwen2.5-0.5B", {"num_hidden_layers": None}, "must have num_hidden_layers"),
        ("Qwen2.5-0.5B", {"dtype": "bfloat16"}, "torch_dtype and dtype must agree, got 'bfloat16' and 'float32'"),
        ("Qwen3-0.6B", {"attention_bias": True}, "attention_bias must be False, got True: in qwen3 it is one of the"),
        ("Qwen3-0.6B", {"layer_types": ["sliding_attention"] * 2}, "layer_types must all be full_attention"),
        ("TinyLlama-1.1B", {"attention_bias": True}, "attention_bias must be False, got True: in llama it is one of"),
        ("TinyLlama-1.1B", {"mlp_bias": True}, "mlp_bias must be False, got True"),
        ("TinyLlama-1.1B", {"partial_rotary_factor": 0.5}, "partial_rotary_factor must be 1.0, got 0.5"),
        ("TinyLlama-1.1B", {"quantization_config": {"bits": 4}}, "quantization_config must be None"),
        ("Llama-3.2-1B-Instruct", {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "low_freq_factor must be"),
    ],
)
def test_configs_of_other_models_are_refused(name, changes, sentence):
    with pytest.raises(ValueError, match=sentence):
        published_config(PUBLISHED[name] | changes)
