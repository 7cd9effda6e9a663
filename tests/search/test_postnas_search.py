"""Beam search and stage 1: what was planted is found, the map shows it, and the exported model is the one searched."""

import itertools
import math

import pytest
import torch
from support.postnas_cases import LAYERS, PLANTED, TINY_JET, VOCAB, PlantedRows, planted_base

from jetkernels.model import JetNemotronForCausalLM
from jetkernels.modules import JetBlock
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
from jetkernels.postnas.blocks import BLOCKS, FIRST_OUTPUT
from jetkernels.postnas.data import seeded
from jetkernels.postnas.search import by_importance, most_evaluations
from jetkernels.postnas.shapes import Shape, matching_shape
from jetkernels.postnas.tasks import objective_of
from jetkernels.postnas.teacher import FLOOR, Teacher, feature_loss
from jetkernels.postnas.warm_start import warm_start_


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
    with pytest.raises(ValueError, match="must have a jet layer"):
        network.distillation_loss(ids, ("attn",) * LAYERS)


def test_distillation_teaches_the_paths_and_leaves_the_base_alone():
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 2, "num_key_value_heads": 1}
    base = small_base(2, initializer_range=0.1, vocab_size=VOCAB, **sizes)
    before = {name: value.clone() for name, value in base.state_dict().items()}
    network, placement = SuperNetwork(base, TINY_JET), ("jet", "jet")
    ids = PlantedRows().rows(8, 20, torch.Generator().manual_seed(0))
    loss = network.distillation_loss(ids, placement).item()
    seen = []
    losses = train_super_network(
        network,
        Loader([(PlantedRows(), 1.0)], 8, 21),
        Recipe(60, 1e-2, warmup=2),
        {},
        on_step=lambda step, loss: seen.append((step, loss)),
    )
    assert seen == list(enumerate(losses))
    assert len(losses) == 60 and network.distillation_loss(ids, placement).item() < 0.7 * loss
    assert not any(p.requires_grad for p in base.parameters())
    for name, value in before.items():
        torch.testing.assert_close(base.state_dict()[name], value, rtol=0, atol=0)


def test_the_feature_loss_is_the_relative_error_at_each_attention_layer():
    base = planted_base()
    network = SuperNetwork(base, TINY_JET, window_size=3)
    ids = PlantedRows().rows(4, 12, torch.Generator().manual_seed(0))
    placement = ("attn", "jet", "swa", "attn", "jet")

    def outputs(model) -> list[torch.Tensor]:
        found, mixers = [], [layer.self_attn for layer in model.model.layers]
        handles = [mixer.register_forward_hook(lambda m, x, y: found.append(y.double())) for mixer in mixers]
        model(ids)
        for handle in handles:
            handle.remove()
        return found

    errors = []
    for got, wanted in list(zip(outputs(network.assemble(placement)), outputs(base)))[1:]:
        squares = [(t**2).sum((1, 2)) / t[0].numel() for t in (got - wanted, wanted)]
        errors.append((squares[0] / (squares[1] + FLOOR)).mean())
    assert len(errors) == 4
    expected = torch.stack(errors).mean().item()
    assert network.distillation_loss(ids, placement).item() == pytest.approx(expected, rel=1e-4)


def test_the_feature_loss_does_not_depend_on_the_scale_of_a_layer():
    wanted = torch.randn(3, 5, 4, generator=torch.Generator().manual_seed(0))
    got = wanted + 0.1 * torch.randn(3, 5, 4, generator=torch.Generator().manual_seed(1))
    loss = feature_loss(got, wanted)
    assert feature_loss(50 * got, 50 * wanted).item() == pytest.approx(loss.item(), rel=1e-3)
    assert feature_loss(torch.zeros_like(wanted), wanted).item() == pytest.approx(1.0, rel=1e-3)
    # Of rows that are spread over ranks, the mean over the ranks is that of all rows.
    apart = [feature_loss(got[i : i + 1], wanted[i : i + 1]) for i in range(3)]
    torch.testing.assert_close(torch.stack(apart).mean(), loss)
    assert feature_loss(torch.ones(1, 2, 2), torch.zeros(1, 2, 2)).isfinite()


