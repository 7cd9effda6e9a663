"""Tokens that are verified and committed, and sequences that are chosen: of what was rejected nothing remains."""

import copy
import itertools
import pickle
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.model_cases import ATOL, VOCAB, WINDOW, padded, small_block, small_model, tokens
from torch import nn

from jetkernels.model import JetNemotronForCausalLM
from jetkernels.model.attention import Attention
from jetkernels.model.mixers import JetMixer
from jetkernels.modules import JetBlockDraft
from jetkernels.modules.dynamic_conv import commit_conv_state_

MIXES = [("jet", "swa", "jet", "attn"), ("jet", "jet"), ("attn", "swa"), ("swa", "jet")]
UNFINISHED = r"an earlier call on this cache did not finish: reset\(\) it or make a new one"
WAITING = r"draft tokens of each sequence have been verified: commit\(\) says how many"


@pytest.fixture(scope="module")
def models():
    return [small_model(*types, seed=n) for n, types in enumerate(MIXES)]


@pytest.fixture
def model(models):
    return models[0]


def read(model, rows, room=40):
    """A cache that has read these rows, one call each length."""
    cache = model.new_cache(len(rows), room)
    ids, mask = padded(rows, left=True)
    with torch.no_grad():
        model(ids, mask, cache)
    return cache


def assert_same(got, need, atol=1e-6):
    """Two caches that stand behind the same tokens: slots behind the length may hold anything."""
    assert got.lengths == need.lengths == got.lengths_device.tolist()
    for mine, other in zip(got.layers, need.layers, strict=True):
        slots = getattr(mine, "slots", None)
        for a, b in zip(mine, other, strict=True):
            for n, length in enumerate(need.lengths):
                used = (n, slice(None), slice(0, length)) if slots else (n,)
                torch.testing.assert_close(a[used], b[used], atol=atol, rtol=atol)


# ---- verify and commit


