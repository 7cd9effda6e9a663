"""Stages 2 and 3: the variants of the JetBlock, and the commands that compare blocks and designs."""

import json

import pytest
import torch
from support.postnas_cases import (
    PlantedRows,
    killed_at_write,
    planted_base,
    search_command,
    text_folder,
    tiny_base_folder,
)

from benchmarks import postnas_seeds
from jetkernels.__main__ import main
from jetkernels.modules import JetBlock
from jetkernels.postnas import Loader, Recipe, SuperNetwork, checkpoints
from jetkernels.postnas.blocks import BLOCKS, equal_parameters
from jetkernels.postnas.candidates import Measured, Meter, measure_all, over_seeds, spread
from jetkernels.postnas.comparisons import read_result
from jetkernels.postnas.design import DESIGNS, Design, DesignedBlock
from jetkernels.postnas.report import plots
from jetkernels.postnas.report.candidates import spread_sentence, write_candidate_report
from jetkernels.postnas.selection import best_candidate
from jetkernels.postnas.shapes import Shape
from jetkernels.postnas.teacher import Teacher

SHAPE = Shape(6, 16, 2)
PLACEMENT = ("jet", "attn", "swa", "jet", "jet")


def designed(design: Design, seed: int = 0) -> DesignedBlock:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        block = DesignedBlock(20, SHAPE, design)
        with torch.no_grad():
            for parameter in block.parameters():
                parameter.add_(0.2 * torch.randn_like(parameter))
    return block


@torch.no_grad()
def test_the_default_design_is_the_jet_block():
    block = designed(Design()).double()
    peer = JetBlock(20, SHAPE.config()).double()
    state = {name.replace("convolutions.v.", "dynamic_conv1d."): value for name, value in block.state_dict().items()}
    peer.load_state_dict(state)
    x = torch.randn(2, 33, 20, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    torch.testing.assert_close(block(x), peer(x), rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", DESIGNS)
def test_designs_differ_and_can_be_split_into_calls(name):
    block = designed(DESIGNS[name])
    x = torch.randn(2, 12, 20, generator=torch.Generator().manual_seed(0))
    y = block(x)
    y.square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in block.parameters())
    state = block.new_state(2)
    with torch.no_grad():
        parts = [block(part, state=state) for part in x.split([5, 1, 1, 5], 1)]
    torch.testing.assert_close(torch.cat(parts, 1), y.detach(), rtol=0, atol=1e-5)
    if name != "JetBlock":
        changed = {n: p.shape for n, p in block.named_parameters()} != {
            n: p.shape for n, p in designed(Design()).named_parameters()
        }
        assert changed, f"{name} has the parameters of the default"


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"convolution": "none"}, "convolution must be"),
        ({"on": "qx"}, "on must name"),
        ({"generator_input": "q"}, "generator_input"),
    ],
)
def test_unknown_designs_are_refused(changes, sentence):
    with pytest.raises(ValueError, match=sentence):
        Design(**changes)


@pytest.mark.parametrize("name", BLOCKS)
@torch.no_grad()
def test_the_measured_model_is_the_trained_one_and_decodes_as_it_prefills(name):
    # In fp64: a head norm divides by what a head's output is, however small, and its rounding with it.
    network = SuperNetwork(planted_base().double(), lambda size: BLOCKS[name](size, SHAPE), window_size=5)
    model = network.assemble(PLACEMENT).eval()
    ids = PlantedRows().rows(2, 14, torch.Generator().manual_seed(0))
    logits = network(ids, PLACEMENT)
    torch.testing.assert_close(model(ids).logits, logits, rtol=0, atol=1e-9)
    cache = model.new_cache(2, 14)
    steps = [model(ids[:, t : t + 1], cache=cache).logits for t in range(14)]
    torch.testing.assert_close(torch.cat(steps, 1), logits, rtol=0, atol=1e-9)
    with pytest.raises(ValueError, match="are no JetBlocks"):
        network.extract(PLACEMENT)


