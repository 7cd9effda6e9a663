"""Stage 4: a planted best (K, V, H) is found under a throughput constraint, and the real measurement runs end to
end.
"""

import json
import subprocess
import sys
from functools import partial

import pytest
from support.postnas_cases import search_command, text_folder, tiny_base_folder

from jetkernels.__main__ import main
from jetkernels.model import JetNemotronForCausalLM
from jetkernels.modules import JetBlockConfig
from jetkernels.postnas.candidates import Measured, measure_all
from jetkernels.postnas.checkpoints import load_state
from jetkernels.postnas.comparisons import ShapesStage
from jetkernels.postnas.options import Integers
from jetkernels.postnas.report.candidates import write_shape_report
from jetkernels.postnas.selection import best_shape
from jetkernels.postnas.shapes import Shape, equal_cache_grid

# The grid of the paper's Table 2.
PAPER = [
    *(Shape(256, 288, 4), Shape(192, 384, 4), Shape(128, 576, 4)),
    *(Shape(256, 144, 8), Shape(192, 192, 8), Shape(128, 288, 8)),
    *(Shape(128, 192, 12), Shape(96, 256, 12), Shape(64, 384, 12)),
]


def test_the_papers_grid_has_equal_caches():
    grid = equal_cache_grid(96 * 256 * 12, heads=(4, 8, 12), keys=(64, 96, 128, 192, 256))
    assert {shape.state for shape in grid} == {294912} and set(PAPER) <= set(grid)
    with pytest.raises(ValueError, match="state must be a multiple"):
        equal_cache_grid(7, (2,), (2,))
    with pytest.raises(ValueError, match="must be positive"):
        equal_cache_grid(8, (0,), (2,))


def test_shapes_too_narrow_for_the_designs_generator_are_left_out(tmp_path):
    stage = partial(ShapesStage, base=tmp_path, placement="jet", output=tmp_path, design="reduction 32")
    names = [shape.name for shape in stage(state=256, heads=Integers((2, 4)), keys=Integers((4, 8, 16))).grid()]
    assert names == ["8x16x2", "4x32x2", "8x8x4", "4x16x4"]  # not 16x8x2 and 16x4x4
    with pytest.raises(ValueError, match="H\\*V must be at least 32 in some shape for the design reduction 32"):
        stage(state=64, heads=Integers((2,)), keys=Integers((4,))).grid()


@pytest.mark.parametrize("shape", [*PAPER, Shape(3, 7, 1), Shape(49, 50, 2), Shape(96, 31, 5)])
def test_a_shape_becomes_the_jet_block_of_these_sizes(shape):
    config = shape.config(JetBlockConfig(conv_size=3, dconv_generator_reduction=2))
    assert (config.head_dim, config.head_v_dim, config.num_heads, config.conv_size) == (*shape, 3)


def planted(speed, quality):
    """Rows whose speed and quality are functions of the shape."""

    def measure(name, seed):
        shape = Shape.from_name(name)
        return Measured(
            name, seed, 10, shape.state, 20, 5.0, 6.0, speed(shape), quality(shape), {"recall": (1.0, 0.5)}, [0.5]
        )

    return measure


NAMES = [shape.name for shape in PAPER]


