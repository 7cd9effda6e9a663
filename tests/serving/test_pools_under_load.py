"""JetBlocks on pools of states give what they give alone, whatever else is in the step."""

import random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from serving.continuous_batching import Engine, Request
from support.model_cases import small_block, small_model, tokens

from jetkernels.serving import (
    RaggedBatch,
    commit_,
    forward_,
    new_draft_pools,
    new_pools,
    rows_of,
    verify_,
)

P = 9


@given(
    lengths=st.lists(st.integers(1, 90), min_size=1, max_size=5),
    seed=st.integers(0, 99),
    dtype=st.sampled_from(["fp32", "fp64"]),
)
def test_a_request_gives_what_it_gives_alone(lengths, seed, dtype):
    """Prompts are read in pieces; what has been read whole decodes; others begin in dirty rows meanwhile."""
    wide = {"fp32": torch.float32, "fp64": torch.float64}[dtype]
    tolerance = {"fp32": 1e-4, "fp64": 1e-10}[dtype]
    draw, block = random.Random(seed), small_block(dtype=wide)
    xs = [
        torch.randn(n, block.hidden_size, dtype=wide, generator=torch.Generator().manual_seed(n + seed))
        for n in lengths
    ]
    expected = [block(x[None])[0].detach() for x in xs]
    pools = new_pools(block.config, P, dtype=wide)
    for pool in pools:
        pool.fill_(torch.nan)
    rows = draw.sample(range(1, P), len(xs))
    read, got = [0] * len(xs), [[] for _ in xs]
    while left := [i for i, x in enumerate(xs) if read[i] < len(x)]:
        chosen = draw.sample(left, draw.randint(1, len(left)))
        counts = {i: draw.choice([1, draw.randint(1, 40)]) for i in chosen}
        counts = {i: min(n, len(xs[i]) - read[i]) for i, n in counts.items()}
        decodes = [i for i in chosen if counts[i] == 1 and read[i]]
        order = [*decodes, None, *(i for i in chosen if i not in decodes)] if decodes else chosen
        x = torch.cat(
            [
                xs[i][read[i] : read[i] + counts[i]] if i is not None else torch.full_like(xs[0][:1], torch.nan)
                for i in order
            ]
        )
        sizes = [counts[i] if i is not None else 1 for i in order]
        batch = RaggedBatch(
            len(decodes) + (None in order),
            torch.tensor([0, *sizes]).cumsum(0).to(draw.choice([torch.int32, torch.int64])),
            rows_of(torch.tensor([rows[i] if i is not None else 0 for i in order])),
            torch.tensor([i is not None and read[i] > 0 for i in order]),
        )
        before = [pool.clone() for pool in pools]
        for i, y in zip(order, forward_(block, x, pools, batch).split(sizes)):
            if i is not None:
                got[i].append(y)
                read[i] += counts[i]
        others = [row for row in range(P) if row not in {rows[i] for i in chosen}]
        for pool, old in zip(pools, before):
            torch.testing.assert_close(pool[others], old[others], rtol=0, atol=0, equal_nan=True)
    for y, want in zip(got, expected):
        torch.testing.assert_close(torch.cat(y), want, rtol=tolerance, atol=tolerance)


@given(accepted=st.lists(st.integers(0, 5), min_size=1, max_size=4), seed=st.integers(0, 99))
def test_drafts_that_count_are_as_if_they_had_been_read(accepted, seed):
    block = small_block(dtype=torch.float64)
    generator = torch.Generator().manual_seed(seed)
    pools, drafts = (
        new_pools(block.config, P, dtype=torch.float64),
        new_draft_pools(block.config, P, 7, dtype=torch.float64),
    )
    for pool in pools:
        pool.normal_(generator=generator)
    for pool in drafts:
        pool.fill_(torch.nan)
    plain = type(pools)(*(pool.clone() for pool in pools))
    rows = torch.randperm(P, generator=generator)[: len(accepted)]
    x = torch.randn(len(accepted), 5, block.hidden_size, dtype=torch.float64, generator=generator)
    y = verify_(block, x, pools, drafts, rows)
    assert all(torch.equal(*pair) for pair in zip(pools, plain))
    commit_(pools, drafts, rows, torch.tensor(accepted))
    for n, count in enumerate(accepted):
        for t in range(count):
            one = RaggedBatch(1, torch.tensor([0, 1]), rows[n : n + 1])
            torch.testing.assert_close(forward_(block, x[n, t : t + 1], plain, one), y[n, t : t + 1])
    for pool, want in zip(pools, plain):
        torch.testing.assert_close(pool, want)