def test_a_meter_trains_the_same_candidate_twice_alike():
    def meter() -> Meter:
        base = planted_base()
        return Meter(
            lambda name, seed: SuperNetwork(base, lambda size: BLOCKS[name](size, SHAPE), seed=seed),
            ("jet", "attn", "jet", "attn", "jet"),
            Loader([(PlantedRows(), 1.0)], 4, 21),
            Recipe(4, warmup=1),
            [PlantedRows().task(8)],
            {},
            "recall",
            new_tokens=2,
            prompt_length=4,
            repeats=1,
        )

    first, second, other = meter()("Mamba2", 0), meter()("Mamba2", 0), meter()("Mamba2", 1)
    assert first.losses == second.losses and first.scores == second.scores and len(first.losses) == 4
    assert other.losses != first.losses and (first.seed, other.seed) == (0, 1)
    assert first.state == SHAPE.state and first.generation_per_second > 0 and first.training_per_second > 0
    with pytest.raises(ValueError, match="task must be one of recall, got 'reading'"):
        Meter(lambda name, seed: None, ("jet",), None, None, [PlantedRows().task(1)], {}, "reading")


def test_candidates_that_are_trained_together_are_those_trained_alone(tmp_path):
    base, names, calls = planted_base(), ["GLA", "JetBlock", "Mamba2"], []
    base.model.embed_tokens.register_forward_pre_hook(lambda *arguments: calls.append(1))
    teacher = Teacher(base)

    def meter(folder) -> Meter:
        return Meter(
            lambda name, seed: SuperNetwork(base, lambda size: BLOCKS[name](size, SHAPE), seed=seed, teacher=teacher),
            ("jet", "attn", "jet", "attn", "jet"),
            Loader([(PlantedRows(), 1.0)], 4, 21),
            Recipe(4, warmup=1, save_every=1),
            [PlantedRows().task(8)],
            {},
            "recall",
            folder=folder,
            layer_steps=3,
        )

    meter(tmp_path / "together").train_together(names, 0)
    assert len(calls) == 4 + len(names)  # the base's features of each step, and each candidate's own last step
    (tmp_path / "together" / "GLA-seed0.ckpt").rename(tmp_path / "elsewhere")
    meter(tmp_path / "together").train_together(names, 0)
    for name in names:
        alone, losses = meter(tmp_path / "alone").train(name, 0)
        together, same = meter(tmp_path / "together").train(name, 0)
        assert losses == same and len(losses) == 4
        assert all(torch.equal(a, b) for a, b in zip(alone.jet.parameters(), together.jet.parameters()))


def test_candidates_are_prepared_in_groups_of_a_seed():
    prepared = []

    def prepare(names, seed):
        prepared.append((seed, names))

    measured = measure_all("abcde", lambda name, seed: row(name, seed, 1.0), {}, None, (0, 1), prepare, 3)
    assert len(measured) == 10
    assert prepared == [(0, ["a", "b", "c"]), (0, ["d", "e"]), (1, ["a", "b", "c"]), (1, ["d", "e"])]


def kept_rows(path) -> list[dict]:
    """The rows in a checkpoint of a comparison, whatever run it is of."""
    run = json.loads(path.read_bytes().split(b"\n", 2)[1])["run"]
    return checkpoints.load_state(path, "candidates", run)["rows"]


def comparison(stage, folder, **options) -> list[str]:
    """The command line of a comparison on little text and an untrained base, both made in `folder`."""
    text, base = text_folder(folder / "text"), tiny_base_folder(folder / "base")
    rows = {"batch": 2, "length": 80, "distances": 4, "examples": 2, "speed_tokens": 2, "speed_prompt": 4}
    return search_command(stage, text=text, base=base, device="cpu", **rows, **options)


def test_a_candidate_is_forgotten_when_its_row_is_kept(tmp_path):
    forgotten = []

    def forget(name, seed):
        forgotten.append((name, seed, [each["name"] for each in kept_rows(tmp_path / "rows.ckpt")]))

    measure_all("ab", lambda name, seed: row(name, seed, 1.0), {}, tmp_path / "rows.ckpt", (3,), forget=forget)
    assert forgotten == [("a", 3, ["a"]), ("b", 3, ["a", "b"])]


