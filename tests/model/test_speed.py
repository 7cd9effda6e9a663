"""What speed is measured with: preset caches, timed steps, transformers' Qwen3."""

import pytest
import torch
from support.model_cases import WINDOW, small_config, small_model

from jetkernels.model import JetNemotronConfig, JetNemotronForCausalLM, qwen3
from jetkernels.model.speed import FEWEST_STEPS, WARM_UP_STEPS, Decoder, time_steps

CPU = torch.device("cpu")


# Preset caches


def test_preset_values_are_random_and_repeat():
    model = small_model()
    cache, again, other = (model.new_cache(3, 2 * WINDOW) for _ in range(3))
    for each, seed in ((cache, 1), (again, 1), (other, 2)):
        each.preset([5, 0, 2 * WINDOW], seed)
    assert cache.lengths == [5, 0, 2 * WINDOW] and cache.lengths_device.tolist() == cache.lengths
    for a, b, c in zip(cache.tensors(), again.tensors(), other.tensors()):
        assert a.equal(b) and not a.equal(c) and len(a.unique()) > 0.99 * a.numel()
    everything = torch.cat([t.flatten() for t in cache.tensors()])
    assert abs(everything.mean()) < 0.05 and abs(everything.std() - 1) < 0.05


@torch.no_grad()
def test_steps_behind_a_preset_cache_are_those_of_each_sequence_alone():
    model, lengths = small_model(), [5, WINDOW + 3, 11]
    together = model.new_cache(3, WINDOW + 12)
    together.preset(lengths)
    singles = [model.new_cache(1, WINDOW + 12) for _ in lengths]
    for n, (single, length) in enumerate(zip(singles, lengths)):
        single.preset([length])
        for mine, all_of_them in zip(single.tensors(), together.tensors()):
            mine.copy_(all_of_them[n : n + 1])
    for step in range(3):
        tokens = torch.tensor([[3], [4], [5 + step]])
        logits = model(tokens, cache=together).logits
        for n, single in enumerate(singles):
            alone = model(tokens[n : n + 1], cache=single).logits
            torch.testing.assert_close(logits[n : n + 1], alone, atol=1e-5, rtol=0)
    assert together.lengths == [length + 3 for length in lengths]


@pytest.mark.parametrize(
    ("lengths", "says"),
    [
        ([1], "holds 2 sequences, got 1 lengths"),
        ([1, 2, 3], "holds 2 sequences, got 3 lengths"),
        ([1, 9], r"lengths\[1\] must be an integer from 0 to max_length = 8, got 9"),
        ([-1, 1], r"lengths\[0\] must be an integer from 0 .* got -1"),
        ([1, 1.0], r"lengths\[1\] must be an integer .* got 1\.0"),
    ],
)
def test_wrong_lengths_leave_the_cache_as_it_is(lengths, says):
    cache = small_model().new_cache(2, 8)
    with pytest.raises(ValueError, match=says):
        cache.preset(lengths)
    assert cache.lengths == [0, 0] and all(not tensor.any() for tensor in cache.tensors())


def test_preset_makes_an_unfinished_cache_whole():
    model = small_model()
    cache = model.new_cache(1, 8)
    cache.begin()
    cache.preset([4])
    with torch.no_grad():
        model(torch.tensor([[1]]), cache=cache)
    assert cache.lengths == [5]


# Timed steps


def test_a_decoder_feeds_the_most_likely_tokens_back():
    model = small_model()
    decoder, again = (Decoder(model, 2, 6, 3, seed=4) for _ in range(2))
    need = again.tokens
    for _ in range(3):
        decoder.step()
        need = model(need, cache=again.cache).logits[:, -1].argmax(-1, keepdim=True)
        assert decoder.tokens.equal(need)
    assert decoder.cache.lengths == [9, 9]
    with pytest.raises(ValueError, match="max_length = 9"):
        decoder.step()


@pytest.mark.parametrize(
    ("steps", "seconds", "warm_up", "timed"),
    [
        (5, 1e9, WARM_UP_STEPS, 5),
        (2, 1e9, WARM_UP_STEPS, 2),
        (9, 4.0, 1, 4),
        (9, 1e-9, 1, FEWEST_STEPS),
        (2, 1e-9, 1, 2),
    ],
)
def test_steps_that_are_timed(monkeypatch, steps, seconds, warm_up, timed):
    """Each takes one second."""
    now, calls = [0.0], [0]

    def step() -> None:
        now[0] += 1

    def on_call() -> None:
        now[0] += 100  # is in no time
        calls[0] += 1

    monkeypatch.setattr("jetkernels.model.speed.time.perf_counter", lambda: now[0])
    assert time_steps(step, CPU, steps, seconds, on_call) == [1.0] * timed
    assert calls[0] == warm_up + timed


# Full attention, and transformers' model of its shape


def test_the_shape_of_full_attention():
    """Qwen3-1.7B has 1,720,574,976 parameters: norms of q and k where ours has biases of q, k and v."""
    config = JetNemotronConfig.from_name("full-attention")
    L, H, Hkv, d = 28, 16, 8, 128
    assert config.layer_types == ["attn"] * L and (config.num_attention_heads, config.head_dim) == (H, d)
    model = JetNemotronForCausalLM(config, device="meta", dtype=torch.bfloat16)
    norms, biases = L * 2 * d, L * (H + 2 * Hkv) * d
    assert sum(p.numel() for p in model.parameters()) == 1_720_574_976 - norms + biases
    cache = model.new_cache(1, 1024)
    assert cache.nbytes == 1024 * L * 2 * Hkv * d * 2


def test_qwen3_of_a_config():
    pytest.importorskip("transformers")
    config = small_config(["attn"] * 2, tie_word_embeddings=True)
    model = qwen3.random_qwen3(config, dtype=torch.float32, seed=3)
    again = qwen3.random_qwen3(config, dtype=torch.float32, seed=3)
    ours = JetNemotronForCausalLM(config, device="meta")
    d, H, Hkv = config.head_size, config.num_attention_heads, config.num_key_value_heads
    difference = 2 * (2 * d - (H + 2 * Hkv) * d)  # in each of the two layers: norms of q and k, no biases
    assert sum(p.numel() for p in model.parameters()) == sum(p.numel() for p in ours.parameters()) + difference
    assert model.lm_head.weight is model.model.embed_tokens.weight and not model.training
    for (name, a), b in zip(model.named_parameters(), again.parameters()):
        assert a.equal(b) and a.isfinite().all() and a.abs().max() > 0, name
    exponents = torch.arange(0, d, 2) / d
    torch.testing.assert_close(model.model.rotary_emb.inv_freq, config.rope_theta**-exponents)
    decoder = qwen3.Qwen3Decoder(model, 3, 17, 4)
    for _ in range(3):
        decoder.step()
    assert decoder.cache.get_seq_length() == 20 and decoder.cache.layers[0].keys.shape == (3, Hkv, 20, d)
    assert qwen3.time_prefill(model, torch.ones(1, 9, dtype=torch.int64), 4) > 0


def test_qwen3_has_attention_only():
    with pytest.raises(ValueError, match="attn layers only, the config has jet, swa"):
        qwen3.check(small_config())
