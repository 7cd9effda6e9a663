"""Projections of one input: one product over weights that lie one behind the other, or each layer called."""

import copy
import io
import warnings

import pytest
import torch
from support.model_cases import small_block, small_config, small_model, tokens
from torch import nn
from torch.autograd import forward_ad

from jetkernels.model.decoder_layer import MLP
from jetkernels.modules import projections, quantize_
from jetkernels.modules.joined import _wholes, fuse_, joined
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


class Pair(FusedProjections):
    """Two projections of the input side by side, and one of what they give."""

    def __init__(self):
        super().__init__()
        self.q_proj, self.k_proj, self.o_proj = nn.Linear(32, 32), nn.Linear(32, 32), nn.Linear(64, 32)
        self.fuse()

    def projections(self):
        return {"q_proj": self.q_proj, "k_proj": self.k_proj}

    def forward(self, x):
        return projections.apply(self.o_proj, "o_proj", torch.cat(project(self.projections(), x), -1))


class Called(Pair):
    """What a Pair means."""

    def forward(self, x):
        return self.o_proj(torch.cat((self.q_proj(x), self.k_proj(x)), -1))


def called(pair: Pair, x):
    return Called.forward(pair, x)


def pair_of(bits: int | None = None, kind=Pair) -> Pair:
    torch.manual_seed(0)
    pair = kind()
    if bits is not None:
        quantize_(pair, bits)
    return pair


def held() -> int:
    """Bytes of joined memory."""
    return sum(whole.rows.nbytes for whole in _wholes.values())


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


def test_many_rows_on_a_cpu_are_a_product_for_each_layer(monkeypatch):
    made, x = layers(3, 1, 5), torch.randn(2, projections.MANY_ROWS // 2, 7)
    seen = products(monkeypatch)
    with torch.no_grad():
        few, many = project(made, x[0]), project(made, x)
        assert all(y.shape == (0, size) for y, size in zip(project(made, x[0, :0]), (3, 1, 5), strict=True))
    assert seen == [9, 3, 1, 5, 9]
    for a, b, layer in zip(few, many, made.values(), strict=True):
        assert b.is_contiguous() and torch.equal(b, layer(x))
        torch.testing.assert_close(a, b[0], atol=ATOL, rtol=0)


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


# ---- each tensor has a storage of its own


@pytest.mark.parametrize("bits", [None, 8])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16], ids=str)
def test_savers_see_tensors_of_their_own(tmp_path, dtype, bits):
    from safetensors.torch import load_model, save_model

    pair, other = (pair_of(bits).to(dtype) for _ in range(2))
    assert is_fused(pair)
    for tensor in pair.state_dict().values():
        assert tensor.untyped_storage().nbytes() == tensor.nbytes and tensor.storage_offset() == 0
    with torch.no_grad():
        pair.k_proj.bias.fill_(3)
    save_model(pair, tmp_path / "pair.safetensors")
    load_model(other, tmp_path / "pair.safetensors")
    assert is_fused(other)
    for kept in (other, copy.deepcopy(pair), _pickled(pair)):
        assert is_fused(kept)
        assert all(map(torch.equal, kept.state_dict().values(), pair.state_dict().values()))
        x = torch.randn(2, 32, dtype=dtype)
        with torch.no_grad():
            torch.testing.assert_close(kept(x), called(pair, x))


def test_a_model_is_saved_by_safetensors_and_one_projection_alone(tmp_path):
    from safetensors.torch import load_model, save_model

    model, other = small_model(), small_model(seed=1)
    save_model(model, tmp_path / "model.safetensors")
    load_model(other, tmp_path / "model.safetensors")
    assert torch.equal(model(tokens(1, 3)).logits, other(tokens(1, 3)).logits)
    block = small_block(hidden_size=64)
    torch.save(block.a_proj.state_dict(), tmp_path / "a_proj.pt")
    assert (tmp_path / "a_proj.pt").stat().st_size < block.a_proj.weight.nbytes + 2_000


@pytest.mark.parametrize("bits", [None, 8])
def test_joined_memory_is_freed_with_the_last_tensor_in_it(bits):
    before, x = held(), torch.randn(2, 32)

    def replaced(pair):
        for layer in pair.projections().values():
            tensors = {n: t.clone() for n, t in layer.state_dict().items()}
            layer.load_state_dict(tensors, assign=True)

    def given_data(pair):
        for tensor in pair.state_dict(keep_vars=True).values():
            tensor.data = tensor.data.clone()

    with torch.no_grad():
        for change in (replaced, given_data, lambda pair: pair.to("meta")):
            pair = pair_of(bits)
            pair(x)
            assert held() > before
            change(pair)
            assert held() == before
        pair = pair_of(bits)
        size, kept = held() - before, pair.q_proj.weight.clone()
        pair.double().float()
        pair(x)
        assert held() - before == size
        alias = pair.q_proj.weight.detach()
        pair = None
        assert held() > before and torch.equal(alias, kept)
        alias = None
        assert held() == before


