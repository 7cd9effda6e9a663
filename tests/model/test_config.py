"""JetNemotronConfig and JetBlockConfig: what is written is what is computed, and anything else is refused by name."""

import copy
import dataclasses
import json
import math
import random
import time

import pytest
import torch
from support.model_cases import JET

from jetkernels.model import JetNemotronConfig, JetNemotronForCausalLM
from jetkernels.model.mixers import MIXERS
from jetkernels.modules import JetBlockConfig

VALID = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "layer_types": ["jet", "swa", "attn"],
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "efficient_attention_config": {"jet": JET, "swa": {"window_size": 5}},
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
    "initializer_range": 0.02,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": True,
    "bos_token_id": 3,
    "eos_token_id": [3, 4],
    "pad_token_id": 5,
    "torch_dtype": "bfloat16",
    "hidden_act": "silu",
    "model_type": "jet_nemotron",
    "attention_dropout": 0.0,
}


def config(**changes) -> JetNemotronConfig:
    return JetNemotronConfig.from_dict(copy.deepcopy(VALID) | changes)


def without(*names: str) -> dict:
    return {key: value for key, value in copy.deepcopy(VALID).items() if key not in names}


# ---- rotary positions


@pytest.mark.parametrize("key", ["rope_parameters", "rope_scaling"])
@pytest.mark.parametrize("kind", ["rope_type", "type"])
def test_the_rotary_base_of_newer_files(key, kind):
    values = without("rope_theta") | {key: {"rope_theta": 10000, kind: "default"}}
    read = JetNemotronConfig.from_dict(values)
    assert read.rope_theta == 10000.0
    written = read.to_dict()
    assert written["rope_theta"] == 10000.0 and "rope_parameters" not in written and written["rope_scaling"] is None
    assert JetNemotronConfig.from_dict(written) == read
    assert JetNemotronConfig.from_dict(values | {"rope_theta": 10000.0}) == read


@pytest.mark.parametrize(
    "section",
    [
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768, "rope_theta": 1e6},
        {"type": "linear", "factor": 2.0},
        {"rope_type": "dynamic"},
        {"rope_type": "longrope", "long_factor": [1.0]},
        {"rope_type": "default", "partial_rotary_factor": 0.5},
        {"rope_type": "default", "mrope_section": [1, 2]},
        {"full_attention": {"rope_type": "default"}},
        {"rope_type": None},
        "yarn",
        5,
        [],
    ],
)
@pytest.mark.parametrize("key", ["rope_parameters", "rope_scaling"])
def test_rotations_that_are_not_computed_are_refused(section, key):
    with pytest.raises(ValueError, match=f"config: {key} must be None, got"):
        config(**{key: section})


LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


@pytest.mark.parametrize("key", ["rope_parameters", "rope_scaling"])
def test_llama_3s_rotations_are_read_and_written(key):
    legacy = {"type": "llama3", "factor": 8, "partial_rotary_factor": 1.0, "rope_theta": 1e6}
    for section in (LLAMA3, LLAMA3 | {"rope_theta": 1e6}, {**LLAMA3, **legacy}):
        read = config(**{key: section})
        assert read.rope_scaling == LLAMA3 and read.to_dict()["rope_scaling"] == LLAMA3
        assert JetNemotronConfig.from_dict(json.loads(json.dumps(read.to_dict()))) == read != config()
    with pytest.raises(ValueError, match="rope_scaling and rope_parameters must ask for one scaling"):
        config(rope_scaling=LLAMA3, rope_parameters=LLAMA3 | {"factor": 4.0})
    assert config(rope_scaling=LLAMA3, rope_parameters=LLAMA3) == config(rope_scaling=LLAMA3)


