"""Warm start: what a JetBlock takes over from the attention that it replaces, and what it is worth."""

import math
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from support.postnas_cases import text_folder
from torch import Tensor

from jetkernels.model import JetNemotronForCausalLM
from jetkernels.model.attention import Attention
from jetkernels.modules import JetBlock, RMSNorm
from jetkernels.postnas import Recipe, SuperNetwork, TextCorpus, small_base, train_base
from jetkernels.postnas.blocks import fair_start_
from jetkernels.postnas.shapes import Shape, matching_shape
from jetkernels.postnas.warm_start import warm_start_

C, HEADS, KEY_HEADS, HEAD_DIM = 48, 4, 2, 12
TOKENS = 64


@dataclass
class Layer:
    """An attention of the base, what it is given and what it makes of that, on training and on held-out text."""

    attention: Attention
    x: Tensor
    y: Tensor
    held_out: tuple[Tensor, Tensor]

    def block(self, shape: Shape | None = None, seed: int = 0) -> JetBlock:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            return JetBlock(C, (shape or Shape(HEAD_DIM, HEAD_DIM, HEADS)).config())

    def warm(self, shape: Shape | None = None, seed: int = 0) -> JetBlock:
        block = self.block(shape, seed)
        warm_start_(block, self.attention, self.x, self.y)
        return block


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> tuple[JetNemotronForCausalLM, TextCorpus]:
    """Trained for a few seconds: it has learned which bytes follow which."""
    corpus = TextCorpus.from_folder(text_folder(tmp_path_factory.mktemp("text")))
    sizes = {"num_attention_heads": HEADS, "num_key_value_heads": KEY_HEADS, "hidden_size": C, "intermediate_size": 96}
    model = small_base(3, seed=1, **sizes)
    losses = train_base(model, corpus, Recipe(250, 4e-3), batch_size=8, length=TOKENS, task_share=0.0)
    assert sum(losses[-10:]) / 10 < 3.2 < losses[0]
    return model, corpus


@pytest.fixture(scope="module")
def layers(base) -> list[Layer]:
    model, corpus = base
    found: list[tuple[Tensor, Tensor]] = []
    rows = [tokens[: 24 * TOKENS].view(24, TOKENS) for tokens in (corpus.training, corpus.held_out)]
    hooks = [
        layer.self_attn.register_forward_hook(
            lambda module, args, kwargs, y: found.append((args[0] if args else kwargs["hidden_states"], y)),
            with_kwargs=True,
        )
        for layer in model.model.layers
    ]
    with torch.no_grad():
        for part in rows:
            model(part)
    for hook in hooks:
        hook.remove()
    trained, held_out = found[:3], found[3:]
    return [Layer(at.self_attn, *pair, held) for at, pair, held in zip(model.model.layers, trained, held_out)]


def rms(x: Tensor) -> float:
    return x.detach().square().mean().sqrt().item()


