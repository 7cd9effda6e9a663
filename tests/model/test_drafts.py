"""Generation with drafts: the tokens of greedy generation, one for one."""

import __future__

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.documents import block_after, blocks, run_python
from support.model_cases import JET, VOCAB, WINDOW, padded, small_config, small_model, tokens

from jetkernels.model import JetNemotronForCausalLM, mixers
from jetkernels.model.drafts import MOST_PROPOSED, PromptLookup

MIXES = [("jet", "swa", "jet", "attn"), ("jet", "jet"), ("attn", "swa"), ("swa", "jet")]


@pytest.fixture(scope="module")
def models():
    # Wider than usual: their texts are long in coming to repeat one token.
    return [small_model(*types, seed=n, initializer_range=0.3) for n, types in enumerate(MIXES)]


@pytest.fixture
def model(models):
    return models[0]


def draw_prompts(generator, count):
    """Prompts of 1 to 13 tokens, some of few different ones, so that much is found again."""
    for _ in range(count):
        length = int(torch.randint(1, 14, (), generator=generator))
        vocab = (4, VOCAB)[int(torch.randint(2, (), generator=generator))]
        yield torch.randint(vocab, (length,), generator=generator)


def partly_right(prompts, answers, generator):
    """Proposes 4 tokens of the answers, most of the time with a wrong one at a random place."""

    def propose(texts):
        drafts = []
        for text, prompt, answer in zip(texts, prompts, answers):
            draft, wrong = answer[len(text) - len(prompt) :][:4], int(torch.randint(5, (), generator=generator))
            drafts.append([(token + (i == wrong)) % VOCAB for i, token in enumerate(draft)])
        return drafts

    return propose


@pytest.mark.parametrize("which", range(len(MIXES)), ids=["-".join(types) for types in MIXES])
def test_equal_to_greedy_token_for_token(models, which):
    """50 prompts a model, 200 in all, alone and in padded batches, texts of several windows: each with drafts that are
    looked up and with drafts of which any number is right.
    """
    generator = torch.Generator().manual_seed(which)
    model, prompts, count = models[which], list(draw_prompts(generator, 50)), 4 * WINDOW
    found = {"looked up": [], "partly right": []}
    batches = [prompts[i : i + 5] for i in range(0, 30, 5)] + [[prompt] for prompt in prompts[30:]]
    for i, batch in enumerate(batches):
        ids, mask = padded(batch, left=i % 2 == 0)
        need = model.generate(ids, mask, count, stop_token_ids=())
        answers = partly_right(batch, need[:, ids.shape[1] :].tolist(), generator)
        for draft, accepted in zip((4, answers), found.values()):
            got = model.generate(
                ids,
                mask,
                count,
                stop_token_ids=(),
                draft=draft,
                on_draft=lambda _, counts, accepted=accepted: accepted.extend(counts.tolist()),
            )
            assert torch.equal(got, need)
    # Any number of them was accepted, or this would prove little.
    assert {*found["looked up"]} >= {0, 1, 2} and {*found["partly right"]} >= {0, 1, 2, 3, 4}


@given(
    lengths=st.lists(st.integers(1, 11), min_size=1, max_size=4),
    left=st.booleans(),
    chunk=st.none() | st.integers(1, 12),
    new=st.integers(0, 9),
    draft=st.integers(1, 12),
    stops=st.integers(0, 8),
)
@settings(max_examples=15, deadline=None)
def test_batches_padding_stop_tokens_and_callbacks_as_before(models, lengths, left, chunk, new, draft, stops):
    """Stop tokens end rows at different steps; on_tokens is called with the same, in the same order."""
    model = models[0]
    ids, mask = padded([tokens(length, seed=n) % 5 for n, length in enumerate(lengths)], left)
    runs = []
    for options in ({}, {"draft": draft}):
        told = []
        out = model.generate(
            ids,
            mask,
            new,
            stop_token_ids=range(stops),
            pad_token_id=60,
            prefill_chunk=chunk,
            on_tokens=lambda chosen, running: told.append((chosen.tolist(), running.tolist())),
            **options,
        )
        runs.append((out, told))
    assert torch.equal(runs[0][0], runs[1][0]) and runs[0][0].dtype == runs[1][0].dtype
    assert runs[0][1] == runs[1][1]


def test_any_proposals_give_the_same_tokens(model):
    """Right ones, wrong ones, none, too many for what is left; also from a function."""
    ids, mask = padded([tokens(7), tokens(3, seed=2)], left=False)
    need = model.generate(ids, mask, 12, stop_token_ids=())
    texts = [torch.cat((row[m != 0], new)) for row, m, new in zip(ids, mask, need[:, 7:])]

    def oracle(so_far):
        assert [text == whole[: len(text)].tolist() for text, whole in zip(so_far, texts)] == [True, True]
        return [whole[len(text) :].tolist() for text, whole in zip(so_far, texts)]

    def wrong(so_far):
        return [[(token + 1) % VOCAB for token in row] for row in oracle(so_far)]

    def one_row(so_far):
        return [oracle(so_far)[0][:3], ()]

    for propose, steps, rate in (
        (oracle, 1, 10.0),
        (wrong, 11, 0.0),
        (one_row, 11, None),
        (lambda t: ([], []), 11, 0.0),
    ):
        seen = []
        got = model.generate(ids, mask, 12, stop_token_ids=(), draft=propose, on_draft=lambda *c: seen.append(c))
        assert torch.equal(got, need) and len(seen) == steps
        accepted = torch.stack([count for _, count in seen])
        if rate is not None:
            assert accepted.float().mean() == rate
        else:
            # The first row is through after three steps; from then on it is said to have ended.
            assert accepted[:, 0].tolist() == [3, 3, 2, *[-1] * 8] and not accepted[:, 1].any()


