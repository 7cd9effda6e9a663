"""What stands in a layer in the place of its attention, and which of it a model can be exported with."""

import pytest
import torch

from jetkernels.modules import JetBlock, JetBlockConfig
from jetkernels.postnas.blocks import BLOCKS
from jetkernels.postnas.design import DESIGNS
from jetkernels.postnas.linear_path import LinearPath
from jetkernels.postnas.shapes import Shape

SHAPE = Shape(8, 16, 2)
EXPORTED = {"JetBlock", "reduction 2", "reduction 32", "kernel size 2", "kernel size 3"}


@pytest.mark.parametrize("design", DESIGNS)
@torch.no_grad()
def test_a_design_that_a_config_can_say_is_a_jet_block_of_that_config(design):
    path = LinearPath(SHAPE, design=design)
    paths = path.paths()
    assert isinstance(paths, JetBlockConfig) == (design in EXPORTED)
    kernel_size, reduction = DESIGNS[design].kernel_size, DESIGNS[design].reduction
    if isinstance(paths, JetBlockConfig):
        assert (paths.head_dim, paths.head_v_dim, paths.num_heads) == SHAPE
        assert (paths.conv_size, paths.dconv_generator_reduction) == (kernel_size, reduction)
        assert JetBlock(20, paths)(torch.randn(1, 5, 20)).shape == (1, 5, 20)
    else:
        assert paths(20).design == DESIGNS[design] and paths(20).shape == SHAPE
    assert str(path) == ("JetBlock" if design == "JetBlock" else f"JetBlock ({design})")


@pytest.mark.parametrize("block", BLOCKS)
def test_blocks_by_name(block):
    paths = LinearPath(SHAPE, block).paths()
    assert isinstance(paths, JetBlockConfig) if block == "JetBlock" else type(paths(20)) is BLOCKS[block]


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"block": "LSTM"}, "block must be one of RetNet, GLA"),
        ({"design": "wide"}, "design must be one of JetBlock"),
        ({"block": "GLA", "design": "static, v"}, "design must be of a JetBlock, got 'static, v' of a GLA"),
    ],
)
def test_unknown_paths_are_refused(changes, sentence):
    with pytest.raises(ValueError, match=sentence):
        LinearPath(SHAPE, **changes)
