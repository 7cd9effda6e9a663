"""Beam search and stage 1: what was planted is found, the map shows it, and the exported model is the one searched."""

import itertools
import math

import pytest
import torch
from support.postnas_cases import LAYERS, PLANTED, TINY_JET, PlantedRows, planted_base

from jetkernels.model import JetNemotronForCausalLM
from jetkernels.postnas import (
    Loader,
    PlacementOptions,
    Recipe,
    Score,
    ScoreBook,
    SuperNetwork,
    beam_search,
    export,
    importance,
    search_placement,
    small_base,
    train_super_network,
    uniform,
    write_report,
)
from jetkernels.postnas.data import seeded
from jetkernels.postnas.report import plots
from jetkernels.postnas.search import by_importance, most_evaluations
from jetkernels.postnas.tasks import objective_of


def planted_objective(planted, trap=None):
    """One unit per planted layer; `trap` scores alone but not together with others."""

    def evaluate(placement):
        full = {i for i, kind in enumerate(placement) if kind == "attn"}
        return len(full & set(planted)) + (0.5 if full == {trap} else 0.0)

    return evaluate


@pytest.mark.parametrize("width", [1, 2, 5])
@pytest.mark.parametrize("planted", [(0, 11), (3, 4, 7), (2, 5, 6, 10)])
def test_beam_search_finds_planted_layers(width, planted):
    found = beam_search(("jet",) * 12, len(planted), planted_objective(planted), width=width, exhaustive_up_to=0)
    assert found.chosen == planted and found.value == len(planted) and not found.exhaustive
    assert found.placement == tuple("attn" if i in planted else "jet" for i in range(12))
    assert found.evaluated <= most_evaluations(12, [len(planted)], width, 0)


def test_exhaustive_search_looks_at_every_placement_once():
    seen = []

    def evaluate(placement):
        seen.append(placement)
        return planted_objective((1, 4))(placement)

    found = beam_search(("jet",) * 6, 2, evaluate, exhaustive_up_to=15)
    assert found.exhaustive and found.evaluated == len(seen) == len(set(seen)) == math.comb(6, 2) == most_evaluations(
        6, [2], 4, 15
    )
    assert found.chosen == (1, 4)


@pytest.mark.parametrize("exhaustive_up_to", [0, 12, 10**6])
def test_one_beam_finds_every_budget(exhaustive_up_to):
    """Layer i is worth the i-th weight; a beam of one finds the best of every size."""
    weights, seen = (5.0, 1.0, 9.0, 3.0, 0.5, 7.0), []

    def evaluate(placement):
        seen.append(placement)
        return sum(w for w, kind in zip(weights, placement) if kind == "attn")

    found = beam_search(("jet",) * 6, 3, evaluate, width=1, exhaustive_up_to=exhaustive_up_to, budgets=(5, 1, 3))
    assert found.budgets == {1: (2,), 3: (0, 2, 5), 5: (0, 1, 2, 3, 5)}
    assert (found.chosen, found.value) == ((0, 2, 5), 21.0) and found.exhaustive == (exhaustive_up_to == 10**6)
    assert found.evaluated == len(seen) == len(set(seen)) <= most_evaluations(6, [1, 3, 5], 1, exhaustive_up_to)
    alone = beam_search(("jet",) * 6, 3, evaluate, width=1, exhaustive_up_to=exhaustive_up_to)
    assert (alone.placement, alone.value, alone.budgets) == (found.placement, found.value, {3: (0, 2, 5)})
    with pytest.raises(ValueError, match="budget must be between 0 and the 6 jet layers, got 7"):
        beam_search(("jet",) * 6, 3, evaluate, budgets=(7,))


def test_layers_by_importance_are_those_that_gain_most_alone():
    gains = {0: 0.1, 1: 3.0, 2: 3.0, 3: -1.0, 4: 5.0}
    assert [by_importance(gains, n) for n in (0, 1, 2, 3)] == [(), (4,), (1, 4), (1, 2, 4)]


