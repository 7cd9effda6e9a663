"""Stages 2 and 3: the variants of the JetBlock, and the commands that compare blocks and designs."""

import pytest
import torch
from postnas_cases import PlantedRows, planted_base, text_folder, tiny_base_folder

from jetkernels.__main__ import main
from jetkernels.modules import JetBlock
from jetkernels.postnas import Loader, Recipe, SuperNetwork
from jetkernels.postnas.blocks import BLOCKS
from jetkernels.postnas.candidates import BlockModel, Meter
from jetkernels.postnas.design import DESIGNS, Design, DesignedBlock
from jetkernels.postnas.shapes import Shape

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
    block = designed(Design())
    peer = JetBlock(20, SHAPE.config())
    state = {name.replace("convolutions.v.", "dynamic_conv1d."): value for name, value in block.state_dict().items()}
    peer.load_state_dict(state)
    x = torch.randn(2, 33, 20, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(block(x), peer(x), rtol=0, atol=1e-6)


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
        changed = {n: p.shape for n, p in block.named_parameters()} != {n: p.shape for n, p in designed(Design()).named_parameters()}
        assert changed, f"{name} has the parameters of the default"


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [({"convolution": "none"}, "convolution must be"), ({"on": "qx"}, "on must name"), ({"generator_input": "q"}, "generator_input")],
)
def test_unknown_designs_are_refused(changes, sentence):
    with pytest.raises(ValueError, match=sentence):
        Design(**changes)


@pytest.mark.parametrize("name", BLOCKS)
@torch.no_grad()
def test_the_measured_model_is_the_trained_one_and_decodes_as_it_prefills(name):
    network = SuperNetwork(planted_base(), lambda size: BLOCKS[name](size, SHAPE), window_size=5)
    model = BlockModel(network, PLACEMENT).eval()
    ids = PlantedRows().rows(2, 14, torch.Generator().manual_seed(0))
    logits = network(ids, PLACEMENT)
    torch.testing.assert_close(model(ids).logits, logits, rtol=0, atol=1e-5)
    cache = model.new_cache(2, 14)
    steps = [model(ids[:, t : t + 1], cache=cache).logits for t in range(14)]
    torch.testing.assert_close(torch.cat(steps, 1), logits, rtol=0, atol=1e-4)
    with pytest.raises(ValueError, match="are no JetBlocks"):
        network.extract(PLACEMENT)


def test_a_meter_trains_the_same_candidate_twice_alike():
    def meter() -> Meter:
        base = planted_base()
        return Meter(
            lambda name: SuperNetwork(base, lambda size: BLOCKS[name](size, SHAPE)),
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

    first, second = meter()("Mamba2"), meter()("Mamba2")
    assert first.losses == second.losses and first.scores == second.scores and len(first.losses) == 4
    assert first.state == SHAPE.state and first.generation_per_second > 0 and first.training_per_second > 0
    with pytest.raises(ValueError, match="task must be one of recall, got 'reading'"):
        Meter(lambda name: None, ("jet",), None, None, [PlantedRows().task(1)], {}, "reading")


@pytest.mark.parametrize(("stage", "names"), [("blocks", list(BLOCKS)), ("design", ["JetBlock", "static, qkv", "dynamic, qkv"])])
def test_the_commands_compare_and_resume(tmp_path, capsys, stage, names):
    text, base = text_folder(tmp_path / "text"), tiny_base_folder(tmp_path / "base")
    arguments = ["search", stage, "--text", str(text), "--base", str(base), "--output", str(tmp_path / "out"), "--device", "cpu"]
    arguments += ["--placement", "jet attn jet", "--shape", "4x8x2", "--steps", "2", "--batch", "2", "--length", "80"]
    arguments += ["--distances", "4", "--examples", "2", "--speed-tokens", "2", "--speed-prompt", "4"]
    if stage == "design":
        arguments += [word for name in names for word in ("--only", name)]
    assert main(arguments) == 0
    report = (tmp_path / "out" / "report.md").read_text()
    assert all(f"| {name} |" in report for name in names) and "generation (tokens/s)" in report
    assert (tmp_path / "out" / "candidates.png").read_bytes().startswith(b"\x89PNG")
    assert main(arguments) == 0
    assert (tmp_path / "out" / "report.md").read_text() == report
    capsys.readouterr()
    assert main([*arguments, "--shape", "4by8"]) == 1
    assert "--shape must be KxVxH" in capsys.readouterr().err
