"""The start of the candidates: outputs of one scale, norms that norm, RWKV-7's own first values."""

import math
from functools import partial

import pytest
import torch

from jetkernels.modules import GatedRMSNorm, JetBlock, JetBlockConfig, RMSNorm
from jetkernels.postnas.blocks import BLOCKS, FIRST_OUTPUT, RWKV7, fair_start_
from jetkernels.postnas.design import DESIGNS, DesignedBlock
from jetkernels.postnas.shapes import Shape

CANDIDATES = BLOCKS | {f"design: {name}": partial(DesignedBlock, design=design) for name, design in DESIGNS.items()}
# Hidden size and shape: the small base of the search, SmolLM2-135M with heads like its attention's.
SIZES = {"small base": (96, Shape(16, 32, 4)), "smollm2": (576, Shape(64, 64, 9))}


def candidate(name: str, size: str, seed: int = 3):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return CANDIDATES[name](*SIZES[size])


def unit_rms(tokens: int, channels: int) -> torch.Tensor:
    x = torch.randn(2, tokens, channels, generator=torch.Generator().manual_seed(7))
    return x / x.square().mean(-1, keepdim=True).sqrt()


def rms(x: torch.Tensor) -> float:
    return x.detach().square().mean().sqrt().item()


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("tokens", [16, 200])
@torch.no_grad()
def test_first_outputs_of_all_blocks_and_designs_have_one_scale(size, tokens):
    x = unit_rms(tokens, SIZES[size][0])
    found = {name: rms(candidate(name, size)(x)) for name in CANDIDATES}
    assert max(found.values()) < 2 * min(found.values()), found
    assert FIRST_OUTPUT / 1.5 < min(found.values()) and max(found.values()) < FIRST_OUTPUT * 1.5, found


@pytest.mark.parametrize("shape", [Shape(16, 32, 4), Shape(8, 128, 2), Shape(32, 8, 8)], ids=str)
@torch.no_grad()
def test_jet_blocks_of_all_shapes_are_given_that_scale(shape):
    """What the library itself gives a JetBlock is far from it."""
    block, x = JetBlock(96, shape.config()), unit_rms(64, 96)
    assert rms(block(x)) < FIRST_OUTPUT / 10
    fair_start_(block)
    assert FIRST_OUTPUT / 1.5 < rms(block(x)) < FIRST_OUTPUT * 1.5


