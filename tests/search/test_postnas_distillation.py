"""What paths start from and are taught: the features of the base, in the stream and layer by layer."""

import pytest
import torch
from support.postnas_cases import LAYERS, PLANTED, TINY_JET, VOCAB, PlantedRows, planted_base

from jetkernels.modules import JetBlock
from jetkernels.postnas import Loader, Recipe, SuperNetwork, small_base, train_super_network
from jetkernels.postnas.blocks import BLOCKS, FIRST_OUTPUT
from jetkernels.postnas.shapes import Shape, matching_shape
from jetkernels.postnas.teacher import FLOOR, Teacher, feature_loss
from jetkernels.postnas.warm_start import warm_start_


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


@pytest.mark.parametrize("paths", [TINY_JET, lambda size: BLOCKS["GLA"](size, Shape(8, 8, 2))], ids=["JetBlock", "GLA"])
def test_a_layer_behind_a_norm_without_weight_has_paths_too(paths):
    base = small_base(2, hidden_size=64, intermediate_size=64)
    base.model.layers[1].input_layernorm.weight.data.zero_()
    network = SuperNetwork(base, paths)
    ids = torch.randint(257, (2, 9), generator=torch.Generator().manual_seed(0))
    network.distillation_loss(ids, ("jet", "jet")).backward()
    assert all(p.grad.isfinite().all() for p in network.jet.parameters())
    assert any(p.grad.abs().sum() > 0 for p in network.jet[0].parameters())


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