def test_the_teachers_features_of_the_same_rows_are_computed_once():
    base = planted_base()
    teacher = Teacher(base)
    networks = [SuperNetwork(base, TINY_JET, seed=seed, teacher=teacher) for seed in (0, 1)]
    calls = []
    base.model.embed_tokens.register_forward_pre_hook(lambda *arguments: calls.append(1))
    ids = [PlantedRows().rows(2, 12, torch.Generator().manual_seed(seed)) for seed in (0, 1)]
    for rows in ids:
        for network in networks:
            network.distillation_loss(rows, ("jet",) * LAYERS)
    assert len(calls) == 2 * (1 + 2)
    first = teacher.attention(ids[0])
    assert not torch.equal(first[1].output, teacher.attention(ids[1])[1].output)
    ids[1].zero_()  # a buffer that is filled anew is not the same rows
    assert not torch.equal(first[0].input, teacher.attention(ids[1])[0].input)
    with pytest.raises(ValueError, match="teacher must be that of the base"):
        SuperNetwork(planted_base(), TINY_JET, teacher=teacher)


def test_trained_attention_is_a_copy_and_the_base_stays_the_teacher():
    base = planted_base()
    before = {name: value.clone() for name, value in base.state_dict().items()}
    network = SuperNetwork(base, TINY_JET, window_size=3, train_attention=True)
    ids = PlantedRows().rows(4, 12, torch.Generator().manual_seed(0))
    everywhere = ("attn",) * LAYERS
    torch.testing.assert_close(network(ids, everywhere), network(ids, None), rtol=0, atol=0)
    train_super_network(network, Loader([(PlantedRows(), 1.0)], 8, 21), Recipe(6, 1e-2, warmup=1), {})
    for name, value in base.state_dict().items():
        torch.testing.assert_close(value, before[name], rtol=0, atol=0)
    assert not any(p.requires_grad for p in base.parameters())
    for i in PLANTED:  # the attention of the others gives zeros, and is asked for zeros
        assert not torch.equal(network.attention[i].v_proj.weight, base.model.layers[i].self_attn.v_proj.weight)
    torch.testing.assert_close(network(ids, None), base(ids).logits, rtol=0, atol=0)
    assert not torch.equal(network(ids, everywhere), network(ids, None))
    placement = ("jet", "attn", "swa", "jet", "attn")
    torch.testing.assert_close(network.extract(placement)(ids).logits, network(ids, placement), rtol=0, atol=1e-5)


def test_layer_losses_are_those_of_each_path_on_the_bases_own_input():
    base = planted_base()
    network = SuperNetwork(base, TINY_JET)
    ids = PlantedRows().rows(3, 12, torch.Generator().manual_seed(0))
    x = {}
    for i, layer in enumerate(base.model.layers):
        layer.self_attn.register_forward_hook(lambda m, given, y, i=i: x.update({i: (given[0], y)}))
    network(ids, None)
    everywhere = list(network.layer_losses(ids))
    assert len(everywhere) == LAYERS
    for i, loss in enumerate(everywhere):
        torch.testing.assert_close(loss, feature_loss(network.jet[i](x[i][0]), x[i][1]) / LAYERS)
    some = list(network.layer_losses(ids, ("attn", "jet", "swa", "attn", "jet")))
    torch.testing.assert_close(torch.stack(some), torch.stack([everywhere[1], everywhere[4]]) * LAYERS / 2)
    some[0].backward()
    assert {i for i in range(LAYERS) if any(p.grad is not None for p in network.jet[i].parameters())} == {1}


def test_trained_windows_are_taught_layer_by_layer_too():
    network = SuperNetwork(planted_base(), TINY_JET, window_size=3, train_attention=True)
    ids = PlantedRows().rows(3, 12, torch.Generator().manual_seed(0))
    losses = list(network.layer_losses(ids, ("attn", "swa", "jet", "jet", "jet")))
    assert len(losses) == 4 and losses[0].item() > 0  # a window does not see what full attention saw
    losses[0].backward()
    assert network.attention[1].v_proj.weight.grad.abs().sum() > 0