@pytest.mark.parametrize("best", PAPER)
def test_planted_best_is_found_under_the_constraint(tmp_path, best):
    """The best shape is just fast enough; one of higher quality is not."""
    decoy = PAPER[(PAPER.index(best) + 1) % len(PAPER)]
    measure = planted(lambda s: 99.0 if s == decoy else 100.0, lambda s: {decoy: 3.0, best: 2.0}.get(s, 1.0))
    rows = measure_all(NAMES, measure, {})
    chosen = best_shape(rows, 100.0)
    write_shape_report(tmp_path, rows, chosen, "JetBlock", 100.0, "planted", [])
    assert chosen.name == best.name and best_shape(rows, 90.0).name == decoy.name
    line = f"| {best.K} | {best.V} | {best.H} |"
    assert any(row.startswith(line) and "**yes**" in row for row in (tmp_path / "report.md").read_text().splitlines())
    assert (tmp_path / "shapes.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match=r"throughput must reach 101\.0 tokens/s .* fastest reaches 100\.0"):
        best_shape(rows, 101.0)


def test_a_candidate_that_is_named_twice_is_measured_once():
    """Two rows of one seed would pass for two seeds that agree to the last digit."""
    rows = measure_all(["4x4x1", "2x8x1", "4x4x1"], planted(lambda s: 1.0, lambda s: float(s.K)), {}, seeds=(0, 1))
    assert [(row.name, row.seed) for row in rows] == [(name, s) for s in (0, 1) for name in ("4x4x1", "2x8x1")]


def test_a_killed_search_keeps_the_rows_it_has(tmp_path):
    seen = []

    def measure(name, seed):
        seen.append(name)
        if len(seen) == 4:
            raise KeyboardInterrupt
        return planted(lambda s: float(len(seen)), lambda s: float(s.K))(name, seed)

    with pytest.raises(KeyboardInterrupt):
        measure_all(NAMES, measure, {"seed": 1}, tmp_path / "shapes.ckpt")
    rows = measure_all(NAMES, measure, {"seed": 1}, tmp_path / "shapes.ckpt")
    assert seen == NAMES[:4] + NAMES[3:] and [row.name for row in rows] == NAMES
    assert [row.generation_per_second for row in rows[:3]] == [1.0, 2.0, 3.0] and rows[0].scores == {
        "recall": (1.0, 0.5)
    }
    with pytest.raises(ValueError, match="belongs to a run with other options"):
        measure_all(NAMES, measure, {"seed": 2}, tmp_path / "shapes.ckpt")


def test_the_command_measures_a_grid_and_exports_the_best(tmp_path, capsys):
    text, base = text_folder(tmp_path / "text"), tiny_base_folder(tmp_path / "base")
    sizes = {"placement": "jet attn swa", "state": 128, "heads": "1,2", "keys": "8,16", "steps": 3}
    rows = {"batch": 2, "length": 80, "distances": 4, "examples": 4, "speed_tokens": 4, "speed_prompt": 8}
    folders = {"text": text, "base": base, "output": tmp_path / "out"}
    arguments = search_command("shapes", **folders, device="cpu", **sizes, **rows)
    assert main(arguments) == 0
    report = (tmp_path / "out" / "report.md").read_text()
    assert all(f"| {K} | {V} | {H} |" in report for K, V, H in [(16, 8, 1), (8, 16, 1), (16, 4, 2), (8, 8, 2)])
    weights = (tmp_path / "out" / "model" / "model.safetensors").read_bytes()
    assert main(arguments) == 0
    assert (tmp_path / "out" / "report.md").read_text() == report
    assert (tmp_path / "out" / "model" / "model.safetensors").read_bytes() == weights
    model = JetNemotronForCausalLM.from_pretrained(tmp_path / "out" / "model")
    assert model.config.layer_types == ["jet", "attn", "swa"]
    assert model.config.jet.num_heads * model.config.jet.head_dim * model.config.jet.head_v_dim == 128
    capsys.readouterr()
    (tmp_path / "placed").mkdir()
    (tmp_path / "placed" / "result.json").write_text(json.dumps({"placement": ["jet", "attn", "swa"]}))
    arguments[arguments.index("jet attn swa")] = str(tmp_path / "placed")
    assert main(arguments) == 0
    assert main([*arguments, "--min-throughput", "1e12"]) == 1
    assert "throughput must reach" in capsys.readouterr().err


def test_two_gloo_ranks_measure_the_grid_of_one(tmp_path):
    """Losses within 1e-5; the ranks choose and export once. The best shape is left open: speeds are measured."""
    text, base = text_folder(tmp_path / "text"), tiny_base_folder(tmp_path / "base")
    sizes = {"placement": "jet attn jet", "state": 128, "heads": "1,2", "keys": "8", "steps": 3, "seeds": 2}
    rows = {"batch": 2, "length": 80, "distances": 4, "examples": 2, "speed_tokens": 2, "speed_prompt": 4}
    arguments = [*search_command("shapes", text=text, base=base, device="cpu", **sizes, **rows), "--output"]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*torchrun, "-m", "jetkernels", *arguments, str(tmp_path / "two")], capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert main([*arguments, str(tmp_path / "one")]) == 0
    losses = {}
    for folder in ("one", "two"):
        path = tmp_path / folder / "candidates.ckpt"
        run = json.loads(path.read_bytes().split(b"\n", 2)[1])["run"]
        rows = load_state(path, "candidates", run)["rows"]
        losses[folder] = {(row["name"], row["seed"]): row["losses"] for row in rows}
    assert set(losses["one"]) == {(shape, seed) for shape in ("8x16x1", "8x8x2") for seed in (0, 1)}
    for pair, values in losses["one"].items():
        assert len(values) == 3 and losses["two"][pair] == pytest.approx(values, rel=0, abs=1e-5), pair
    chosen = JetNemotronForCausalLM.from_pretrained(tmp_path / "two" / "model").config.jet
    kept = [path.name for path in (tmp_path / "two" / "training").iterdir()]
    assert kept == [f"{chosen.head_dim}x{chosen.head_v_dim}x{chosen.num_heads}-seed0.ckpt"]
    shape = f"| {chosen.head_dim} | {chosen.head_v_dim} | {chosen.num_heads} |"
    lines = (tmp_path / "two" / "report.md").read_text().splitlines()
    assert [line.startswith(shape) for line in lines if "**yes**" in line] == [True]