@pytest.mark.parametrize("which", range(len(MIXES)), ids=["-".join(types) for types in MIXES])
@pytest.mark.parametrize("past", [(3, 3), (1, 12), (0, 4)], ids=str)
@torch.no_grad()
def test_every_prefix_leaves_what_reading_it_leaves(which, past):
    """Drafts of more tokens than the window has, behind rings that are empty, partly filled and wrapped; in fp64."""
    model, T, tolerance = small_model(*MIXES[which], dtype=torch.float64), WINDOW + 2, 1e-10
    rows, drafts = [tokens(length, seed=length) for length in past], tokens(2, T, seed=5)
    for n in range(T + 1):
        # The second sequence takes another number, so that the lengths differ.
        taken = (n, (3 * n + 1) % (T + 1))
        cache = read(model, rows)
        logits = model.verify(drafts, cache)
        cache.commit(torch.tensor(taken))
        for b, (row, count) in enumerate(zip(rows, taken)):
            alone = read(model, [row])
            need = [model.step(drafts[b, t : t + 1], alone)[0] for t in range(count)]
            if need:
                torch.testing.assert_close(logits[b, :count], torch.stack(need), atol=tolerance, rtol=tolerance)
            assert_same(cache.select([b]), alone, atol=tolerance)
        later = tokens(2, seed=n)
        whole = [torch.cat((row, d[:count], last[None])) for row, d, count, last in zip(rows, drafts, taken, later)]
        need = torch.stack([model(text[None]).logits[0, -1] for text in whole])
        torch.testing.assert_close(model.step(later, cache), need, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("width", [0, 1, 4])
@torch.no_grad()
def test_verified_tokens_leave_no_trace_without_a_commit(models, width):
    for model in models:
        cache = read(model, [tokens(9), tokens(4)])
        need, before = copy.deepcopy(cache), list(cache.layers)
        logits = model.verify(tokens(2, width), cache)
        assert logits.shape == (2, width, VOCAB) and cache.lengths == [9, 4]
        cache.commit(0)
        assert cache.layers == before
        assert_same(cache, need, atol=0)
        assert torch.equal(model.step(tokens(2), cache), model.step(tokens(2), need))


@torch.no_grad()
def test_what_is_rejected_does_not_matter(model):
    """Neither to the logits of what is accepted nor to any state."""
    results = []
    for seed in (1, 2):
        cache = read(model, [tokens(7), tokens(2)])
        drafts = torch.cat((tokens(2, 2), tokens(2, 3, seed=seed)), 1)
        logits = model.verify(drafts, cache)
        cache.commit([2, 2])
        results.append((logits[:, :2], cache))
    (need, need_cache), (got, got_cache) = results
    torch.testing.assert_close(got, need, atol=1e-6, rtol=1e-6)
    assert_same(got_cache, need_cache)


@given(st.integers(0, 6), st.lists(st.integers(0, 6), min_size=1, max_size=4), st.sampled_from([2, 3, 4]))
@settings(max_examples=15, deadline=None)
def test_the_convolution_keeps_the_last_accepted_inputs(width, accepted, taps):
    N, D = len(accepted), 3
    old, x = torch.randn(N, D, taps - 1), torch.randn(N, width, D)
    accepted = [min(count, width) for count in accepted]
    need = torch.stack([torch.cat((old[n], x[n, :c].T), 1)[:, c:] for n, c in enumerate(accepted)])
    commit_conv_state_(old, x, torch.tensor(accepted, dtype=torch.int64))
    assert torch.equal(old, need)


@torch.no_grad()
def test_a_layer_alone_verifies_and_commits():
    block, x = small_block().eval(), torch.randn(2, 5, 20)
    states = [block.new_state(2) for _ in range(2)]
    for state in states:
        block(x[:, :2], state=state)
    draft = JetBlockDraft(states[0])
    y = block(x[:, 2:], state=draft)
    draft.commit(torch.tensor([2, 2]))
    torch.testing.assert_close(y[:, :2], block(x[:, 2:4], state=states[1]), atol=1e-5, rtol=1e-5)
    for got, need in zip(*states):
        torch.testing.assert_close(got, need, atol=1e-6, rtol=1e-6)
    with pytest.raises(RuntimeError, match="no call has verified draft tokens"):
        JetBlockDraft(states[0]).commit(torch.tensor([1, 1]))
    for options in ({"attention_mask": torch.ones(2, 5)}, {"cu_seqlens": torch.tensor([0, 5])}):
        with pytest.raises(ValueError, match=r"JetBlock: draft tokens must be \[N, T\], .* got " + next(iter(options))):
            block(x, state=JetBlockDraft(states[0]), **options)


@torch.no_grad()
def test_layers_commit_without_reading_on_the_host():
    """On the meta device there are no values that could be read."""
    model = JetNemotronForCausalLM(small_model().config, device="meta")
    cache = model.new_cache(2, 9)
    assert model.verify(torch.zeros(2, 3, dtype=torch.int64, device="meta"), cache).shape == (2, 3, VOCAB)
    for draft in cache.states:
        draft.commit(torch.zeros(2, dtype=torch.int64, device="meta"))


@torch.no_grad()
def test_logits_of_drafts_are_as_near_to_fp64_as_those_of_steps():
    """In bf16 the two differ, and either may choose the better of two tokens."""
    for types in MIXES:
        model = small_model(*types, dtype=torch.bfloat16)
        wide, errors = copy.deepcopy(model).double(), torch.zeros(2, dtype=torch.float64)
        for seed in range(5):
            ids, drafts = tokens(2, 9, seed=seed), tokens(2, 6, seed=seed + 1)
            cache, steps = read(model, ids), read(model, ids)
            need = wide(torch.cat((ids, drafts), 1)).logits[:, 9:]
            got = model.verify(drafts, cache), torch.stack([model.step(drafts[:, t], steps) for t in range(6)], 1)
            errors += torch.stack([(logits - need).square().sum() for logits in got])
        of_drafts, of_steps = errors.sqrt().tolist()
        assert of_drafts < 1.25 * of_steps


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_narrow_dtypes_and_autocast_verify_to_within_their_rounding(dtype):
    narrow, wide = small_model(dtype=dtype), small_model()
    for model, autocast in ((narrow, False), (wide, True)):
        cache, need, drafts = read(model, [tokens(6), tokens(3)]), read(model, [tokens(6), tokens(3)]), tokens(2, 3)
        with torch.autocast("cpu", dtype, enabled=autocast):
            logits = model.verify(drafts, cache)
            cache.commit([3, 3])
            steps = torch.stack([model.step(drafts[:, t], need) for t in range(3)], 1)
        bound = 16 * torch.finfo(dtype).eps
        torch.testing.assert_close(logits, steps, atol=bound, rtol=bound)
        assert_same(cache, need, atol=bound)


@pytest.mark.parametrize("bits", [8, 4])
@torch.no_grad()
def test_a_quantised_model_verifies(bits):
    model = small_model(seed=4)
    model.quantize_(bits)
    cache, need = read(model, [tokens(6), tokens(3)]), read(model, [tokens(6), tokens(3)])
    drafts = tokens(2, 3)
    logits = model.verify(drafts, cache)
    steps = torch.stack([model.step(drafts[:, t], need) for t in range(3)], 1)
    torch.testing.assert_close(logits, steps, atol=ATOL, rtol=ATOL)
    cache.commit(3)
    assert_same(cache, need, atol=ATOL)
    ids = tokens(2, 4)
    assert torch.equal(model.generate(ids, max_new_tokens=12, draft=4), model.generate(ids, max_new_tokens=12))


PLACES = (
    "",
    "model",
    "lm_head",
    "model.layers.1",
    "model.layers.0.self_attn",
    "model.layers.3.self_attn",
    "model.layers.2.self_attn.q_proj",
    "model.layers.2.self_attn.dynamic_conv1d",
    "model.layers.0.self_attn.dynamic_conv1d.kernel_generator.w2",
    "model.layers.2.self_attn.o_norm",
    "model.layers.1.mlp",
)


@pytest.mark.parametrize("place", PLACES)
@torch.no_grad()
def test_a_hook_takes_part(place):
    model, seen = small_model(seed=4, tie_word_embeddings=False), []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.get_submodule(place).register_forward_hook(lambda *_: seen.append(place))
        cache, need = read(model, [tokens(6), tokens(3)]), read(model, [tokens(6), tokens(3)])
        seen.clear()
        drafts = tokens(2, 3)
        logits = model.verify(drafts, cache)
        assert seen == [place]
        cache.commit(3)
        steps = torch.stack([model.step(drafts[:, t], need) for t in range(3)], 1)
    torch.testing.assert_close(logits, steps, atol=ATOL, rtol=ATOL)
    assert_same(cache, need, atol=ATOL)


class Wrapper(nn.Module):
    """Stands in the place of a module and calls it."""

    def __init__(self, inner):
        super().__init__()
        self.inner, self.calls = inner, 0

    def forward(self, *args, **options):
        self.calls += 1
        return self.inner(*args, **options)


def test_a_wrapped_mixer_and_a_wrapped_layer_are_called():
    model = small_model(seed=4)
    need = model.generate(tokens(2, 5), max_new_tokens=9)
    for i in (0, 1, 3):
        model.model.layers[i].self_attn = Wrapper(model.model.layers[i].self_attn)
    model.model.layers[2] = Wrapper(model.model.layers[2])
    assert torch.equal(model.generate(tokens(2, 5), max_new_tokens=9, draft=lambda texts: [[1, 2]] * 2), need)
    assert all(w.calls > 1 for w in model.modules() if isinstance(w, Wrapper))


# ---- what is refused


@torch.no_grad()
def test_wrong_drafts_are_refused_and_change_nothing(model):
    cache, need = read(model, [tokens(6), tokens(3)], room=8), read(model, [tokens(6), tokens(3)], room=8)
    with pytest.raises(RuntimeError, match=r"^cache: no draft tokens wait for commit\(\): verify\(\) reads them$"):
        cache.commit(1)
    for wrong, sentence in (
        (tokens(2, 3), r"max_length = 8 must hold the 6 \+ 3 tokens of sequence 0"),
        (tokens(3, 1), "cache: holds 2 sequences, got 3"),
        (tokens(2), r"input_ids must be \[B, T\], got \[2\]"),
        (torch.full((2, 1), VOCAB), f"input_ids must be in 0..{VOCAB - 1}, got {VOCAB}"),
    ):
        with pytest.raises(ValueError, match=sentence):
            model.verify(wrong, cache)
    with pytest.raises(ValueError, match="^cache must be a JetNemotronCache"):
        model.verify(tokens(2, 1), None)
    model.verify(tokens(2, 2), cache)
    for wrong, sentence in (
        ([1], r"^cache: holds 2 sequences, got num_accepted of 1$"),
        ([1, 3], r"^cache: num_accepted\[1\] must be in 0..2, got 3$"),
        (-1, r"^cache: num_accepted\[0\] must be in 0..2, got -1$"),
        (True, "^cache: num_accepted must be a sequence of integers, got"),
        (torch.tensor([1.0, 1.0]), "^cache: num_accepted must be a sequence of integers, got"),
        ("ab", "^cache: num_accepted must be a sequence of integers, got 'ab'$"),
        (None, "^cache: num_accepted must be a sequence of integers, got None$"),
    ):
        with pytest.raises(ValueError, match=sentence):
            cache.commit(wrong)
    for call in (
        lambda: model.step(tokens(2), cache),
        lambda: model.verify(tokens(2, 1), cache),
        lambda: cache.select([0]),
        lambda: cache.select_([0, 0]),
    ):
        with pytest.raises(RuntimeError, match=WAITING):
            call()
    cache.commit(0)
    assert torch.equal(model.step(tokens(2), cache), model.step(tokens(2), need))
    model.verify(tokens(2, 1), cache)
    cache.reset()
    assert not cache.is_drafting and torch.equal(
        model(tokens(2, 3), cache=cache).logits, model(tokens(2, 3), cache=model.new_cache(2, 8)).logits
    )


class Halved(Attention):
    """Overrides a forward that took drafts."""

    def forward(self, hidden_states, **options):
        return 0.5 * super().forward(hidden_states, **options)


class HalvedDrafts(Halved):
    """Says that it does, too."""

    draft_type = Attention.draft_type


def test_a_layer_that_says_nothing_of_drafts_is_named(monkeypatch):
    model, ids = small_model(seed=4), tokens(1, 4)
    sentence = "draft tokens cannot be verified by layer 3: a Halved has no draft_type beside its forward"
    model.model.layers[3].self_attn.__class__ = Halved
    monkeypatch.setattr(model.model, "forward", None)  # nothing is computed
    with pytest.raises(ValueError, match=sentence):
        model.generate(ids, draft=3)
    monkeypatch.undo()
    cache = model.new_cache(1, 9)
    with pytest.raises(ValueError, match=sentence):
        model.verify(ids, cache)
    need = model.generate(ids, max_new_tokens=8)
    model.model.layers[3].self_attn.__class__ = HalvedDrafts
    assert torch.equal(model.generate(ids, max_new_tokens=8, draft=3), need)


def test_a_forward_that_misses_the_draft_is_found_out(model, monkeypatch):
    cache = read(model, [tokens(4)])
    zeros = lambda self, hidden_states, **_: torch.zeros_like(hidden_states)
    for kind in (JetMixer, Attention):
        with monkeypatch.context() as patch, torch.no_grad():
            patch.setattr(kind, "forward", zeros)
            model.verify(tokens(1, 2), cache)
        with pytest.raises(RuntimeError, match="no call has verified draft tokens that could be committed"):
            cache.commit(1)
        with pytest.raises(RuntimeError, match=UNFINISHED):
            cache.commit(1)
        cache.reset()


@pytest.mark.parametrize("error", [KeyboardInterrupt, ZeroDivisionError])
@pytest.mark.parametrize("where", ["model.layers.0", "model.layers.2.mlp", "lm_head"])
@torch.no_grad()
def test_an_interrupted_verification_is_not_passed_over(error, where):
    model = small_model(tie_word_embeddings=False)
    cache = read(model, [tokens(5)])

    def stop(*_):
        raise error

    hook = model.get_submodule(where).register_forward_hook(stop)
    with pytest.raises(error):
        model.verify(tokens(1, 2), cache)
    hook.remove()
    for same in (cache, copy.deepcopy(cache), pickle.loads(pickle.dumps(cache))):
        assert same.lengths == [5] and not same.is_drafting
        for call in (
            lambda c: model.step(tokens(1), c),
            lambda c: model.verify(tokens(1, 2), c),
            lambda c: c.select_([0]),
        ):
            with pytest.raises(RuntimeError, match=UNFINISHED):
                call(same)
    cache.reset()
    assert torch.equal(model(tokens(1, 3), cache=cache).logits, model(tokens(1, 3), cache=model.new_cache(1, 9)).logits)


@torch.no_grad()
def test_an_interrupted_commit_and_selection_are_not_passed_over(model, monkeypatch):
    def stop(*_):
        raise KeyboardInterrupt

    cache = read(model, [tokens(5)])
    model.verify(tokens(1, 2), cache)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Attention.draft_type, "commit", stop)
        cache.commit(2)
    for call in (lambda: cache.commit(2), lambda: model.step(tokens(1), cache), lambda: cache.select([0])):
        with pytest.raises(RuntimeError, match=UNFINISHED):
            call()
    cache.reset()
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(torch.Tensor, "copy_", stop)
        cache.select_([0])
    with pytest.raises(RuntimeError, match=UNFINISHED):
        model.step(tokens(1), cache)