@pytest.mark.parametrize("moment", [1, 2, 4, 6, 9])
def test_a_comparison_killed_at_any_write_ends_with_the_same_qualities(tmp_path, moment):
    """Speeds are measured and may differ; what was trained may not."""
    candidates = {"placement": "jet swa attn", "window_size": 9, "shape": "4x8x2", "only": ["GLA", "JetBlock"]}
    arguments = [*comparison("blocks", tmp_path, **candidates, steps=4, save_every=2, seeds=2), "--output"]

    def rows(folder):
        found = kept_rows(folder / "candidates.ckpt")
        return [(row["name"], row["seed"], row["quality"], row["scores"], row["losses"]) for row in found]

    with killed_at_write(moment):
        main([*arguments, str(tmp_path / "out")])
    if moment == 2:
        # Half a training under one window is not the start of one under another.
        other = [word if word != "9" else "10" for word in arguments]
        assert main([*other, str(tmp_path / "out")]) == 1
    for folder in ("out", "whole"):
        assert main([*arguments, str(tmp_path / folder)]) == 0
    assert rows(tmp_path / "out") == rows(tmp_path / "whole") and len(rows(tmp_path / "out")) == 4
    assert not list((tmp_path / "out" / "training").iterdir())


@torch.no_grad()
def test_single_tokens_take_the_recurrent_op(monkeypatch):
    """Generation is measured with the op that is made for it."""
    blocks = [BLOCKS["DeltaNet"](20, SHAPE), BLOCKS["Gated DeltaNet"](20, SHAPE), designed(DESIGNS["dynamic, qkv"])]
    monkeypatch.setattr("jetkernels.postnas.blocks.chunk_gated_delta_rule", lambda *a, **o: pytest.fail("chunked"))
    for block in blocks:
        state = block.new_state(1)
        block(torch.randn(1, 1, 20), state=state)
        assert state[0].abs().sum() > 0


def test_candidates_that_cannot_be_built_are_refused_before_any_is_trained(tmp_path, capsys):
    arguments = comparison("design", tmp_path, placement="jet attn jet", shape="4x8x2", output=tmp_path / "out")
    assert main(arguments) == 1
    assert "generator_reduction must be between 1 and channels = 16, got 32" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("stage", "names"), [("blocks", list(BLOCKS)), ("design", ["JetBlock", "static, qkv", "dynamic, qkv"])]
)
def test_the_commands_compare_and_resume(tmp_path, capsys, stage, names):
    candidates = {"placement": "jet attn jet", "shape": "4x8x2", "only": names if stage == "design" else []}
    arguments = comparison(stage, tmp_path, **candidates, steps=2, seeds=2, output=tmp_path / "out")
    assert main(arguments) == 0
    report = (tmp_path / "out" / "report.md").read_text()
    assert all(f"| {name} |" in report for name in names) and "generation (tokens/s)" in report
    assert "Means over 2 seeds" in report and report.count("| JetBlock |") == 1
    for plot in ("candidates.png", "pair.png")[: 1 + (stage == "blocks")]:
        assert (tmp_path / "out" / plot).read_bytes().startswith(b"\x89PNG") and f"({plot})" in report
    assert main(arguments) == 0
    assert (tmp_path / "out" / "report.md").read_text() == report
    assert (
        read_result(tmp_path / "out", "best") in names and f"Best: {read_result(tmp_path / 'out', 'best')}," in report
    )
    assert read_result(tmp_path / "out", "exportable") == "JetBlock"
    capsys.readouterr()
    if stage == "blocks":
        arguments[arguments.index(str(tmp_path / "out"))] = str(tmp_path / "equal")
        assert (
            main([*arguments, "--only", "RetNet", "--only", "JetBlock", "--equal", "parameters", "--seeds", "1"]) == 0
        )
        rows = [
            line.split(" | ")
            for line in (tmp_path / "equal" / "report.md").read_text().splitlines()
            if line.count(" | ") > 8
        ]
        parameters = {row[0].removeprefix("| "): int(row[1].replace(",", "")) for row in rows if row[1][0].isdigit()}
        assert abs(parameters["RetNet"] / parameters["JetBlock"] - 1) < 0.05
    assert main([*arguments, "--shape", "4by8"]) == 2
    assert "--shape must be KxVxH" in capsys.readouterr().err


