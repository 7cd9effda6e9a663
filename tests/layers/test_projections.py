"""Projections of one input: one product over weights that lie one behind the other, or each layer called."""

import copy
import io
import warnings

import pytest
import torch
from support.model_cases import small_block, small_model, tokens
from torch import nn

from jetkernels.modules import projections
from jetkernels.modules.joined import fuse_, joined
from jetkernels.modules.projections import FusedProjections, project

ATOL = 1e-6


def modules_of(model) -> list[FusedProjections]:
    return [module for module in model.modules() if isinstance(module, FusedProjections)]


def is_fused(module: FusedProjections) -> bool:
    return joined([*module.projections().values()]) is not None


def products(monkeypatch) -> list[int]:
    """The number of outputs of each product without a gradient, from now on."""
    seen, linear = [], projections.linear
    monkeypatch.setattr(
        projections, "linear", lambda x, weight, bias=None: (seen.append(len(weight)), linear(x, weight, bias))[1]
    )
    return seen


def layers(*widths: int, bias: bool = False, dtype=torch.float32) -> dict[str, nn.Linear]:
    torch.manual_seed(0)
    made = {f"p{i}": nn.Linear(7, width, bias=bias, dtype=dtype) for i, width in enumerate(widths)}
    fuse_([*made.values()])
    return made


@pytest.mark.parametrize("bias", [False, True])
def test_one_product_gives_what_the_layers_give(monkeypatch, bias):
    made, x = layers(3, 1, 5, bias=bias), torch.randn(2, 4, 7)
    seen = products(monkeypatch)
    with torch.no_grad():
        got = project(made, x)
    assert seen == [9]
    for y, layer in zip(got, made.values(), strict=True):
        torch.testing.assert_close(y, layer(x), atol=ATOL, rtol=0)


def test_parameters_stay_the_same_objects_with_the_same_values():
    made = {name: nn.Linear(7, 3) for name in "abc"}
    before = {name: (layer.weight, layer.weight.detach().clone()) for name, layer in made.items()}
    fuse_([*made.values()])
    for name, layer in made.items():
        assert layer.weight is before[name][0] and torch.equal(layer.weight, before[name][1])
        assert layer.weight.is_leaf and layer.weight.requires_grad and layer.weight.is_contiguous()
    # An optimiser writes into them, and the product sees it.
    with torch.no_grad():
        made["b"].weight.zero_()
        assert not project(made, torch.randn(2, 7))[1].sub(made["b"].bias).any()


@pytest.mark.parametrize(
    "change",
    [
        lambda made: made["p1"].register_forward_hook(lambda m, x, y: y + 1),
        lambda made: made.update(p1=nn.Sequential(made["p1"])),
        lambda made: setattr(made["p1"], "weight", nn.Parameter(made["p1"].weight.detach().clone())),
        lambda made: setattr(made["p1"], "bias", nn.Parameter(torch.ones(4))),
        lambda made: nn.utils.parametrizations.weight_norm(made["p1"]),
    ],
    ids=["hook", "wrapped", "another weight", "one bias", "parametrization"],
)
def test_what_is_no_plain_group_is_not_fused(monkeypatch, change):
    made, x = layers(3, 4, 5), torch.randn(2, 7)
    change(made)
    seen = products(monkeypatch)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        got = project(made, x)
        need = [layer(x) for layer in made.values()]
    assert 12 not in seen
    for y, n in zip(got, need, strict=True):
        torch.testing.assert_close(y, n, atol=ATOL, rtol=0)


def test_a_layer_that_is_called_says_so_once():
    made = layers(3, 4)
    made["p1"].register_forward_hook(lambda m, x, y: None)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        for _ in range(3):
            with torch.no_grad():
                project({"test only p0": made["p0"], "test only p1": made["p1"]}, torch.randn(2, 7))
    assert [str(w.message) for w in seen] == [
        "jetkernels: test only p1 is called as a module, not fused with others: it has hooks"
    ]


def test_gradients_are_those_of_each_layer():
    made, x = layers(3, 4, dtype=torch.float64), torch.randn(2, 7, dtype=torch.float64, requires_grad=True)
    weights = [layer.weight for layer in made.values()]
    got = torch.autograd.grad(sum(y.square().sum() for y in project(made, x)), [x, *weights])
    need = torch.autograd.grad(
        sum(
            (x @ w.mT + m.bias if m.bias is not None else x @ w.mT).square().sum()
            for w, m in zip(weights, made.values())
        ),
        [x, *weights],
    )
    for g, n in zip(got, need):
        torch.testing.assert_close(g, n)


def test_vmap_and_functional_calls_see_their_own_weights():
    made = nn.ModuleDict(layers(3, 4))
    x, other = torch.randn(5, 7), {k: torch.randn_like(v) for k, v in dict(made.named_parameters()).items()}

    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.made = made

        def forward(self, x):
            return torch.cat(project(dict(self.made.items()), x), -1)

    call = Both()
    with torch.no_grad():
        torch.testing.assert_close(torch.vmap(call)(x), call(x), atol=ATOL, rtol=0)
        got = torch.func.functional_call(call, {f"made.{k}": v for k, v in other.items()}, x)
    need = torch.cat([x @ other[f"p{i}.weight"].mT for i in range(2)], -1)
    torch.testing.assert_close(got, need, atol=1e-5, rtol=1e-5)


CHANGES = {
    "made": lambda model: model,
    "cast": lambda model: model.to(torch.bfloat16),
    "copied": copy.deepcopy,
    "pickled": lambda model: _pickled(model),
    "loaded": lambda model: (model.load_state_dict(copy.deepcopy(model.state_dict())), model)[1],
    "trained": lambda model: _trained(model),
}


def _pickled(model):
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


def _trained(model):
    optimizer = torch.optim.AdamW(model.parameters())
    model(tokens(1, 5), labels=tokens(1, 5)).loss.backward()
    optimizer.step()
    return model


@pytest.mark.parametrize("change", CHANGES)
def test_a_model_is_fused_however_it_came_about(change):
    model = CHANGES[change](small_model())
    modules = modules_of(model)
    assert len(modules) == 8 and all(map(is_fused, modules))


def test_moving_a_model_keeps_its_values_and_its_ties():
    model = small_model()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model.to(torch.float64).to(torch.float32)
    assert before.keys() == model.state_dict().keys()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    grads = small_model()
    grads(tokens(1, 5), labels=tokens(1, 5)).loss.backward()
    before = {name: p.grad.clone() for name, p in grads.named_parameters()}
    grads.to(torch.float64)
    assert all(torch.equal(p.grad.float(), before[name]) for name, p in grads.named_parameters())


def test_a_state_dict_is_saved_once_and_by_safetensors(tmp_path):
    from safetensors.torch import load_file, save_file

    block = small_block(hidden_size=64)
    save_file(block.state_dict(), tmp_path / "block.safetensors")
    assert all(
        torch.equal(value, block.state_dict()[name])
        for name, value in load_file(tmp_path / "block.safetensors").items()
    )
    torch.save(block.state_dict(), tmp_path / "block.pt")
    size = sum(value.nbytes for value in block.state_dict().values())
    assert (tmp_path / "block.pt").stat().st_size < 1.2 * size + 20_000


def test_on_the_meta_device_nothing_is_fused():
    with torch.device("meta"):
        block = small_block()
    assert block.q_proj.weight.is_meta
    block = block.to_empty(device="cpu")
    assert is_fused(block)