@torch.no_grad()
def test_waiting_drafts_are_copied_with_their_cache(model):
    cache = read(model, [tokens(6), tokens(3)])
    model.verify(tokens(2, 4), cache)
    copies = copy.deepcopy(cache), pickle.loads(pickle.dumps(cache))
    cache.commit([4, 1])
    for other in copies:
        assert other.lengths == [6, 3]
        other.commit(torch.tensor([4, 1], dtype=torch.int32))
        assert_same(other, cache, atol=0)
        assert torch.equal(model.step(tokens(2), other), model.step(tokens(2), copy.deepcopy(cache)))


# ---- sequences that are chosen


@pytest.mark.parametrize("rows", [[2, 0, 1], [1, 1, 0], [2], [0, 0, 1, 1, 2, 2]], ids=str)
@torch.no_grad()
def test_selected_sequences_go_on_as_if_they_were_alone(models, rows):
    for model, as_tensor in itertools.product(models, (False, True)):
        texts = [tokens(length, seed=length) for length in (2, 9, 5)]
        cache = read(model, texts)
        before, addresses = copy.deepcopy(cache), [t.data_ptr() for t in cache.tensors()]
        chosen = cache.select(torch.tensor(rows) if as_tensor else rows)
        assert chosen.lengths == [len(texts[r]) for r in rows] == chosen.lengths_device.tolist()
        new = tokens(len(rows), 2, seed=3)
        got = torch.stack([model.step(new[:, 0], chosen), model.step(new[:, 1], chosen)], 1)
        for n, r in enumerate(rows):
            need = model(torch.cat((texts[r], new[n]))[None]).logits[0, -2:]
            torch.testing.assert_close(got[n], need, atol=ATOL, rtol=ATOL)
        assert_same(cache, before, atol=0)
        cache.select_(rows)
        assert (addresses == [t.data_ptr() for t in cache.tensors()]) == (len(rows) == 3)
        assert_same(cache, before.select(rows), atol=0)


class Beside:
    """A state that gives a tensor which it does not hold."""

    def __init__(self, x):
        self.x = x

    def __iter__(self):
        yield self.x.view_as(self.x)


@torch.no_grad()
def test_wrong_rows_are_refused(model):
    cache = read(model, [tokens(6), tokens(3)])
    for wrong, sentence in (
        ([], "^cache: rows must name at least one sequence, got none$"),
        ([2], "^cache: rows must be in 0..1, got 2$"),
        ([0, -1], "^cache: rows must be in 0..1, got -1$"),
        ([0.0], r"^cache: rows must be a sequence of integers, got \[0.0\]$"),
        (torch.tensor([True, False]), "^cache: rows must be a sequence of integers, got"),
        (torch.tensor(1), "^cache: rows must be a sequence of integers, got"),
        (0, "^cache: rows must be a sequence of integers, got 0$"),
    ):
        for select in (cache.select, cache.select_):
            with pytest.raises(ValueError, match=sentence):
                select(wrong)
    cache.layers[1] = Beside(torch.zeros(2, 3))
    with pytest.raises(TypeError, match="a Beside must hold the tensors that it gives"):
        cache.select([0])