def test_a_config_made_in_python_has_one_rotary_base():
    read = config(rope_scaling=LLAMA3)
    assert dataclasses.replace(read, rope_scaling=LLAMA3 | {"rope_theta": 1e6}) == read
    with pytest.raises(ValueError, match=r"rope_theta and rope_scaling\.rope_theta must agree, got 1000000\.0 and 5"):
        dataclasses.replace(read, rope_scaling=LLAMA3 | {"rope_theta": 5.0})


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"factor": None}, "rope_scaling.factor must be a number, got None"),
        ({"factor": 0.5}, "rope_scaling.factor must be at least 1, got 0.5"),
        ({"low_freq_factor": 4.0}, "rope_scaling.high_freq_factor must be above low_freq_factor = 4, got 4"),
        ({"high_freq_factor": math.nan}, "rope_scaling.high_freq_factor must be finite"),
        ({"original_max_position_embeddings": 0.5}, "original_max_position_embeddings must be a positive integer"),
        ({"attention_factor": 2.0}, r"rope_scaling must have .* alone, got \['attention_factor'\] too"),
    ],
)
def test_wrong_values_of_llama_3s_rotations_are_refused(changes, message):
    with pytest.raises(ValueError, match=f"config: {message}|{message}"):
        config(rope_scaling=LLAMA3 | changes)


def test_two_rotary_bases_must_agree():
    with pytest.raises(
        ValueError, match=r"rope_theta and rope_parameters.rope_theta must agree, got 1000000.0 and 10000"
    ):
        config(rope_parameters={"rope_theta": 1e4})
    with pytest.raises(ValueError, match=r"rope_parameters.rope_theta must be finite, got nan"):
        config(rope_parameters={"rope_theta": math.nan})