def test_a_budget_of_none_is_the_start():
    found = beam_search(("jet", "attn"), 0, planted_objective((1,)), exhaustive_up_to=0)
    assert found.placement == ("jet", "attn") and found.chosen == () and found.value == 1.0 and found.evaluated == 1


def test_scores_that_are_no_numbers_are_refused():
    assert objective_of("x", Score(math.nan, 0.5), "accuracy") == 0.5
    with pytest.raises(ValueError, match="objective loss of x must be finite, got nan"):
        objective_of("x", Score(math.nan, 0.5), "loss")


def test_a_wider_beam_escapes_what_a_greedy_search_falls_for():
    """Layers 2 and 3 are worth much together and nothing alone; layer 0 is worth a little alone."""

    def evaluate(placement):
        full = {i for i, kind in enumerate(placement) if kind == "attn"}
        return 10.0 * ({2, 3} <= full) + (0 in full)

    assert beam_search(("jet",) * 5, 2, evaluate, width=1, exhaustive_up_to=0).chosen != (2, 3)
    assert beam_search(("jet",) * 5, 2, evaluate, width=4, exhaustive_up_to=0).chosen == (2, 3)


def test_ties_go_to_the_lower_layers_and_fixed_layers_stay():
    start = ("jet", "attn", "jet", "jet")
    found = beam_search(start, 2, lambda placement: 0.0, kind="swa")
    assert found.placement == ("swa", "attn", "swa", "jet")
    assert set(importance(start, lambda placement: 0.0, "swa")) == {0, 2, 3}


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [({"budget": 4}, "budget must be between 0 and the 3 jet layers, got 4"), ({"budget": 1, "width": 0}, "width")],
)
def test_wrong_budgets_are_refused(arguments, sentence):
    with pytest.raises(ValueError, match=sentence):
        beam_search(("jet",) * 3, evaluate=lambda placement: 0.0, **arguments)


def test_uniform_spreads_layers():
    assert uniform(28, 2) == (7, 21) and uniform(6, 3) == (1, 3, 5) and uniform(4, 4) == (0, 1, 2, 3)


def planted_search(seed: int, options: PlacementOptions, folder=None):
    base = planted_base()
    network = SuperNetwork(base, TINY_JET, window_size=20, seed=seed)
    loader = Loader([(PlantedRows(), 1.0)], batch_size=4, length=21, seed=seed)
    losses = train_super_network(network, loader, Recipe(60, 5e-3, warmup=2), {})
    book = ScoreBook(network, [PlantedRows().task()], {})
    result = search_placement(book, options, losses)
    if folder is not None:
        write_report(folder, book, result, options, [("seed", seed)])
    return network, book, result


def test_planted_base_recalls_and_needs_its_planted_layers():
    base, task = planted_base(), PlantedRows().task()
    assert task.score(lambda ids: base(ids).logits).accuracy == 1.0
    for c, i in enumerate(PLANTED):
        base.model.layers[i].self_attn.o_proj.weight.data.zero_()
        assert task.score(lambda ids: base(ids).logits).accuracy < 0.8 - 0.25 * c


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("exhaustive_up_to", [0, 64])
def test_search_finds_the_layers_that_carry_recall(seed, exhaustive_up_to):
    options = PlacementOptions(full_layers=2, width=2, exhaustive_up_to=exhaustive_up_to)
    _, book, result = planted_search(seed, options)
    assert result.full.chosen == PLANTED and result.window is None
    assert book.score(result.placement, "recall").accuracy == 1.0
    gains = result.importance["attn"]["recall"]
    others = [abs(gain) for i, gain in gains.items() if i not in PLANTED]
    assert min(gains[i] for i in PLANTED) > 3 * max(others)


