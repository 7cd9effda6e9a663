"""The options of the stages: what checkpoints depend on, what the pipeline hands on, what the command line fills in."""

import argparse
from dataclasses import fields
from pathlib import Path

import pytest
from support.postnas_cases import text_folder

from jetkernels.cli import search
from jetkernels.cli.search_checks import told
from jetkernels.model import Tokenizer
from jetkernels.postnas.comparisons import BlocksStage, read_quality, write_result
from jetkernels.postnas.options import Integers
from jetkernels.postnas.pipeline import Pipeline
from jetkernels.postnas.shapes import Shape
from jetkernels.postnas.stages import BaseStage, PlacementStage

KINDS = {name: kind for name, (_, _, kind) in search.stages().items()}
REQUIRED = {"output": "out", "base": "base", "placement": "jet attn", "model": "model"}


@pytest.mark.parametrize("name", KINDS)
def test_what_a_training_depends_on_are_options(name):
    kind, known = KINDS[name], {field.name for field in fields(KINDS[name])}
    training = set(kind.training_options())
    assert {"steps", "batch", "seed"} <= training <= known
    assert set(getattr(kind, "NOT_REPORTED", ())) <= known
    assert {"output", "text", "save_every"}.isdisjoint(training)


def test_every_class_of_options_adds_to_what_a_training_depends_on():
    training = set(PlacementStage.training_options())
    assert {"shape", "linear_path", "train_attention"} <= training and "layers" not in training
    assert {"equal", "shape", "train_attention"} <= set(BlocksStage.training_options())


@pytest.mark.parametrize("name", KINDS)
def test_the_command_line_has_the_options_of_a_stage_and_no_others(name):
    parser = argparse.ArgumentParser()
    search.add_arguments(parser)
    kind = KINDS[name]
    required = {key: value for key, value in REQUIRED.items() if key in {f.name for f in fields(kind)}}
    words = [word for key, value in required.items() for word in (f"--{key}", value)]
    arguments = parser.parse_args([name, *words, "--device", "cpu"])
    paths = {key: value if key == "placement" else Path(value) for key, value in required.items()}
    assert told(kind, arguments) == kind(**paths)
    assert {f.name for f in fields(kind)} == vars(arguments).keys() - {"stage", "usage", "kind"}


def test_the_pipeline_hands_its_options_on():
    told = {"steps": 7, "base_steps": 3, "batch": 4, "seeds": 5, "full": 2, "window_size": 9, "layers": 3, "seed": 6}
    whole = Pipeline(output=Path("run"), shape=Shape(1, 6, 2), examples=8, **told)
    stages = whole.stages()
    assert list(stages) == ["base", "placement", "blocks", "design", "shapes", "final"]
    assert all(stage.output == Path("run", name) and stage.seed == 6 for name, stage in stages.items())
    base, placement, blocks, _, shapes, final = stages.values()
    assert (base.steps, base.batch, base.layers) == (3, 16, 3)
    assert (placement.steps, placement.full, placement.window_size, placement.base) == (14, 2, 9, Path("run/base"))
    assert (blocks.steps, blocks.seeds, blocks.placement, blocks.shape) == (7, 5, "run/placement", Shape(1, 6, 2))
    assert (shapes.state, shapes.heads, shapes.keys, shapes.batch) == (12, (2, 4), (1, 2), 4)
    assert (final.steps, final.whole_steps, final.model, final.examples) == (7, 7, Path("run/shapes/model"), 8)
    assert (final.learning_rate, final.whole_learning_rate) == (whole.learning_rate, None)
    assert "base" not in Pipeline(output=Path("run"), base=Path("mine")).stages()


def test_the_pipeline_gives_the_first_and_the_last_stage_steps_of_their_own():
    own = {"placement_steps": 0, "final_steps": 2, "whole_steps": 3}
    rates = {"final_learning_rate": 2e-3, "whole_learning_rate": 5e-4}
    _, placement, blocks, _, shapes, final = Pipeline(output=Path("run"), steps=7, **own, **rates).stages().values()
    assert (placement.steps, blocks.steps, shapes.steps, final.steps, final.whole_steps) == (0, 7, 7, 2, 3)
    assert (placement.learning_rate, final.learning_rate, final.whole_learning_rate) == (3e-3, 2e-3, 5e-4)


def test_the_pipeline_carries_on_what_its_stages_found(tmp_path):
    def shapes(**changes):
        stages = Pipeline(output=tmp_path, **changes).stages()
        return stages["shapes"].block, stages["shapes"].design, "design" in stages, stages["shapes"].start

    assert shapes() == ("JetBlock", "JetBlock", True, "random")
    write_result(tmp_path / "blocks", "Mamba2", "JetBlock")
    assert shapes() == ("JetBlock", "JetBlock", True, "random")
    assert shapes(block="best", start="warm") == ("Mamba2", "JetBlock", False, "random")
    assert shapes(block="GLA") == ("GLA", "JetBlock", False, "random")
    assert read_quality(tmp_path / "blocks", "Mamba2") is None and read_quality(tmp_path / "none", "Mamba2") is None
    write_result(tmp_path / "design", "dynamic, q", "reduction 2")
    assert shapes(start="warm") == ("JetBlock", "reduction 2", True, "warm")
    assert shapes(design="best", start="warm") == ("JetBlock", "dynamic, q", True, "random")
    assert shapes(block="best") == ("Mamba2", "JetBlock", False, "random")
    write_result(tmp_path / "blocks", "Mamba2", None)  # of a comparison without a JetBlock
    assert shapes()[0] == "JetBlock"
    (tmp_path / "blocks" / "result.json").write_text("{}")
    with pytest.raises(ValueError, match="must be a result of a comparison of candidates"):
        shapes()


def test_tasks_of_large_vocabularies_show_a_model_few_rows_at_once(tmp_path, monkeypatch):
    stage = BaseStage(output=tmp_path, text=text_folder(tmp_path / "text"), length=100)
    tokenizer = Tokenizer.byte_level()
    corpus = stage.corpus(tokenizer, 257)

    def sizes():
        return [task.batch_size for task in stage.held_out_tasks(corpus, tokenizer, 2)]

    assert sizes() == [16, 16, 16]
    for allowed, rows in ((5 * 100 * 257, 5), (100, 1)):
        monkeypatch.setattr("jetkernels.postnas.options.LOGITS", allowed)
        assert sizes() == [rows] * 3


def test_options_are_named_as_checkpoints_have_them():
    stage = Pipeline(output=Path("run"), distances=Integers((4, 16)))
    assert stage.named(["distances", "shape", "seed"]) == [("distances", "4,16"), ("shape", "16x32x4"), ("seed", 0)]