# ---- another model, or none


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"hidden_act": "gelu"}, "hidden_act must be 'silu'"),
        ({"attention_bias": 1}, "attention_bias must be true or false, got 1"),
        ({"use_qk_norm": None}, "use_qk_norm must be true or false, got None"),
        ({"mlp_bias": True}, "mlp_bias must be False"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor must be 1.0"),
        ({"attention_dropout": 0.1}, "attention_dropout must be 0.0"),
        ({"attention_dropout": math.nan}, "attention_dropout must be 0.0"),
        ({"use_sliding_window": True, "sliding_window": 7}, "use_sliding_window must be False"),
        ({"use_sliding_window": 0}, "use_sliding_window must be False, got 0"),
        ({"quantization_config": {"bits": 4}}, "quantization_config must be None"),
        ({"rms_norm_eps": math.nan}, "rms_norm_eps must be finite, got nan"),
        ({"rms_norm_eps": -1e-6}, "rms_norm_eps must be at least 0"),
        ({"rms_norm_eps": "small"}, "rms_norm_eps must be a number, got 'small'"),
        ({"rope_theta": 0}, "rope_theta must be at least 1"),
        ({"rope_theta": -1e6}, "rope_theta must be at least 1"),
        ({"rope_theta": math.inf}, "rope_theta must be finite, got inf"),
        ({"rope_theta": 10**400}, "rope_theta must be a number, got 1000"),
        ({"tie_word_embeddings": "no"}, "tie_word_embeddings must be true or false, got 'no'"),
        ({"tie_word_embeddings": 1}, "tie_word_embeddings must be true or false, got 1"),
        ({"hidden_size": math.inf}, "hidden_size must be a positive integer, got inf"),
        ({"hidden_size": 32.5}, "hidden_size must be a positive integer, got 32.5"),
        ({"vocab_size": 0}, "vocab_size must be a positive integer, got 0"),
        ({"vocab_size": True}, "vocab_size must be a positive integer, got True"),
        ({"vocab_size": 2**63}, "vocab_size must be at most 16777216"),
        ({"max_position_embeddings": -1}, "max_position_embeddings must be a positive integer, got -1"),
        ({"layer_types": "jet"}, f"layer_types must be a list of {', '.join(MIXERS)}, got 'jet'"),
        ({"layer_types": []}, "layer_types must have 1 to 4096, got 0"),
        ({"layer_types": [["jet"]] * 3}, r"layer_types\[0\] must be one of"),
        ({"num_hidden_layers": "3"}, "num_hidden_layers must be 1 to 4096, got '3'"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers must be 1 to 4096, got 1000000000"),
        ({"num_hidden_layers": 4}, "layer_types must have num_hidden_layers = 4 entries, got 3"),
        ({"head_dim": 2**23}, r"num_attention_heads \* head_dim must be at most"),
        ({"bos_token_id": -1}, "bos_token_id must be None or a token id"),
        ({"eos_token_id": [3, None]}, "eos_token_id must be None or a token id"),
        ({"eos_token_id": [-3]}, "eos_token_id must be None or a token id"),
        ({"pad_token_id": 0.5}, "pad_token_id must be None or a token id"),
        ({"torch_dtype": "int8"}, "torch_dtype must name a dtype, got 'int8'"),
        ({"torch_dtype": 5}, "torch_dtype must name a dtype, got '5'"),
        ({"dtype": "float32"}, "torch_dtype and dtype must agree"),
        ({"efficient_attention_config": []}, "efficient_attention_config must be a mapping"),
        (
            {"efficient_attention_config": {"jet": 3, "swa": {"window_size": 5}}},
            "efficient_attention_config.jet is needed by a jet layer, got 3",
        ),
        (
            {"efficient_attention_config": {"jet": JET, "swa": {"window_size": True}}},
            "swa.window_size must be a positive integer, got True",
        ),
        ({"model_type": ["jet_nemotron"]}, "model_type must be jet_nemotron"),
    ],
)
def test_what_is_not_computed_is_refused(changes, message):
    with pytest.raises(ValueError, match=f"config: .*{message}|{message}"):
        config(**changes)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"expand_v": float("1e400")}, "expand_v must be finite, got inf"),
        ({"expand_v": "1e400"}, "expand_v must be finite, got '1e400'"),
        ({"expand_v": 1e300}, r"head_dim \* expand_v must be at least 1 and at most"),
        ({"norm_eps": math.nan}, "norm_eps must be finite, got nan"),
        ({"norm_eps": True}, "norm_eps must be a number, got True"),
        ({"norm_eps": 2}, "norm_eps must be below 1, got 2"),
        ({"num_heads": 10**400}, "num_heads must be at most"),
        ({"num_heads": 10**5000}, "num_heads must be at most 16777216, got an integer of 16610 bits"),
        ({"num_heads": math.inf}, "num_heads must be a positive int, got inf"),
        ({"num_heads": True}, "num_heads must be a positive int, got True"),
        ({"num_heads": 2**24, "head_dim": 2}, r"num_heads \* head_dim must be at most"),
        ({"head_dim": "12"}, "head_dim must be a positive int, got '12'"),
    ],
)
def test_jet_block_sizes_that_are_no_sizes_are_refused(changes, message):
    with pytest.raises(ValueError, match=f"jet: {message}"):
        JetBlockConfig(**changes)


def test_names_of_a_mapping_are_strings():
    for values in ([], "jet", None, {1: 2}):
        with pytest.raises(ValueError, match="config: must be a mapping of names"):
            JetNemotronConfig.from_dict(values)


def test_a_million_layers_are_refused_at_once():
    values = without() | {"layer_types": ["jet"] * 10**6, "num_hidden_layers": 10**6}
    start = time.process_time()
    with pytest.raises(ValueError, match="layer_types must have 1 to 4096, got 1000000"):
        JetNemotronConfig.from_dict(values)
    assert time.process_time() - start < 0.2


# ---- anything at all