def repeated(weight: Tensor) -> Tensor:
    """Rows of the key heads, once for each of their query heads."""
    return torch.cat([weight[h // 2 * HEAD_DIM : (h // 2 + 1) * HEAD_DIM] for h in range(HEADS)])


def test_the_matching_shape_has_the_attentions_heads(base):
    assert matching_shape(base[0].config) == Shape(HEAD_DIM, HEAD_DIM, HEADS)


@torch.no_grad()
def test_projections_of_the_matching_shape_are_the_attentions(layers):
    for layer in layers:
        block, attention = layer.warm(), layer.attention
        assert torch.equal(block.q_proj.weight, attention.q_proj.weight)
        assert torch.equal(block.k_proj.weight, repeated(attention.k_proj.weight))
        assert torch.equal(block.v_proj.weight, repeated(attention.v_proj.weight))
        assert torch.equal(block.o_proj.weight, attention.o_proj.weight)


@torch.no_grad()
def test_the_convolution_is_the_identity_to_the_bit(layers):
    block = layers[1].warm()
    convolution = block.dynamic_conv1d
    x = block.v_proj(layers[1].x)
    convolution.activation = None
    y, _ = convolution(x, layers[1].x)
    assert torch.equal(y, x) and rms(x) > 0.05
    assert convolution.kernel_generator.w1.weight.std() > 0.015  # w2 is zero, and gets a gradient through w1


@torch.no_grad()
def test_gates_are_neutral(layers):
    """Writes of one half, decays from exp(-0.001) to exp(-0.1), an output gate near 1 on text it was not fitted to."""
    for layer in layers:
        block, (x, _) = layer.warm(), layer.held_out
        g, beta = block._gates(block.a_proj(x), block.b_proj(x))
        assert (beta == 0.5).all()
        rates = torch.tensor([-(10 ** (-3 + 2 * h / (HEADS - 1))) for h in range(HEADS)])
        torch.testing.assert_close(g, rates.expand_as(g), rtol=1e-4, atol=0)
        gate = F.silu(block.g_proj(x))
        assert abs(gate.mean().item() - 1) < 0.1 and gate.std() < 0.4


SHAPES = [Shape(12, 12, 4), Shape(6, 24, 4), Shape(24, 6, 4), Shape(12, 8, 8), Shape(16, 12, 3), Shape(12, 24, 2)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@torch.no_grad()
def test_the_output_has_the_attentions_scale_on_text_it_has_not_seen(layers, shape):
    for layer in layers:
        x, y = layer.held_out
        assert 0.5 < rms(layer.warm(shape)(x)) / rms(y) < 2


@torch.no_grad()
def test_heads_and_channels_that_do_not_fit(layers):
    attention = layers[2].attention
    q, k, v = (w.weight.unflatten(0, (-1, HEAD_DIM)) for w in (attention.q_proj, attention.k_proj, attention.v_proj))
    o = attention.o_proj.weight.unflatten(1, (HEADS, HEAD_DIM))

    fresh, block = layers[2].block(Shape(6, 24, 4)), layers[2].warm(Shape(6, 24, 4))
    for h in range(4):
        strength = q[h].norm(dim=1) * k[h // 2].norm(dim=1)
        kept = sorted(sorted(range(HEAD_DIM), key=lambda i: -strength[i])[:6])
        assert torch.equal(block.q_proj.weight.unflatten(0, (4, 6))[h], q[h][kept])
        assert torch.equal(block.k_proj.weight.unflatten(0, (4, 6))[h], k[h // 2][kept])
        values = block.v_proj.weight.unflatten(0, (4, 24))[h]
        assert torch.equal(values[:12], v[h // 2])
        assert torch.equal(values[12:], fresh.v_proj.weight.unflatten(0, (4, 24))[h, 12:])
        columns = block.o_proj.weight.unflatten(1, (4, 24))[:, h]
        assert torch.equal(columns[:, :12], o[:, h]) and not columns[:, 12:].any()

    block = layers[2].warm(Shape(12, 8, 8))  # two heads for each of the attention's
    for h in range(8):
        strength = v[h // 4].norm(dim=1) * o[:, h // 2].norm(dim=0)
        kept = sorted(sorted(range(HEAD_DIM), key=lambda i: -strength[i])[:8])
        assert torch.equal(block.q_proj.weight.unflatten(0, (8, 12))[h], q[h // 2])
        assert torch.equal(block.v_proj.weight.unflatten(0, (8, 8))[h], v[h // 4][kept])
        assert torch.equal(block.o_proj.weight.unflatten(1, (8, 8))[:, h], o[:, h // 2, kept] / 2)

    block = layers[2].warm(Shape(12, 12, 2))  # every other head
    assert torch.equal(block.q_proj.weight.unflatten(0, (2, 12)), q[[0, 2]])
    assert torch.equal(block.o_proj.weight.unflatten(1, (2, 12)), o[:, [0, 2]])


@torch.no_grad()
def test_weights_of_q_and_k_norms_multiply_the_rows(layers):
    layer = layers[0]
    attention = Attention.__new__(Attention)
    torch.nn.Module.__init__(attention)
    attention.head_dim = HEAD_DIM
    for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
        setattr(attention, name, getattr(layer.attention, name))
    attention.q_norm, attention.k_norm = RMSNorm(HEAD_DIM), RMSNorm(HEAD_DIM)
    attention.q_norm.weight.copy_(torch.linspace(0.5, 2, HEAD_DIM))
    attention.k_norm.weight.copy_(torch.linspace(3, 1, HEAD_DIM))
    block = layer.block()
    warm_start_(block, attention, layer.x, layer.y)
    scale = attention.q_norm.weight.repeat(HEADS)[:, None]
    torch.testing.assert_close(block.q_proj.weight, attention.q_proj.weight * scale)
    scale = attention.k_norm.weight.repeat(HEADS)[:, None]
    torch.testing.assert_close(block.k_proj.weight, repeated(attention.k_proj.weight) * scale)
    assert torch.equal(block.v_proj.weight, repeated(attention.v_proj.weight))


def distil(block: JetBlock, layer: Layer, seed: int, steps: int = 30) -> float:
    """Loss on held-out text, in parts of the attention's mean square, after `steps` of Adam on the layer's outputs."""
    recipe = Recipe(steps, 3e-3, warmup=3)
    optimizer = torch.optim.Adam(block.parameters())
    draw = torch.Generator().manual_seed(seed)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = recipe.rate(step)
        rows = torch.randint(len(layer.x), (4,), generator=draw)
        optimizer.zero_grad()
        F.mse_loss(block(layer.x[rows]), layer.y[rows]).backward()
        optimizer.step()
    x, y = layer.held_out
    with torch.no_grad():
        return (F.mse_loss(block(x), y) / y.square().mean()).item()


def test_after_equal_steps_the_loss_is_lower_than_from_random_values(layers):
    """On each layer and for two seeds of initial values and rows; the random start is the one of the candidates."""
    for layer in layers:
        for seed in (0, 1):
            random = layer.block(seed=seed)
            fair_start_(random, rms(layer.x))
            warm = distil(layer.warm(seed=seed), layer, seed)
            assert warm < 0.8 * distil(random, layer, seed)


@torch.no_grad()
def test_a_network_is_started_in_one_pass(base, layers):
    model, corpus = base
    network = SuperNetwork(model, layers[0].block().config)
    network.warm_start_(corpus.training[: 24 * TOKENS].view(24, TOKENS))
    for block, layer in zip(network.jet, layers, strict=True):
        expected = layer.warm().state_dict()
        for name, value in block.state_dict().items():
            if "w1" not in name:  # which a warm start leaves as it is
                torch.testing.assert_close(value, expected[name], rtol=1e-4, atol=1e-6)
    assert torch.equal(network.jet[2].o_proj.weight, layers[2].attention.o_proj.weight)
    assert not any(layer.self_attn._forward_hooks for layer in model.model.layers)


@torch.no_grad()
def test_what_cannot_start_is_named_and_left_alone(layers):
    layer = layers[0]
    block = layer.block()
    before = {name: value.clone() for name, value in block.state_dict().items()}

    def refused(sentence: str, *inputs: Tensor, to: JetBlock = block) -> None:
        with pytest.raises(ValueError, match=sentence):
            warm_start_(to, layer.attention, *inputs)

    refused("attention must have hidden size 20, as the block, got 48", layer.x, layer.y, to=JetBlock(20, block.config))
    refused(r"hidden_states must be \[B, T, 48\], both alike, got \[24, 64, 47\]", layer.x[..., 1:], layer.y)
    refused(r"outputs must be \[B, T, 48\], both alike, got \[23, 64, 48\]", layer.x, layer.y[1:])
    refused(
        "hidden_states must be of at least 48 tokens, as many as they have channels, got 40", *[layer.x[:1, :40]] * 2
    )
    noise = torch.randn(24, TOKENS, C, generator=torch.Generator().manual_seed(0))
    refused(r"must be nearly constant for a neutral gate; the nearest explains 0\.0\d of a constant", noise, noise)
    refused("must be nearly constant for a neutral gate; the nearest explains nan", 0 * noise, noise)
    assert all(torch.equal(value, before[name]) for name, value in block.state_dict().items())
    assert math.isfinite(rms(block(layer.x)))