def test_windows_are_searched_after_full_attention_is_placed(tmp_path):
    """One full layer and one window, both of which reach the whole sequence here: together they must be the planted
    two.
    """
    options = PlacementOptions(full_layers=1, window_layers=1, window_task="recall", full_objective="accuracy")
    _, book, result = planted_search(0, options, tmp_path)
    assert set(result.full.chosen) | set(result.window.chosen) == set(PLANTED)
    assert sorted(result.placement) == ["attn"] + ["jet"] * (LAYERS - 2) + ["swa"]
    report = (tmp_path / "report.md").read_text()
    assert f"Placement: `{' '.join(result.placement)}`" in report and "uniform, 1 full" in report
    for plot in ("importance-attn.png", "importance-swa.png", "distillation.png"):
        assert (tmp_path / plot).read_bytes().startswith(b"\x89PNG") and f"({plot})" in report


def test_each_search_has_an_objective_and_each_task_the_one_of_its_search():
    options = PlacementOptions(2, 1, "recall", "text", full_objective="accuracy", window_objective="loss")
    wanted = {("recall", "attn"): "accuracy", ("recall", "swa"): "accuracy", ("text", "attn"): "loss"}
    wanted |= {("text", "swa"): "loss", ("copy", "attn"): "accuracy", ("copy", "swa"): "loss"}
    assert {asked: options.objective(*asked) for asked in wanted} == wanted
    one_task = PlacementOptions(2, 1, "recall", "recall", full_objective="accuracy", window_objective="loss")
    assert [one_task.objective("recall", kind) for kind in ("attn", "swa")] == ["accuracy", "loss"]
    with pytest.raises(ValueError, match="window_objective must be one of loss, accuracy, got 'speed'"):
        PlacementOptions(2, window_objective="speed")


def test_full_layers_go_by_accuracy_and_windows_by_the_loss():
    """Scores of three layers: the best full layer by accuracy is 2, by loss 0; the best window by loss is 1."""

    class Planted(ScoreBook):
        def score(self, placement, task):
            if "swa" in placement:
                i = placement.index("swa")
                return Score({0: 2.0, 1: 1.0, 2: 3.0}[i], {0: 0.9, 1: 0.1, 2: 0.5}[i])
            loss, accuracy = {0: (0.5, 0.1), 1: (2.0, 0.2), 2: (1.0, 0.8)}.get(
                placement.index("attn") if "attn" in placement else -1, (4.0, 0.0)
            )
            return Score(loss, accuracy)

    network = SuperNetwork(small_base(3, hidden_size=32, intermediate_size=32), TINY_JET)
    book = Planted(network, [PlantedRows().task(1)], {})
    asked = {"window_task": "recall", "full_objective": "accuracy", "window_objective": "loss"}
    result = search_placement(book, PlacementOptions(1, 1, **asked))
    assert result.placement == ("jet", "swa", "attn") and (result.full.value, result.window.value) == (0.8, -1.0)
    assert result.importance["attn"]["recall"] == {0: 0.1, 1: 0.2, 2: 0.8}
    assert search_placement(book, PlacementOptions(1)).placement == ("attn", "jet", "jet")


def test_attention_everywhere_is_the_base():
    base = planted_base()
    ids = PlantedRows().rows(3, 12, torch.Generator().manual_seed(0))
    network = SuperNetwork(base, TINY_JET)
    torch.testing.assert_close(network(ids, ("attn",) * LAYERS), base(ids).logits, rtol=0, atol=0)
    loader = Loader([(PlantedRows(), 1.0)], batch_size=4, length=21)
    for placement in (("attn",) * LAYERS, ("swa",) * LAYERS):
        with pytest.raises(ValueError, match=f"must have a jet layer to be distilled, got {' '.join(placement)}"):
            network.distillation_loss(ids, placement)
        for layer_steps in (0, 1):
            with pytest.raises(ValueError, match="must have a jet layer to be distilled"):
                train_super_network(network, loader, Recipe(1), {}, placement=placement, layer_steps=layer_steps)


def test_random_paths_reach_every_layer_and_never_train_nothing():
    network = SuperNetwork(planted_base(), TINY_JET)
    drawn = [network.random_placement(seeded("test", step)) for step in range(200)]
    assert all("jet" in placement for placement in drawn)
    for i, kind in itertools.product(range(LAYERS), ("attn", "jet")):
        assert 60 < sum(placement[i] == kind for placement in drawn) < 140