JUNK = [
    None,
    True,
    False,
    "no",
    "",
    "12",
    "1e-5",
    "nan",
    -1,
    0,
    1,
    2,
    7,
    1.5,
    -0.0,
    math.nan,
    math.inf,
    -math.inf,
    1e308,
    5e-324,
    10**400,
    2**63,
    2**31,
    [],
    {},
    [None],
    [1],
    ["jet"],
    {"a": 1},
    [[[]]],
    {"jet": {}},
    {"rope_type": "yarn"},
    dict(LLAMA3),
    "silu",
    "default",
    "x" * 10**5,
    [0] * 10**4,
]
KEYS = [
    *VALID,
    "rope_scaling",
    "rope_parameters",
    "dtype",
    "use_mrope",
    "partial_rotary_factor",
    "attention_bias",
    "use_qk_norm",
    "mlp_bias",
]
PATHS = (
    [(key,) for key in KEYS]
    + [("efficient_attention_config", "jet", key) for key in JET]
    + [("efficient_attention_config", "swa", "window_size")]
)
# Where a field is refused by the name of what it decides.
ALIASES = {
    "efficient_attention_config": {"jet", "swa"},
    "num_hidden_layers": {"layer_types"},
    "dtype": {"torch_dtype"},
    "num_heads": {"dconv_generator_reduction"},
    "expand_v": {"dconv_generator_reduction"},
    "head_dim": {"dconv_generator_reduction"},
}


def check_accepted(read: JetNemotronConfig) -> None:
    """Every number is one that a model can be built and run with."""
    sizes = [
        getattr(read, n)
        for n in VALID
        if n.endswith("_size") or n.startswith("num_") or n in ("head_dim", "max_position_embeddings")
    ]
    sizes += [
        read.jet.num_heads,
        read.jet.head_dim,
        read.jet.conv_size,
        read.jet.dconv_generator_reduction,
        read.window_size,
    ]
    assert all(type(n) is int and 1 <= n <= 2**24 for n in sizes)
    for value, least, most in (
        (read.rms_norm_eps, 0, 1),
        (read.jet.norm_eps, 0, 1),
        (read.rope_theta, 1, 1e308),
        (read.jet.expand_v, 0, 2**24),
    ):
        assert type(value) is float and least <= value <= most
    ids = [read.bos_token_id, read.pad_token_id, *read.stop_token_ids, read.padding_token_id]
    assert all(n is None or type(n) is int and n >= 0 for n in ids)
    assert type(read.tie_word_embeddings) is bool and read.dtype.is_floating_point
    written = json.loads(json.dumps(read.to_dict()))
    assert JetNemotronConfig.from_dict(written) == read


def test_two_thousand_random_changes_are_read_or_refused_by_name():
    rng = random.Random(0)
    accepted = []
    for _ in range(2000):
        values = copy.deepcopy(VALID)
        path, junk = rng.choice(PATHS), rng.choice(JUNK)
        place = values
        for key in path[:-1]:
            place = place[key] = dict(place[key])
        place[path[-1]] = junk
        try:
            read = JetNemotronConfig.from_dict(values)
        except ValueError as error:
            names = {path[-1]} | ALIASES.get(path[-1], set())
            assert any(name in str(error) for name in names) and len(str(error)) < 400, (path, junk, str(error)[:500])
            continue
        check_accepted(read)
        accepted.append((path, junk, read))
    assert 200 < len(accepted) < 700
    # What was accepted is a model; one for each field is enough.
    for _, _, read in {path: (path, junk, read) for path, junk, read in accepted}.values():
        if max(read.vocab_size, read.hidden_size, read.intermediate_size, read.jet.value_dim) < 1000:
            with torch.no_grad():
                logits = JetNemotronForCausalLM.random(read, dtype=torch.float32)(
                    torch.zeros(1, 3, dtype=torch.int64)
                ).logits
            assert logits.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, "bfloat16", "torch.bfloat16"])
def test_the_dtype_may_be_given_as_one(dtype):
    read = config(torch_dtype=dtype)
    assert read.dtype == torch.bfloat16 and read.to_dict()["torch_dtype"] == "bfloat16"
    assert JetNemotronConfig.from_dict(without("torch_dtype") | {"dtype": dtype}) == read


def test_what_published_files_do_not_name_is_written_where_it_differs():
    """They have biases and no norms of q and k."""
    assert {"attention_bias", "use_qk_norm"}.isdisjoint(config().to_dict())
    other = config(attention_bias=False, use_qk_norm=True)
    assert other.to_dict().items() >= {"attention_bias": False, "use_qk_norm": True}.items()
    assert JetNemotronConfig.from_dict(other.to_dict()) == other and config(attention_bias=True) == config()