# ---- nothing is remembered


def _functional(pair, x):
    other = {name: torch.randn_like(p) / 6 for name, p in pair.named_parameters()}  # outputs of the size of x
    got = torch.func.functional_call(pair, other, (x,))
    replaced = copy.deepcopy(pair)
    replaced.load_state_dict(other, strict=False)
    torch.testing.assert_close(got, called(replaced, x))


def _set(name, make, of="q_proj"):
    def change(pair, x):
        layer = getattr(pair, of)
        setattr(layer, name, make(getattr(layer, name)))

    return change


def _each(make):
    def change(pair, x):
        for parameter in pair.parameters():
            parameter.data = make(parameter.data)
            parameter.add_(1)

    return change


def _narrowed(pair, x):
    pair.q_proj.weight.data, pair.q_proj.bias.data = pair.q_proj.weight.data[:5], pair.q_proj.bias.data[:5]
    pair.o_proj.weight.data = pair.o_proj.weight.data[:, :37]


STALE = {
    "another bias": _set("bias", lambda bias: nn.Parameter(bias + 9)),
    "no bias": _set("bias", lambda bias: None),
    "another data": _each(torch.clone),
    "another dtype": _each(torch.Tensor.double),
    "written": _each(lambda data: data),
    "members cast": lambda pair, x: [layer.double() for layer in (pair.q_proj, pair.k_proj, pair.o_proj)],
    "assigned": lambda pair, x: pair.load_state_dict(
        {"q_proj.bias": torch.ones(32), "o_proj.bias": torch.ones(32)}, strict=False, assign=True
    ),
    "functional call": _functional,
}
STALE_FLOAT = {
    "another weight": _set("weight", lambda weight: nn.Parameter(weight * 3)),
    "transposed": lambda pair, x: setattr(pair.q_proj.weight, "data", pair.q_proj.weight.data.t()),
    "narrowed": _narrowed,
    "output transposed": lambda pair, x: setattr(pair.o_proj.weight, "data", pair.o_proj.weight.data.view(64, 32).t()),
    "bias a buffer": lambda pair, x: _buffer(pair.q_proj),
}
STALE_QUANTIZED = {
    "another scale": _set("scale", lambda scale: scale * 3),
    "another weight": _set("weight", lambda weight: weight - 1),
    "quantised anew": lambda pair, x: pair.k_proj.quantize_weight_(torch.randn(32, 32)),
}


def _buffer(layer):
    bias = layer.bias.detach() + 1
    del layer.bias
    layer.register_buffer("bias", bias)


@pytest.mark.parametrize(
    ("bits", "change"),
    [(None, change) for change in (STALE | STALE_FLOAT).values()]
    + [(8, change) for change in (STALE | STALE_QUANTIZED).values()],
    ids=[*(STALE | STALE_FLOAT), *(f"int8 {name}" for name in STALE | STALE_QUANTIZED)],
)
@torch.no_grad()
def test_what_has_changed_is_seen(bits, change):
    pair, x = pair_of(bits), torch.randn(3, 32)
    torch.testing.assert_close(pair(x), called(pair, x))
    change(pair, x)
    x = x.to(next(pair.parameters()).dtype)
    torch.testing.assert_close(pair(x), called(pair, x))
    pair.to(torch.float64)
    torch.testing.assert_close(pair(x.double()), called(pair, x.double()))


@pytest.mark.parametrize("bits", [None, 8])
@torch.no_grad()
def test_a_functional_call_moves_nothing_and_leaves_the_layers_joined(bits):
    pair, x = pair_of(bits), torch.randn(3, 32)
    tensors = {name: t.clone() for name, t in pair.state_dict().items()}
    places = [t.data_ptr() for t in tensors.values()]
    torch.testing.assert_close(torch.func.functional_call(pair, tensors, (x,)), called(pair, x))
    assert is_fused(pair) and [t.data_ptr() for t in tensors.values()] == places


def test_parameters_are_swapped_where_pytorch_swaps_them():
    pair, x = pair_of(), torch.randn(3, 32, dtype=torch.float64)
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        pair.double()
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)
    assert is_fused(pair)
    with torch.no_grad():
        torch.testing.assert_close(pair(x), called(pair, x))


# ---- memory that was chosen is kept


def test_shared_memory_is_kept():
    pair = pair_of()
    pair.load_state_dict({name: t.clone() for name, t in pair.state_dict().items()}, assign=True)
    assert not is_fused(pair)
    for shared in (pair.share_memory(), pair_of().share_memory(), pair_of(8).share_memory()):
        shared.fuse()
        assert all(t.is_shared() for t in shared.state_dict().values())
    assert is_fused(pair.double().float())