@pytest.mark.parametrize("placement", [("attn", "jet"), ("attn",) * 4 + ("mlp",)])
def test_placements_that_do_not_fit_are_refused(placement):
    with pytest.raises(ValueError, match="placement must name one of jet, attn, swa for 5 layers"):
        SuperNetwork(planted_base(), TINY_JET)(torch.zeros(1, 3, dtype=torch.int64), placement)


@torch.no_grad()
def test_exported_model_equals_the_searched_one_and_decodes_as_it_prefills(tmp_path):
    network = SuperNetwork(planted_base(), TINY_JET, window_size=6, seed=4)
    placement = ("swa", "attn", "jet", "attn", "jet")
    export(network, placement, tmp_path / "model")
    model = JetNemotronForCausalLM.from_pretrained(tmp_path / "model")
    ids = PlantedRows().rows(3, 18, torch.Generator().manual_seed(1))
    logits = model(ids).logits
    torch.testing.assert_close(logits, network(ids, placement), rtol=0, atol=1e-5)
    for decoding in (model, network.assemble(placement)):
        cache = decoding.new_cache(3, 18)
        assert cache.nbytes == model.new_cache(3, 18).nbytes
        steps = [decoding(ids[:, t : t + 1], cache=cache).logits for t in range(18)]
        torch.testing.assert_close(torch.cat(steps, 1), logits, rtol=0, atol=1e-5)


def test_the_picture_of_placements_tried_has_those_of_its_own_search(tmp_path, monkeypatch):
    """Not what an earlier search or an earlier report left in the book. Layer 4 gains most alone, so the greedy
    search never looks at the uniform pair (1, 3).
    """
    drawn = []
    monkeypatch.setattr(
        "jetkernels.postnas.report.placement.placements_tried",
        lambda path, tried, marked, score: drawn.append((tried, marked)),
    )

    class Planted(ScoreBook):
        def _computed(self, placement, task):
            return Score(sum(0.1 * i for i, kind in enumerate(placement) if kind == "jet"), 0.5)

    options = PlacementOptions(2, width=1, exhaustive_up_to=0)
    book = Planted(SuperNetwork(planted_base(), TINY_JET), [PlantedRows().task(1)], {})
    for full, objective in ((3, "accuracy"), (2, "loss"), (2, "loss")):
        options = PlacementOptions(full, full_objective=objective, width=1, exhaustive_up_to=0)
        write_report(tmp_path, book, search_placement(book, options), options, [])
    tried, marked = drawn[1]
    assert drawn[2] == drawn[1] and [n for n, _ in tried] == [1] * 5 + [2] * 4 + [0]
    assert [value for n, value in tried if n == 2] == pytest.approx([-0.6, -0.5, -0.4, -0.3])
    assert marked == {
        how: {2: pytest.approx(v)} for how, v in (("uniform", -0.6), ("by importance", -0.3), ("found", -0.3))
    }


def test_the_heat_map_of_windows_is_blank_where_a_layer_is_full(tmp_path, monkeypatch):
    figures = []
    monkeypatch.setattr(plots, "_save", lambda figure, path: figures.append((path.name, figure)))

    class Planted(ScoreBook):
        def _computed(self, placement, task):
            return Score(sum({"jet": 0.1, "swa": 0.04, "attn": 0}[kind] * i for i, kind in enumerate(placement)), 0.5)

    options = PlacementOptions(1, 1, window_task="recall")
    book = Planted(SuperNetwork(planted_base(), TINY_JET), [PlantedRows().task(1)], {})
    write_report(tmp_path, book, search_placement(book, options), options, [])
    texts = {name: [text.get_text() for text in figure.axes[0].texts] for name, figure in figures}
    assert texts["importance-attn.png"] == ["0", "0.1", "0.2", "0.3", "0.4"]
    assert texts["importance-swa.png"] == ["0", "0.06", "0.12", "0.18"]  # layer 4 is full