@given(
    lengths=st.lists(st.integers(1, 200), min_size=1, max_size=4), decodes=st.integers(0, 2), seed=st.integers(0, 99)
)
def test_states_at_marks_are_those_of_shorter_prompts(lengths, decodes, seed):
    draw, block = random.Random(seed), small_block(dtype=torch.float64)
    generator = torch.Generator().manual_seed(seed)
    starts = [0, *torch.tensor([1] * decodes + lengths).cumsum(0).tolist()]
    N, prompts = decodes + len(lengths), list(zip(starts[decodes:-1], starts[decodes + 1 :]))
    legal = {t: n for n, (begin, end) in enumerate(prompts) for t in (*range(begin + 64, end, 64), end)}
    marks = draw.sample(sorted(legal), draw.randint(0, len(legal)))
    rows = draw.sample(range(N + len(marks)), N + len(marks))
    pools = new_pools(block.config, len(rows), dtype=torch.float64)
    for pool in pools:
        pool.normal_(generator=generator)
    fresh = type(pools)(*(pool.clone() for pool in pools))
    x = torch.randn(starts[-1], block.hidden_size, dtype=torch.float64, generator=generator)
    has = torch.tensor([True] * decodes + [draw.random() < 0.5 for _ in lengths])
    of = {"state_indices": torch.tensor(rows[:N]), "has_initial_state": has}
    at = {
        "mark_tokens": torch.tensor(marks, dtype=torch.int64),
        "mark_indices": torch.tensor(rows[N:], dtype=torch.int64),
    }
    forward_(block, x, pools, RaggedBatch(decodes, torch.tensor(starts), **of, **at))
    for token, row in zip(marks, rows[N:]):
        n = legal[token]
        begin, alone = prompts[n][0], type(fresh)(*(pool.clone() for pool in fresh))
        one = slice(decodes + n, decodes + n + 1)
        short = RaggedBatch(0, torch.tensor([0, token - begin]), of["state_indices"][one], has[one])
        forward_(block, x[begin:token], alone, short)
        for pool, want in zip(pools, alone):
            torch.testing.assert_close(pool[row], want[rows[decodes + n]])


def test_a_batch_without_tokens_and_wrong_ones():
    block, pools = small_block(), new_pools(small_block().config, P)
    nothing = torch.zeros(0, dtype=torch.int64)
    assert forward_(block, torch.zeros(0, block.hidden_size), pools, RaggedBatch(0, torch.zeros(1), nothing)).shape == (
        0,
        20,
    )
    x, rows = torch.zeros(2, block.hidden_size), torch.tensor([1, 2])
    with pytest.raises(ValueError, match=r"query_start_loc must be \[N\+1\] .* got \[2\] and \[2\]"):
        forward_(block, x, pools, RaggedBatch(2, torch.tensor([0, 1]), rows))
    with pytest.raises(ValueError, match="num_decodes must be between 0 and the 2 sequences .* got 3"):
        forward_(block, x, pools, RaggedBatch(3, torch.tensor([0, 1, 2]), rows))
    with pytest.raises(ValueError, match=r"has_initial_state must be \[2\] bool, got torch.int64 \[2\]"):
        forward_(block, x, pools, RaggedBatch(0, torch.tensor([0, 1, 2]), rows, torch.tensor([1, 0])))
    with pytest.raises(ValueError, match="mark_tokens and mark_indices go together, got only mark_tokens"):
        forward_(block, x, pools, RaggedBatch(0, torch.tensor([0, 1, 2]), rows, mark_tokens=rows))
    assert not any(pool.any() for pool in pools)


def load(layers: tuple[str, ...], steps: int, seed: int, drafts: int) -> int:
    """Steps of an engine under random load; returns how many requests were finished, each with its own tokens."""
    model = small_model(*layers, dtype=torch.float64).eval()
    engine, draw = Engine(model, rows=P, chunk=17, drafts=drafts, seed=seed), random.Random(seed)
    known: dict[tuple, list[int]] = {}
    every: list[Request] = []

    def alone(request: Request) -> list[int]:
        key = (*request.prompt, request.new)
        if key not in known:
            ids = torch.tensor([request.prompt])
            known[key] = model.generate(ids, max_new_tokens=request.new, stop_token_ids=())[
                0, len(request.prompt) :
            ].tolist()
        return known[key]

    prompts = [tokens(draw.randint(1, 60), seed=i).tolist() for i in range(40)]

    def propose(request: Request, count: int) -> list[int]:
        """Right up to a random place."""
        have = len(request.output)
        right = alone(request)[have : have + draw.randint(0, count)]
        return (right + [draw.randrange(61) for _ in range(count)])[:count]

    for _ in range(steps):
        if draw.random() < 0.25 and len(engine.waiting) < 20:
            request = Request(draw.choice(prompts), draw.choice([1, 2, 7, 25]))
            every.append(request)
            engine.waiting.append(request)
        if engine.running and draw.random() < 0.05:
            engine.preempt(draw.choice(engine.running))
        if engine.running and draw.random() < 0.03:
            gone = draw.choice(engine.running)
            engine.leave(gone)
            every.remove(gone)
        owned = {request.row for request in engine.running}
        before = [tensor.clone() for tensor in engine.tensors()]
        if drafts and draw.random() < 0.3:
            engine.draft_step(propose)
        else:
            engine.admit()
            owned = {request.row for request in engine.running}
            engine.step()
        others = [row for row in range(P) if row not in owned]
        for tensor, old in zip(engine.tensors(), before, strict=True):
            assert torch.equal(tensor[others].nan_to_num(7e77), old[others].nan_to_num(7e77))
    finished = [request for request in every if request.done]
    for request in finished:
        assert request.output == alone(request), (request.prompt, request.new)
    return len(finished)


@pytest.mark.parametrize(("layers", "drafts"), [(("jet", "attn", "swa"), 0), (("jet", "jet"), 4)])
def test_five_thousand_steps_under_random_load(layers, drafts):
    """Every token is right, and no row of a pool is touched but by its owner."""
    assert load(layers, steps=5000, seed=drafts, drafts=drafts) > 500
