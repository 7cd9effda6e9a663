"""Placements that begin alike share what their first layers compute, and give what each gives alone."""

import pytest
import torch
from support.postnas_cases import LAYERS, TINY_JET, PlantedRows, planted_base

from jetkernels.postnas import ScoreBook, SuperNetwork
from jetkernels.postnas import prefixes as module
from jetkernels.postnas.prefixes import Prefixes
from jetkernels.postnas.teacher import Teacher

PLACEMENTS = [
    ("jet",) * LAYERS,
    ("jet", "jet", "attn", "jet", "jet"),
    ("jet", "jet", "attn", "jet", "swa"),
    ("jet", "jet", "attn", "jet", "swa"),
    ("attn", "jet", "attn", "jet", "swa"),
]
STARTS = [0, 2, 4, 4, 0]  # the first layer that is computed


def counted(network: SuperNetwork) -> list[int]:
    calls: list[int] = []
    for i, layer in enumerate(network.base.model.layers):
        layer.mlp.register_forward_pre_hook(lambda *arguments, i=i: calls.append(i))
    return calls


def rows(seed: int) -> torch.Tensor:
    return PlantedRows().rows(3, 12, torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@torch.no_grad()
def test_logits_are_those_of_the_network_and_shared_layers_run_once(precision):
    base = planted_base()
    network = SuperNetwork(base, TINY_JET, window_size=3, teacher=Teacher(base, precision))
    calls, prefixes = counted(network), Prefixes(network)
    for placement, start in zip(PLACEMENTS, STARTS):
        for seed in (0, 1):
            calls.clear()
            logits = prefixes.logits(rows(seed), placement)
            assert calls == list(range(start, LAYERS))
            torch.testing.assert_close(logits, network(rows(seed), placement), rtol=0, atol=0)


@torch.no_grad()
def test_what_was_trained_in_between_is_computed_anew():
    network = SuperNetwork(planted_base(), TINY_JET)
    prefixes, placement = Prefixes(network), ("jet",) * LAYERS
    before = prefixes.logits(rows(0), placement)
    network.jet[0].o_proj.weight.mul_(3.0)
    after = prefixes.logits(rows(0), placement)
    assert not torch.equal(before, after)
    torch.testing.assert_close(after, network(rows(0), placement), rtol=0, atol=0)


@torch.no_grad()
def test_the_same_tokens_in_rows_of_another_length_are_other_rows():
    network = SuperNetwork(planted_base(), TINY_JET)
    prefixes, (placement, other) = Prefixes(network), PLACEMENTS[:2]
    prefixes.logits(rows(0), placement)
    shorter = rows(0).view(6, 6)
    torch.testing.assert_close(prefixes.logits(shorter, other), network(shorter, other), rtol=0, atol=0)


def test_no_more_is_kept_than_allowed(monkeypatch):
    network = SuperNetwork(planted_base(), TINY_JET)
    calls, prefixes = counted(network), Prefixes(network)
    of_a_batch = LAYERS * 3 * 12 * network.base.config.hidden_size * 4
    monkeypatch.setattr(module, "KEPT_BYTES", of_a_batch)
    for _ in range(2):
        for seed in (0, 1):
            prefixes.logits(rows(seed), PLACEMENTS[0])
    assert len(prefixes.kept) == 1 and prefixes.kept_bytes == of_a_batch
    assert len(calls) == 2 * LAYERS + 1 + LAYERS


def test_a_score_book_scores_as_the_network_does():
    network = SuperNetwork(planted_base(), TINY_JET, window_size=3)
    tasks = [PlantedRows().task(20, seed=seed) for seed in (1, 2)]
    object.__setattr__(tasks[1], "name", "other")
    book = ScoreBook(network, tasks, {})
    for placement in PLACEMENTS:
        for task in tasks:
            assert book.score(placement, task.name) == task.score(lambda ids, p=placement: network(ids, p))