def test_a_draft_counts_up_to_the_token_that_ends_a_row(model):
    ids = tokens(1, 5)
    need = model.generate(ids, max_new_tokens=9, stop_token_ids=())[0, 5:].tolist()
    end, seen = max(need.index(token) for token in need[:8]), []
    stop = need[end]
    assert end >= 2
    out = model.generate(
        ids,
        max_new_tokens=9,
        stop_token_ids=stop,
        draft=lambda texts: [need[len(texts[0]) - 5 :]],
        on_draft=lambda *counts: seen.append([count.tolist() for count in counts]),
    )
    assert out[0, 5:].tolist() == need[: end + 1] and seen == [[[7], [end]]]


def test_what_was_said_before_is_looked_up():
    lookup = PromptLookup(4)
    assert lookup([[1, 2, 3, 4, 1, 2], [5, 6], [7]]) == [[3, 4, 1, 2], [], []]
    # Three tokens count more than two, the latest place more than an earlier one, a text goes on with itself.
    assert lookup([[1, 2, 3, 4, 1, 2, 9, 2], [5, 6, 5], [7, 7]]) == [[9, 2, 9, 2], [6, 5, 6, 5], [7, 7, 7, 7]]
    assert PromptLookup(2)([[1, 2, 3, 8, 0, 2, 3, 9, 1, 2, 3]]) == [[8, 0]]
    assert lookup([[5, 6, 5]]) == [[6, 5, 6, 5]] and lookup([[1, 2]]) == [[]]  # texts that continue none before
    assert PromptLookup(1, longest=1)([[1, 2, 3, 8, 0, 2, 3, 9, 1, 2, 3]]) == [[9]]


@given(st.lists(st.integers(0, 3), min_size=1, max_size=30), st.integers(1, 5), st.integers(1, 4))
@settings(max_examples=60)
def test_a_lookup_that_remembers_finds_what_a_search_finds(text, count, longest):
    def search(text):
        for size in range(min(longest, len(text) - 1), 0, -1):
            for end in range(len(text) - 1, size - 1, -1):
                if text[end - size : end] == text[-size:]:
                    whole = list(text)
                    for i in range(count):
                        whole.append(whole[end + i])
                    return whole[len(text) :]
        return []

    lookup = PromptLookup(count, longest)
    for end in range(1, len(text) + 1, 2):
        assert lookup([text[:end]]) == [search(text[:end])]


@pytest.mark.parametrize(
    "options, sentence",
    [
        ({"draft": 0}, "draft must be at least 1, got 0"),
        ({"draft": MOST_PROPOSED + 1}, f"draft must be at most {MOST_PROPOSED} tokens, got {MOST_PROPOSED + 1}"),
        ({"draft": "3"}, "draft must be an integer, got '3'"),
        ({"draft": 2.5}, "draft must be an integer, got 2.5"),
        ({"draft": 3, "temperature": 0.8}, "draft needs temperature 0: .* got temperature 0.8"),
        ({"on_draft": print}, "on_draft needs draft, .* got draft = None"),
        ({"draft": 3, "on_draft": 4}, "on_draft must be callable, got 4"),
    ],
)
def test_wrong_options_are_refused(model, options, sentence, monkeypatch):
    monkeypatch.setattr(model.model, "forward", None)  # nothing is computed
    with pytest.raises((ValueError, TypeError), match=sentence):
        model.generate(tokens(2, 3), **options)


@pytest.mark.parametrize(
    "proposed, sentence",
    [
        (None, "draft must propose tokens for each of 2 rows, got None"),
        ([[1]], r"draft must propose tokens for each of 2 rows, got \[\[1\]\]"),
        ([[1], [VOCAB]], f"draft must propose tokens in 0..{VOCAB - 1}, got {VOCAB} for row 1"),
        ([[-1], []], f"draft must propose tokens in 0..{VOCAB - 1}, got -1 for row 0"),
        ([[1.5], []], "draft must propose integers, got 1.5 for row 0"),
        ([[1] * (MOST_PROPOSED + 1), []], f"draft must propose at most {MOST_PROPOSED} tokens, got 33 for row 0"),
        ([3, []], "draft must propose tokens for each row, got 3 for row 0"),
    ],
)
def test_wrong_proposals_are_refused(model, proposed, sentence):
    with pytest.raises((ValueError, TypeError), match=sentence):
        model.generate(tokens(2, 3), draft=lambda texts: proposed)


# ---- the document


def test_what_the_document_shows_runs(monkeypatch):
    page = "docs/drafts.md"
    *calls, kind = blocks(page, "python")
    model = small_model(seed=4)
    names = {"model": model, "input_ids": tokens(2, 6), "torch": torch}
    run_python(page, calls, names)
    assert torch.equal(names["out"], model.generate(tokens(2, 6), max_new_tokens=64))
    # The last one adds to the token mixer that CONTRIBUTING.md has.
    names, flags = dict(vars(mixers)), __future__.annotations.compiler_flag  # as in mixers.py
    run_python("CONTRIBUTING.md", [block_after("CONTRIBUTING.md", "## Add a token mixer")], names, flags)
    run_python(page, [kind], names, flags)
    monkeypatch.setitem(mixers.MIXERS, "sum", names["DraftedSum"])
    sections = {"jet": JET, "swa": {"window_size": WINDOW}, "sum": {"decay": 0.9}}
    mixed = JetNemotronForCausalLM.random(small_config(("jet", "sum"), efficient_attention_config=sections), seed=1)
    ids = tokens(2, 6)
    assert torch.equal(mixed.generate(ids, max_new_tokens=20, draft=3), mixed.generate(ids, max_new_tokens=20))