def test_layer_steps_come_first_and_teach_every_path():
    base = planted_base()
    network = SuperNetwork(base, TINY_JET)
    ids = PlantedRows().rows(8, 20, torch.Generator().manual_seed(0))
    before = [loss.item() for loss in network.layer_losses(ids)]
    loader = Loader([(PlantedRows(), 1.0)], 8, 21)
    losses = train_super_network(network, loader, Recipe(40, 1e-2, warmup=2), {}, layer_steps=40)
    after = [loss.item() for loss in network.layer_losses(ids)]
    assert all(a < 0.9 * b for a, b in zip(after, before)) and len(losses) == 40
    assert losses.tokens == 8 * 20 and losses.tokens_per_second == pytest.approx(40 * 160 / losses.seconds)
    seen = []
    network.layer_losses = lambda *arguments: seen.append("layers") or SuperNetwork.layer_losses(network, *arguments)
    network.distillation_loss = lambda *a: seen.append("stream") or SuperNetwork.distillation_loss(network, *a)
    train_super_network(network, loader, Recipe(5, 1e-2), {}, layer_steps=2)
    assert seen == ["layers"] * 2 + ["stream"] * 3


def test_a_warm_start_is_that_of_each_layers_attention():
    base = small_base(2, hidden_size=48, intermediate_size=48)
    with torch.no_grad():
        base.model.embed_tokens.weight.add_(0.02)  # a direction that all tokens share, as in a trained model
    network = SuperNetwork(base, matching_shape(base.config).config())
    ids = torch.randint(257, (4, 40), generator=torch.Generator().manual_seed(0))
    x = [call.input for call in network.teacher.attention(ids)]
    y = [call.output for call in network.teacher.attention(ids)]
    network.warm_start_(ids)
    for i, (block, layer) in enumerate(zip(network.jet, base.model.layers)):
        alone = JetBlock(48, matching_shape(base.config).config())
        alone.load_state_dict(block.state_dict())  # w1 of the generator is not touched
        warm_start_(alone, layer.self_attn, x[i], y[i])
        assert all(torch.equal(a, b) for a, b in zip(alone.state_dict().values(), block.state_dict().values()))
        assert torch.equal(block.q_proj.weight, layer.self_attn.q_proj.weight)
    with pytest.raises(ValueError, match="a warm start must be that of JetBlocks, got GLA"):
        SuperNetwork(base, lambda size: BLOCKS["GLA"](size, Shape(8, 8, 2))).warm_start_(ids)


@pytest.mark.parametrize("paths", [TINY_JET, lambda size: BLOCKS["GLA"](size, Shape(8, 8, 2))], ids=["JetBlock", "GLA"])
@torch.no_grad()
def test_paths_start_at_one_scale_whatever_that_of_their_layers_input(paths):
    base = small_base(3, hidden_size=64, intermediate_size=64)
    outputs = []
    for layer, scale in zip(base.model.layers, (0.1, 1.0, 10.0)):
        layer.input_layernorm.weight.fill_(scale)
    noise = torch.randn(2, 50, 64, generator=torch.Generator().manual_seed(0))
    for block, scale in zip(SuperNetwork(base, paths).jet, (0.1, 1.0, 10.0)):
        outputs.append(block(scale * noise).square().mean().sqrt().item())
    assert outputs == pytest.approx([FIRST_OUTPUT] * 3, rel=0.3)


def test_what_is_trained_are_the_paths_in_use():
    network = SuperNetwork(planted_base(), TINY_JET, train_attention=True)
    named = network.path_parameters(("jet", "attn", "swa", "jet", "attn"))
    assert {name.removeprefix("attention.").split(".")[0] for name in named} == set("01234")
    assert {name.split(".")[1] for name in named if name.startswith("attention.")} == set("124")
    everything = network.path_parameters()
    assert len(everything) == len(list(network.jet.parameters())) + len(list(network.attention.parameters()))
    assert not any("attention" in name for name in SuperNetwork(planted_base(), TINY_JET).path_parameters())


def test_recomputed_layers_give_the_same_gradients():
    rows = PlantedRows().rows(2, 12, torch.Generator().manual_seed(0))
    gradients = []
    for recompute_layers in (False, True):
        network = SuperNetwork(planted_base(), TINY_JET, recompute_layers=recompute_layers)
        calls = []
        network.jet[2].register_forward_pre_hook(lambda *arguments: calls.append(1))
        network.distillation_loss(rows, ("jet", "attn", "jet", "jet", "attn")).backward()
        gradients.append({name: p.grad for name, p in network.jet.named_parameters() if p.grad is not None})
        assert len(calls) == 1 + recompute_layers
    assert gradients[0].keys() == gradients[1].keys() and gradients[0]
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=0, atol=0)


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
