"""Models in GGUF files: what is read is what transformers reads, and what the file was made from."""

import os

import numpy as np
import pytest
import torch
import transformers
from support.gguf_cases import ARCHITECTURES, LLAMA32, VOCAB, drawn, gguf, write_gguf

from jetkernels.model import JetNemotronForCausalLM, Tokenizer
from jetkernels.model.gguf_file import GgufFile
from jetkernels.postnas import from_pretrained
from jetkernels.postnas.base import read_config

IDS = torch.randint(VOCAB, (2, 50), generator=torch.Generator().manual_seed(1))
each = pytest.mark.parametrize("architecture", ARCHITECTURES)


def close(got, need, atol=1e-4):
    torch.testing.assert_close(got, need, rtol=0, atol=atol)


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return write_gguf(tmp_path_factory.mktemp("llama") / "model.gguf", drawn("llama"))


@each
@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "Q8_0", "Q4_1"])
@torch.no_grad()
def test_logits_are_those_of_transformers(architecture, kind, tmp_path):
    path = write_gguf(tmp_path / "model.gguf", drawn(architecture), kind)
    base = from_pretrained(path)
    peer = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=path.name, dtype=torch.float32)
    assert base.dtype == torch.float32 and base.config.layer_types == ["attn", "attn"]
    close(base(IDS).logits, peer(IDS).logits)


@each
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "own head"])
def test_an_fp32_file_has_the_weights_that_it_was_made_from(architecture, tied, tmp_path):
    model = drawn(architecture, tie_word_embeddings=tied)
    found = from_pretrained(write_gguf(tmp_path / "model.gguf", model))
    assert found.config.tie_word_embeddings is tied
    need = {name: value for name, value in model.state_dict().items() if not (tied and name == "lm_head.weight")}
    assert found.state_dict().keys() == need.keys()
    assert all(torch.equal(value, need[name]) for name, value in found.state_dict().items())


@each
def test_the_config_is_that_of_the_model(architecture, tmp_path):
    model = drawn(architecture)
    config = read_config(write_gguf(tmp_path / "model.gguf", model))
    names = ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "rms_norm_eps")
    names += ("max_position_embeddings", "vocab_size", "bos_token_id", "eos_token_id", "pad_token_id")
    for name in names:
        assert getattr(config, name) == getattr(model.config, name), name
    assert (config.rope_theta, config.rope_scaling, config.torch_dtype) == (50000.0, None, "float32")


@torch.no_grad()
def test_llama_3s_scaling_is_known_by_its_factors(tmp_path):
    """transformers leaves the factors out, so the peer is the model that the file was made from."""
    sizes = {"theta": 500000.0, "head_dim": 64, "num_attention_heads": 2, "num_key_value_heads": 1}
    model = drawn("llama", scaling=LLAMA32, max_position_embeddings=131072, **sizes)
    path = write_gguf(tmp_path / "model.gguf", model)
    base = from_pretrained(path)
    assert base.config.rope_scaling == LLAMA32 and base.config.head_dim == 64
    close(base(IDS).logits, model(IDS).logits)
    plain = from_pretrained(write_gguf(tmp_path / "b.gguf", model, tensors={"rope_freqs.weight": None}))
    assert plain.config.rope_scaling is None
    assert (plain(IDS).logits - model(IDS).logits).abs().max() > 1e-2
    ones = {"rope_freqs.weight": np.ones(32, np.float32)}
    assert read_config(write_gguf(tmp_path / "c.gguf", model, tensors=ones)).rope_scaling is None
    other = {"rope_freqs.weight": np.linspace(1, 32, 32, dtype=np.float32)}
    with pytest.raises(ValueError, match=r"rope_freqs.weight must be the factors of Llama 3.1 to 3.3 .*d\.gguf"):
        read_config(write_gguf(tmp_path / "d.gguf", model, tensors=other))


@torch.no_grad()
def test_dtypes_and_quantised_weights(llama):
    base = from_pretrained(llama)
    narrow = from_pretrained(llama, dtype="bfloat16")
    assert narrow.dtype == torch.bfloat16
    close(narrow(IDS).logits.float(), base(IDS).logits, 0.5)
    with pytest.raises(ValueError, match="must be one of float64, float32, bfloat16, float16"):
        from_pretrained(llama, dtype="int8")


def test_fp64_is_read_as_it_is(tmp_path):
    weight = np.linspace(0, 1, 64) / 3
    path = write_gguf(tmp_path / "model.gguf", drawn("llama"), tensors={"output_norm.weight": weight})
    assert from_pretrained(path, dtype="float64").model.norm.weight.tolist() == weight.tolist()
    assert torch.equal(from_pretrained(path).model.norm.weight, torch.from_numpy(weight).float())


def test_small_tensors_may_be_quantised(tmp_path):
    weight = np.full(64, 2.0, np.float32)
    block = gguf.quantize(weight, gguf.GGMLQuantizationType.Q8_0)
    path = write_gguf(tmp_path / "model.gguf", drawn("llama"), tensors={"output_norm.weight": block})
    torch.testing.assert_close(from_pretrained(path).model.norm.weight, torch.full((64,), 2.0), rtol=1e-2, atol=0)


def test_numbers_too_large_for_a_dtype_are_refused(tmp_path):
    weight = np.full(64, 1e6, np.float32)
    path = write_gguf(tmp_path / "model.gguf", drawn("llama"), tensors={"output_norm.weight": weight})
    with pytest.raises(ValueError, match=r"model.norm.weight \(output_norm.weight in .*model.gguf\) holds 1e\+06, too"):
        from_pretrained(path, dtype="float16")