@pytest.mark.parametrize("name", CANDIDATES)
@torch.no_grad()
def test_a_start_for_input_of_another_scale_is_that_block_for_its_own(name):
    """The first norm of SmolLM2-135M makes input of RMS 0.05."""
    at_one, small, x = candidate(name, "small base"), candidate(name, "small base"), unit_rms(40, 96)
    fair_start_(small, 0.05)
    if name == "JetBlock":  # drawn anew
        assert FIRST_OUTPUT / 1.5 < rms(small(0.05 * x)) < FIRST_OUTPUT * 1.5
    else:
        torch.testing.assert_close(small(0.05 * x), at_one(x), rtol=1e-3, atol=1e-4)
        fair_start_(small)  # and back
        torch.testing.assert_close(small(x), at_one(x), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", [name for name in CANDIDATES if name not in ("RetNet", "GLA", "RWKV7")])
@torch.no_grad()
def test_what_an_output_norm_divides_by_is_not_its_epsilon(name, size):
    """Of RMS norms; RWKV-7's first values are its own, the group norms of the other two follow no convolution."""
    block = candidate(name, size)
    (norm,) = (module for module in block.modules() if isinstance(module, RMSNorm | GatedRMSNorm))
    seen = []
    norm.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    block(unit_rms(64, SIZES[size][0]))
    assert seen[0].square().mean() > 2 * norm.eps


@torch.no_grad()
def test_static_and_generated_taps_start_alike():
    """Uniform over +-W^-0.5, and nothing generated yet."""
    for name in ("JetBlock", "design: static, qkv", "design: dynamic, qkv", "Gated DeltaNet", "Mamba2"):
        state = candidate(name, "small base").state_dict()
        taps = [value for key, value in state.items() if "conv" in key and key.endswith((".weight", ".w2.bias"))]
        taps = [value for value in taps if value.dim() == 1 or value.shape[1] == 4]
        assert taps and all(0.49 < value.abs().max() <= 0.5 for value in taps), name
        assert all(abs(rms(value) - 0.5 / 3**0.5) < 0.02 for value in taps), name
        assert all(not value.any() for key, value in state.items() if key.endswith("w2.weight"))


@torch.no_grad()
def test_a_start_draws_the_blocks_values_and_leaves_its_dtype():
    block = JetBlock(96, JetBlockConfig(4, 16, 2.0), dtype=torch.bfloat16)
    before = {name: value.clone() for name, value in block.state_dict().items()}
    fair_start_(block)
    kept = {name for name, value in block.state_dict().items() if torch.equal(value, before[name])}
    assert kept == {"A_log", "dt_bias", "o_norm.weight", "dynamic_conv1d.kernel_generator.w2.weight"}
    assert {value.dtype for value in block.parameters()} == {torch.bfloat16, torch.float32}
    for name in ("q_proj", "b_proj", "dynamic_conv1d.kernel_generator.w1"):
        assert abs(rms(block.get_submodule(name).weight.float()) * 96**0.5 - 1) < 0.1, name
    with torch.device("meta"):
        fair_start_(JetBlock(96, JetBlockConfig(4, 16, 2.0)))


@pytest.mark.parametrize(("width", "of_decay", "of_gate"), [(96, 32, 64), (576, 64, 128), (2048, 128, 224)])
def test_rwkv7s_ranks_grow_with_the_width(width, of_decay, of_gate):
    """2.5 sqrt(C) and 5 sqrt(C), to a multiple of 32."""
    with torch.device("meta"):
        block = RWKV7(width, Shape(64, 64, 2))
    assert (block.w_1.out_features, block.a_1.out_features, block.g_1.out_features) == (of_decay, of_decay, of_gate)
    assert (block.w_2.in_features, block.a_2.in_features, block.g_2.in_features) == (of_decay, of_decay, of_gate)


@torch.no_grad()
def test_rwkv7_starts_from_the_values_of_its_release():
    C, K, H = 96, 16, 3
    torch.manual_seed(0)
    block = RWKV7(C, Shape(K, 8, H))
    for n in (0, 17, 47):  # channels of the keys
        place, zigzag = n / (H * K - 1), (n % K - (K - 1) / 2) / ((K - 1) / 2)
        zigzag *= abs(zigzag)
        w0 = -6 + 6 * place ** (1 + 0.5**0.3) + 0.5 + 2.5 * zigzag
        assert block.w_2.bias[n].item() == pytest.approx(w0, abs=1e-5)
        assert block.a_2.bias[n].item() == pytest.approx(-0.19 + 0.3 * zigzag + 0.4 * (place - 0.5), abs=1e-6)
        assert block.xi.flatten()[n].item() == pytest.approx(0.71 - 0.1 * (place - 0.5), abs=1e-6)
    assert (block.alpha == 1.02).all() and (block.rho == -0.04).all()
    powers = [0.1, 0.45, 0.35, 0.35, 0.45, 0.1]  # half of r, w, k, v, a, g's: the middle of the model
    for shift, power in zip(block.mu, powers):
        assert shift[24].item() == pytest.approx(1 - 0.25**power, abs=1e-6) and shift[0] == 1
    for projection, bound in ((block.r_proj, 0.5), (block.k_proj, 0.05), (block.v_proj, 0.5)):
        assert 0.97 < projection.weight.abs().max() * math.sqrt(C) / bound <= 1
    for first, second in ((block.w_1, block.w_2), (block.a_1, block.a_2), (block.g_1, block.g_2)):
        assert not first.weight.any()
        outputs, rank = second.weight.shape
        product = second.weight @ second.weight.mT if outputs < rank else second.weight.mT @ second.weight
        gain = 0.1 * math.sqrt(max(1, rank / outputs))
        torch.testing.assert_close(product, gain**2 * torch.eye(len(product)), rtol=0, atol=1e-6)