def test_parameters_in_a_flat_buffer_stay_there():
    pair = pair_of()
    flat = torch.nn.utils.parameters_to_vector(pair.parameters()).detach()
    torch.nn.utils.vector_to_parameters(flat, pair.parameters())
    pair.to("cpu").to(torch.float32).fuse()
    flat.zero_()
    assert not any(p.any() for p in pair.parameters())
    loaded = _pickled(pair)
    assert len({p.untyped_storage().data_ptr() for p in loaded.parameters()}) == 1


def test_assigned_weights_stay_where_they_were_loaded_until_fuse():
    pair = pair_of()
    loaded = {name: t.clone() for name, t in pair.state_dict().items()}
    pair.load_state_dict(loaded, assign=True)
    pair.to("cpu")
    assert all(t.data_ptr() == loaded[name].data_ptr() for name, t in pair.state_dict().items())
    pair.fuse()
    assert is_fused(pair)


# ---- transforms


@pytest.mark.parametrize("rows", [3, 100])
@pytest.mark.parametrize("bits", [None, 8, 4])
@pytest.mark.parametrize("grad", [False, True])
def test_transforms_are_those_of_the_layers(bits, rows, grad):
    pair, plain = pair_of(bits).double(), pair_of(kind=Called).double()
    for layer, of in zip(plain.children(), pair.children()):
        layer.weight.data = of.weight.data if bits is None else of.dequantized(torch.float64)
    x = torch.randn(rows, 32, dtype=torch.float64)
    # Of a quantised one these are its biases.
    parameters = {name: p.detach() for name, p in pair.named_parameters()}
    tangents = {name: torch.randn_like(p) for name, p in parameters.items()}

    def dual(module):
        with forward_ad.dual_level():
            given = {name: forward_ad.make_dual(p, tangents[name]) for name, p in parameters.items()}
            y = torch.func.functional_call(module, given, (x,))
            return forward_ad.unpack_dual(y + module(forward_ad.make_dual(x, x.cos()))).tangent

    def of_parameters(module):
        return lambda parameters: torch.func.functional_call(module, parameters, (x,))

    for transform in (
        lambda module: torch.vmap(module)(x),
        lambda module: torch.func.jvp(module, (x,), (x.cos(),))[1],
        lambda module: torch.func.grad(lambda x: module(x).square().sum())(x),
        lambda module: torch.func.jvp(of_parameters(module), (parameters,), (tangents,))[1],
        lambda module: dual(module.requires_grad_(False)),
    ):
        with torch.set_grad_enabled(grad):
            torch.testing.assert_close(transform(pair), transform(plain))


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("bits", [None, 8])
def test_ensembles(bits, grad):
    """As in torch's tutorial."""
    mlps, x = [MLP(small_config()) for _ in range(3)], torch.randn(4, 32)
    if bits is not None:
        for mlp in mlps:
            quantize_(mlp, bits)
    with torch.set_grad_enabled(grad):
        parameters, buffers = torch.func.stack_module_state(mlps)
        got = torch.vmap(lambda p, b: torch.func.functional_call(mlps[0], (p, b), (x,)))(parameters, buffers)
        torch.testing.assert_close(got, torch.stack([mlp(x) for mlp in mlps]), atol=ATOL, rtol=1e-5)


@pytest.mark.parametrize("grad", [False, True])
def test_an_ensemble_of_models_with_attention(grad):
    models, ids = [small_model("attn", "swa", seed=seed) for seed in range(2)], tokens(1, 7)
    with torch.set_grad_enabled(grad):
        parameters, _ = torch.func.stack_module_state(models)
        got = torch.vmap(lambda p: torch.func.functional_call(models[0], p, (ids,)).logits)(parameters)
        torch.testing.assert_close(got, torch.stack([m(ids).logits for m in models]), atol=1e-5, rtol=1e-5)


def test_a_trace_reads_the_parameters():
    pair, x = pair_of(), torch.randn(3, 32)
    with torch.no_grad():
        pair(x)
        buffer = io.BytesIO()
        torch.jit.save(torch.jit.trace(pair, x), buffer)
        buffer.seek(0)
        traced = torch.jit.load(buffer)
        for parameter in traced.parameters():
            parameter.zero_()
        assert not traced(x).any()


@pytest.mark.parametrize("bits", [None, 8])
def test_a_replica_of_data_parallel_trains_the_original(bits):
    pair, x = pair_of(bits), torch.randn(3, 32)
    pair(x)

    def replica(module):
        made = module._replicate_for_data_parallel()
        for name, child in module.named_children():
            setattr(made, name, replica(child))
        for name, tensor in module.named_parameters(recurse=False):
            setattr(made, name, tensor * 1)
        return made

    parameters = list(pair.parameters())
    got = torch.autograd.grad(replica(pair)(x).square().sum(), parameters)
    need = torch.autograd.grad(called(pair, x).square().sum(), parameters)
    torch.testing.assert_close(got, need)
