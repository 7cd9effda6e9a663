"""Generation: the same tokens as repeated full forwards, whatever the batch, the padding and the prefill."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.model_cases import VOCAB, padded, small_model, tokens

from jetkernels.model import generation


def greedy(model, row, count):
    """Definition: append the most likely token, run everything again."""
    ids = row[None]
    with torch.no_grad():
        for _ in range(count):
            ids = torch.cat((ids, model(ids).logits[:, -1:].argmax(-1)), 1)
    return ids[0, len(row) :]


@pytest.fixture(scope="module")
def model():
    return small_model(seed=3)


def test_greedy_is_repeated_argmax(model):
    ids = tokens(3, 7)
    out = model.generate(ids, max_new_tokens=12, stop_token_ids=())
    assert out.shape == (3, 19) and torch.equal(out[:, :7], ids)
    for n in range(3):
        assert torch.equal(out[n, 7:], greedy(model, ids[n], 12))


@given(
    lengths=st.lists(st.integers(1, 11), min_size=1, max_size=4),
    left=st.booleans(),
    chunk=st.none() | st.integers(1, 12),
)
@settings(max_examples=15, deadline=None)
def test_padded_batch_with_chunked_prefill(model, lengths, left, chunk):
    rows = [tokens(t, seed=n) for n, t in enumerate(lengths)]
    ids, mask = padded(rows, left)
    out = model.generate(ids, mask, 7, stop_token_ids=(), prefill_chunk=chunk)
    assert torch.equal(out[:, : ids.shape[1]], ids)
    for n, row in enumerate(rows):
        assert torch.equal(out[n, ids.shape[1] :], greedy(model, row, 7))


@given(st.integers(1, 3), st.sampled_from([1, 7, 61, 64, 1024, 1187 * 8]), st.integers(0, 99))
def test_the_most_likely_token_is_the_first_of_the_largest(batch, vocab, seed):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randint(-3, 4, (batch, vocab), generator=generator).to(torch.bfloat16)
    logits[torch.rand(batch, vocab, generator=generator) < 0.1 * (seed % 2)] = float("nan" if seed % 4 == 1 else "-inf")
    need = [max(range(vocab), key=lambda i: (row[i] != row[i], row[i], -i)) for row in logits.tolist()]
    assert generation.most_likely(logits).tolist() == need


def test_rows_stop_on_their_own(model):
    ids = tokens(3, 5)
    free = model.generate(ids, max_new_tokens=9, stop_token_ids=())[:, 5:]
    # Ends row 0 at its third token or before; the others when they happen to meet it.
    stop = int(free[0, 2])
    out = model.generate(ids, max_new_tokens=9, stop_token_ids=[stop], pad_token_id=60)[:, 5:]
    ends = [(row.tolist() + [stop]).index(stop) + 1 for row in free]
    assert out.shape[1] == min(9, max(ends))
    for n, end in enumerate(ends):
        assert torch.equal(out[n, :end], free[n, : out.shape[1]][:end])
        assert (out[n, end:] == 60).all()


def test_ends_when_all_rows_have_ended(model, monkeypatch):
    ids = tokens(1, 5)
    free = model.generate(ids, max_new_tokens=8, stop_token_ids=())[0, 5:]
    first = free.tolist().index(int(free[3]))
    out = model.generate(ids, max_new_tokens=100, stop_token_ids=[int(free[3])])
    assert out.shape[1] == 5 + first + 1


def test_default_stop_and_padding_come_from_the_config(model):
    assert model.config.stop_token_ids == [151643] and model.config.padding_token_id == 151643
    eos = int(model.generate(tokens(1, 5), max_new_tokens=2, stop_token_ids=())[0, 6])
    other = small_model(seed=3, eos_token_id=[eos, 3], pad_token_id=5)
    assert other.config.stop_token_ids == [eos, 3] and other.config.padding_token_id == 5
    assert other.generate(tokens(1, 5), max_new_tokens=50)[0, -1] in (eos, 3)


def test_callback_sees_every_step(model):
    ids, seen = tokens(2, 5), []
    free = model.generate(ids, max_new_tokens=6, stop_token_ids=())[:, 5:]
    stop = int(free[0, 1])
    out = model.generate(ids, None, 6, stop_token_ids=[stop], on_tokens=lambda t, r: seen.append((t.clone(), r)))
    assert torch.equal(torch.stack([t for t, _ in seen], 1), out[:, 5:])
    running = torch.stack([r for _, r in seen], 1)
    for n in range(2):
        got = out[n, 5:][running[n]].tolist()
        assert stop not in got[:-1] and (got[-1] == stop or len(got) == len(seen))


@pytest.mark.parametrize("options", [{"top_k": 1}, {"top_p": 1e-6}, {"top_k": 5, "top_p": 1e-6}])
def test_narrowest_draw_is_greedy(model, options):
    ids = tokens(2, 5)
    need = model.generate(ids, max_new_tokens=6, stop_token_ids=())
    assert torch.equal(model.generate(ids, max_new_tokens=6, stop_token_ids=(), temperature=1.3, **options), need)


def test_a_seeded_generator_repeats(model):
    ids = tokens(2, 5)

    def draw(seed):
        return model.generate(
            ids, max_new_tokens=12, temperature=2.0, stop_token_ids=(), generator=torch.Generator().manual_seed(seed)
        )

    assert torch.equal(draw(1), draw(1)) and not torch.equal(draw(1), draw(2))


@pytest.mark.parametrize(
    "temperature, top_k, top_p, kept",
    [
        (1.0, None, None, [0.4, 0.3, 0.2, 0.1]),
        (0.5, None, None, [0.16, 0.09, 0.04, 0.01]),
        (1.0, 2, None, [0.4, 0.3, 0, 0]),
        (1.0, None, 0.65, [0.4, 0.3, 0, 0]),
        (1.0, None, 0.75, [0.4, 0.3, 0.2, 0]),
        (1.0, 3, 0.5, [0.4, 0.3, 0, 0]),
        (1.0, 9, 1.0, [0.4, 0.3, 0.2, 0.1]),
    ],
)
def test_draws_follow_the_distribution(temperature, top_k, top_p, kept):
    order = torch.tensor([2, 0, 3, 1])
    logits = torch.tensor([0.4, 0.3, 0.2, 0.1]).log()[order].expand(20000, 4)
    drawn = generation.choose(logits, temperature, top_k, top_p, torch.Generator().manual_seed(0))
    got = torch.bincount(drawn, minlength=4) / len(drawn)
    need = torch.tensor(kept)[order]
    torch.testing.assert_close(got, need / need.sum(), atol=0.015, rtol=0)
    assert not got[need == 0].any()


@pytest.mark.parametrize("temperature", [1e-320, 1e-45, 1e-38, 1e-30, 1e-5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_lowest_temperatures_draw_the_most_likely_token(temperature, dtype):
    logits = torch.tensor([[-3e4, 2.0, 3e4, 2.9e4, -torch.inf]]).to(dtype)
    for options in ((None, None), (3, None), (None, 0.5)):
        assert generation.choose(logits, temperature, *options, torch.Generator().manual_seed(0)).tolist() == [2]


def test_the_highest_temperature_draws_all_possible_tokens_alike():
    logits = torch.tensor([3e4, -3e4, 0.0, -torch.inf]).expand(8000, 4)
    drawn = generation.choose(logits, 1e308, None, None, torch.Generator().manual_seed(0))
    torch.testing.assert_close(
        torch.bincount(drawn, minlength=4) / 8000, torch.tensor([1 / 3, 1 / 3, 1 / 3, 0]), atol=0.02, rtol=0
    )


def test_logits_that_are_not_finite_are_no_tokens(model):
    broken = small_model(seed=3)
    with torch.no_grad():
        broken.model.norm.weight[0] = torch.nan
    with pytest.raises(RuntimeError, match="the logits after prompt 0 are not finite"):
        broken.generate(tokens(2, 3))


def test_what_the_callback_raises_is_passed_on_and_the_model_goes_on_working(model):
    class Enough(Exception):
        pass

    def stop(tokens, running):
        raise Enough

    before = model.generate(tokens(1, 5), max_new_tokens=4)
    with pytest.raises(Enough):
        model.generate(tokens(1, 5), max_new_tokens=4, on_tokens=stop)
    assert torch.equal(model.generate(tokens(1, 5), max_new_tokens=4), before)


def test_ids_of_32_bits_and_stop_tokens_of_any_form_give_the_same(model):
    ids = tokens(2, 5)
    stop = int(model.generate(ids, max_new_tokens=3, stop_token_ids=())[0, 6])
    need = model.generate(ids, max_new_tokens=6, stop_token_ids=[stop])
    for form in (stop, (stop,), torch.tensor([stop]), range(stop, stop + 1)):
        assert torch.equal(model.generate(ids.int(), max_new_tokens=6, stop_token_ids=form), need)
    none = model.generate(ids.int(), max_new_tokens=0)
    assert none.dtype == torch.int64 and torch.equal(none, ids) and none.data_ptr() != ids.data_ptr()


def test_ties_keep_exactly_top_k():
    drawn = generation.choose(torch.zeros(500, 8), 1.0, 3, None, torch.Generator().manual_seed(0))
    assert len(set(drawn.tolist())) == 3


def test_no_new_tokens(model):
    ids = tokens(2, 5)
    assert torch.equal(model.generate(ids, max_new_tokens=0), ids)


def test_decode_steps_use_the_step_ops(model, monkeypatch):
    """After the prefill every JetBlock layer runs its in-place step, not the chunked path."""
    from jetkernels.modules import jet_block

    calls = []
    chunk = jet_block.chunk_gated_delta_rule
    monkeypatch.setattr(jet_block, "chunk_gated_delta_rule", lambda *a, **k: calls.append(1) or chunk(*a, **k))
    model.generate(tokens(2, 5), max_new_tokens=6, stop_token_ids=())
    assert len(calls) == model.config.layer_types.count("jet")


@pytest.mark.parametrize(
    "options, message",
    [
        (
            {"input_ids": torch.zeros(2, 0, dtype=torch.int64)},
            r"input_ids must be \[B, T\] with B, T >= 1, got \[2, 0\]",
        ),
        ({"attention_mask": torch.ones(2, 4)}, r"attention_mask must be \[2, 3\], got \[2, 4\]"),
        ({"attention_mask": torch.tensor([[1, 1, 1], [0, 0, 0]])}, "got a row of zeros"),
        ({"max_new_tokens": -1}, "max_new_tokens must be at least 0, got -1"),
        ({"temperature": -0.5}, "temperature must be at least 0, got -0.5"),
        ({"temperature": float("nan")}, "temperature must be at least 0, got nan"),
        ({"top_k": 0}, "top_k must be at least 1, got 0"),
        ({"top_p": 0.0}, "top_p must be above 0 and at most 1, got 0.0"),
        ({"prefill_chunk": 0}, "prefill_chunk must be at least 1, got 0"),
        ({"temperature": float("inf")}, "temperature must be finite, got inf"),
        ({"top_p": float("nan")}, "top_p must be above 0 and at most 1, got nan"),
        ({"input_ids": torch.zeros(0, 3, dtype=torch.int64)}, r"got \[0, 3\]"),
        ({"input_ids": torch.zeros(3, dtype=torch.int64)}, r"input_ids must be \[B, T\] with B, T >= 1, got \[3\]"),
        ({"input_ids": torch.zeros(2, 3)}, "input_ids must be int64 or int32, got torch.float32"),
        ({"input_ids": torch.zeros(2, 3), "max_new_tokens": 0}, "input_ids must be int64 or int32, got torch.float32"),
        (
            {"input_ids": torch.zeros(2, 3, dtype=torch.int64, device="meta")},
            "input_ids must be on the model's device cpu, got meta",
        ),
        ({"input_ids": torch.full((2, 3), VOCAB)}, f"input_ids must be in 0..{VOCAB - 1}, got {VOCAB}"),
        ({"input_ids": [[1, 2]]}, r"input_ids must be a tensor \[B, T\], got list"),
        ({"attention_mask": [[1, 1, 1]] * 2}, r"attention_mask must be a tensor \[B, T\], got list"),
        ({"attention_mask": torch.tensor([[0, 0, 0], [1, 1, 1]]), "max_new_tokens": 0}, "row of zeros: row 0"),
        ({"max_new_tokens": 2.5}, "max_new_tokens must be an integer, got 2.5"),
        ({"max_new_tokens": None}, "max_new_tokens must be an integer, got None"),
        ({"temperature": None}, "temperature must be a number, got None"),
        ({"top_k": 2.0}, "top_k must be an integer, got 2.0"),
        ({"top_p": "all"}, "top_p must be a number, got 'all'"),
        ({"stop_token_ids": [1.5]}, "stop_token_ids must be an integer, got 1.5"),
        ({"stop_token_ids": "end"}, "stop_token_ids must be an integer, got 'e'"),
        ({"pad_token_id": "0"}, "pad_token_id must be an integer, got '0'"),
        ({"pad_token_id": 1 << 63}, "pad_token_id must be an integer of 64 bits, got 9223372036854775808"),
        ({"stop_token_ids": [1, 1 << 63]}, "stop_token_ids must be an integer of 64 bits, got 9223372036854775808"),
        ({"max_new_tokens": 10**5000}, "max_new_tokens must be an integer of 64 bits, got an integer of 16610 bits"),
        ({"temperature": 10**5000}, "temperature must be finite, got an integer of 16610 bits"),
        ({"temperature": "0.5"}, "temperature must be a number, got '0.5'"),
        ({"temperature": torch.ones(2)}, r"temperature must be a number, got tensor\(\[1., 1.\]\)"),
        ({"generator": 3}, "generator must be a torch.Generator, got 3"),
        ({"on_tokens": 3}, "on_tokens must be callable, got 3"),
    ],
)
def test_bad_options_are_refused(model, options, message, monkeypatch):
    if "input_ids" not in options:
        monkeypatch.setattr(model.model, "forward", None)  # nothing is computed
    with pytest.raises((ValueError, TypeError), match=message):
        model.generate(**{"input_ids": tokens(2, 3) % VOCAB, **options})


@pytest.mark.parametrize("form", [np.int64, torch.tensor], ids=["numpy", "tensor"])
def test_numbers_of_any_form_give_the_same(model, form):
    ids, options = tokens(2, 3), {"max_new_tokens": 5, "top_k": 7, "prefill_chunk": 2, "pad_token_id": 3}
    options |= {"temperature": 0.5, "top_p": 0.9}
    of_a_form = {name: form(x) if isinstance(x, int) else torch.tensor(x) for name, x in options.items()}
    need, got = (
        model.generate(ids, stop_token_ids=11, generator=torch.Generator().manual_seed(2), **o)
        for o in (options, of_a_form)
    )
    assert torch.equal(got, need)