def test_saved_it_is_a_base_with_its_tokenizer(llama, tmp_path):
    base = from_pretrained(llama)
    base.save_pretrained(tmp_path / "base")
    again = from_pretrained(tmp_path / "base")
    assert again.config == base.config
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in base.state_dict().items())
    names = {file.name for file in (tmp_path / "base").iterdir()}
    assert names == {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"block_count": None}, "the file must have llama.block_count"),
        ({"rope.dimension_count": 8}, "llama.rope.dimension_count must be 16, got 8"),
        ({"attention.value_length": 32}, "llama.attention.value_length must be 16, got 32"),
        ({"rope.scaling.type": "yarn"}, "llama.rope.scaling.type must be 'none', got 'yarn'"),
        ({"rope.freq_base": "x"}, "rope_theta must be a number, got 'x'"),
        ({"rope.scaling.factor": 4.0}, "llama.rope.scaling.factor is not understood, got 4.0"),
        ({"expert_count": 8}, "llama.expert_count must be 0, got 8"),
        ({"attention.sliding_window": 64}, "llama.attention.sliding_window is not understood, got 64"),
        ({"attention.head_count": [4, 2]}, r"llama.attention.head_count must be a positive integer, got \[4, 2\]"),
        ({"attention.head_count_kv": 3}, "num_attention_heads must be a multiple of num_key_value_heads = 3"),
    ],
)
def test_keys_of_other_models_are_refused(fields, sentence, tmp_path):
    path = write_gguf(tmp_path / "model.gguf", drawn("llama"), fields=fields)
    with pytest.raises(ValueError, match=f"{sentence}.*model.gguf"):
        read_config(path)


@pytest.mark.parametrize(
    ("tensors", "sentence"),
    [
        ({"blk.1.attn_k.weight": None}, r"missing model\.layers\.1\.self_attn\.k_proj\.weight"),
        ({"blk.0.ffn_gate_exps.weight": np.ones((2, 32), np.float32)}, r"unexpected blk\.0\.ffn_gate_exps\.weight"),
        ({"blk.0.attn_q.bias": np.ones(64, np.float32)}, r"unexpected model\.layers\.0\.self_attn\.q_proj\.bias"),
        ({"output_norm.weight": np.ones(32, np.float32)}, r"model\.norm\.weight must be \[64\], got \[32\]"),
        ({"output_norm.weight": np.ones(64, np.int32)}, r"model\.norm\.weight in .* must be one of .*, got I32"),
        ({"rope_freqs.weight": np.ones(8, np.int32)}, r"rope_freqs\.weight must be floating numbers, got I32"),
        ({"model.norm.weight": np.ones(64, np.float32)}, r"must have model\.norm\.weight once, got .*norm.weight and "),
        ({"token_embd.weight": None}, "the file must have the tensor token_embd.weight"),
    ],
)
def test_tensors_of_other_models_are_refused(tensors, sentence, tmp_path):
    path = write_gguf(tmp_path / "model.gguf", drawn("llama"), tensors=tensors)
    with pytest.raises(ValueError, match=sentence):
        from_pretrained(path)


def test_factors_of_a_base_that_is_no_number_are_refused(tmp_path):
    factors = {"rope_freqs.weight": np.full(8, 2, np.float32)}
    path = write_gguf(tmp_path / "model.gguf", drawn("llama"), fields={"rope.freq_base": "x"}, tensors=factors)
    with pytest.raises(ValueError, match="llama.rope.freq_base must be a number, got 'x'"):
        read_config(path)


def test_what_is_no_such_file_is_named(llama, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none\.gguf"):
        from_pretrained(tmp_path / "none.gguf")
    (tmp_path / "text.gguf").write_text("a text")
    with pytest.raises(ValueError, match=r"text\.gguf is not a GGUF file"):
        from_pretrained(tmp_path / "text.gguf")
    content = llama.read_bytes()
    for size in (8, 100, 3000, len(content) // 2, len(content) - 64):
        (tmp_path / "part.gguf").write_bytes(content[:size])
        with pytest.raises(ValueError, match=r"part\.gguf is not a whole GGUF file"):
            from_pretrained(tmp_path / "part.gguf")
    writer = gguf.GGUFWriter(tmp_path / "other.gguf", "gemma")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(ValueError, match=r"architecture must be one of llama, qwen2, qwen3, got 'gemma' .*other\.gguf"):
        from_pretrained(tmp_path / "other.gguf")
    with pytest.raises(ValueError, match="model_type must be jet_nemotron, got 'llama'"):
        JetNemotronForCausalLM.from_pretrained(llama)
    from_pretrained(llama).save_pretrained(tmp_path / "folder.gguf")
    assert from_pretrained(tmp_path / "folder.gguf").config.num_hidden_layers == 2
    os.mkfifo(tmp_path / "pipe.gguf")
    with pytest.raises(OSError, match=r"must be a file, it is a pipe or a device: .*pipe\.gguf"):
        from_pretrained(tmp_path / "pipe.gguf")
    with pytest.raises(FileNotFoundError, match=r"bare\.gguf has no tokenizer$"):
        Tokenizer.from_pretrained(write_gguf(tmp_path / "bare.gguf", drawn("llama"), tokenizer={}))


def test_without_the_package_its_extra_is_named(llama, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "gguf", None)
    with pytest.raises(ModuleNotFoundError, match=r"reading GGUF files needs the package gguf.*jetkernels\[gguf\]"):
        GgufFile(llama)