@pytest.mark.parametrize("name", BLOCKS)
def test_blocks_of_equal_parameters_are_as_close_as_a_whole_v_allows(name):
    """At the sizes of the 2B model: within 0.1 % of a JetBlock, and no neighbouring V is closer."""
    C, shape = 1536, Shape(96, 256, 12)

    def parameters(kind, V):
        with torch.device("meta"):
            return sum(p.numel() for p in kind(C, shape._replace(V=V)).parameters())

    found, wanted = equal_parameters(BLOCKS[name], C, shape), parameters(BLOCKS["JetBlock"], shape.V)
    off = [abs(parameters(BLOCKS[name], found.V + d) - wanted) for d in (-1, 0, 1)]
    assert off[1] == min(off) and off[1] <= 1e-3 * wanted and (found.K, found.H) == (96, 12)
    assert (found == shape) == (name == "JetBlock")


def test_a_jet_block_equals_itself_at_the_narrowest_generator_too():
    """At half of this V its generator would have no width."""
    assert equal_parameters(BLOCKS["JetBlock"], 32, Shape(8, 4, 2)) == Shape(8, 4, 2)


def row(name, seed, quality, speed=1.0) -> Measured:
    return Measured(name, seed, 10, 8, 20, speed, speed, speed, quality, {"recall": (-quality, quality / 10)}, [0.5])


def test_rows_are_averaged_over_seeds_and_their_spread_is_pooled():
    rows = [
        row("a", 0, 1.0, 3.0),
        row("b", 0, 2.0),
        row("a", 1, 3.0, 5.0),
        row("b", 1, 4.0),
        row("a", 2, 5.0, 4.0),
        row("b", 2, 6.0),
    ]
    a, b = over_seeds(rows)
    assert (a.name, a.quality, a.generation_per_second, a.scores["recall"]) == (
        "a",
        3.0,
        4.0,
        (-3.0, pytest.approx(0.3)),
    )
    assert b.quality == 4.0 and spread(rows) == pytest.approx(2.0)
    assert spread([*rows, row("c", 0, 100.0)]) == pytest.approx(2.0) and spread(rows[:2]) is None
    sentence = spread_sentence(rows)
    assert "over 3 seeds" in sentence and "by 2.0000" in sentence and f"is {2 * (2 / 3) ** 0.5:.4f}" in sentence
    assert "was not measured" in spread_sentence(rows[:2])


def test_one_seed_has_no_deviation(tmp_path, monkeypatch):
    """0 would say that seeds agree."""
    assert postnas_seeds.spread([1.0]) == "1.0000" and postnas_seeds.spread([1.0, 3.0]) == "2.0000 ± 1.4142"
    figures = []
    monkeypatch.setattr(plots, "_save", lambda figure, path: figures.append(figure))
    for qualities in ([1.0], [1.0, 3.0]):
        plots.quality_against_speed(tmp_path / "x.png", [("a", 1.0, qualities)], "quality")
    assert [figure.axes[0].containers[0].has_yerr for figure in figures] == [False, True]


def test_a_report_without_both_of_a_pair_has_no_chart_of_it(tmp_path):
    rows = [row("JetBlock", 0, 1.0), row("GLA", 0, 2.0)]
    best = best_candidate(rows)
    write_candidate_report(tmp_path, "Title", rows, best, "JetBlock", ("JetBlock", "Mamba2"), "x", [])
    assert (
        best.name == "GLA"
        and "(no model can be exported with it; best of those that can: JetBlock)"
        in (tmp_path / "report.md").read_text()
        and not (tmp_path / "pair.png").exists()
        and "pair.png" not in (tmp_path / "report.md").read_text()
    )
