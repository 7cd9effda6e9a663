"""Linear layers of 8 and 4 bits: their numbers, their products, what may be done with them, and models of them."""

import copy
import warnings

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from support.comparison import assert_error
from support.model_cases import small_block, small_model, tokens
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from jetkernels.modules import QuantizedLinear, quantize_
from jetkernels.modules import quantized as q
from jetkernels.modules.joined import _wholes as joined_memory
from jetkernels.modules.joined import fuse_, joined
from jetkernels.modules.projections import project

FORMS = [(8, None), (8, 16), (4, 32), (4, 64)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


@pytest.fixture(scope="module", autouse=True)
def few_rows_are_many():
    """More than 64 rows go the way of a long prompt."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(q, "MOST_ROWS_CPU", 64)
        yield


def layer(bits: int, group_size: int | None, P: int = 24, C: int = 128, bias: bool = True, seed: int = 0, **options):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return QuantizedLinear.from_linear(nn.Linear(C, P, bias=bias, **options), bits, group_size)


def exact(module: QuantizedLinear, x: torch.Tensor) -> torch.Tensor:
    """The product in fp64 of the numbers that the layer holds."""
    steps = (q.unpack_int4(module.weight) if module.bits == 4 else module.weight).double()
    weight = steps * module.scale.double().repeat_interleave(module.group_size, 1)
    return F.linear(x.double(), weight, None if module.bias is None else module.bias.double())


# ---- numbers


@given(st.integers(1, 5), st.integers(1, 40), st.integers(0, 2**31))
def test_packing_is_undone_and_has_even_columns_low(P, half, seed):
    steps = torch.randint(-8, 8, (P, 2 * half), dtype=torch.int8, generator=torch.Generator().manual_seed(seed))
    packed = q.pack_int4(steps)
    assert packed.dtype == torch.uint8 and torch.equal(q.unpack_int4(packed), steps)
    for j in range(half):
        assert torch.equal((packed[:, j] & 15).int() - 8, steps[:, 2 * j].int())
        assert torch.equal((packed[:, j] >> 4).int() - 8, steps[:, 2 * j + 1].int())


@given(st.sampled_from(FORMS), st.integers(1, 9), st.sampled_from([1e-30, 1e-3, 1.0, 1e30]), st.integers(0, 2**31))
def test_each_weight_is_within_half_a_step(form, P, size, seed):
    bits, group = form
    weight = torch.randn(P, 128, generator=torch.Generator().manual_seed(seed)) * size
    group = group or 128
    stored, scale = q.quantize(weight, bits, group)
    error = (q.dequantize(stored, scale).double() - weight.double()).abs()
    step = scale.double().abs().repeat_interleave(group, 1)
    steps = q.unpack_int4(stored) if bits == 4 else stored
    inside = torch.ones_like(steps, dtype=torch.bool) if bits == 8 else (steps > -8) & (steps < 7)
    assert (error <= 0.5001 * step)[inside].all()
    if bits == 8:
        assert torch.equal(steps.abs().view(P, -1, group).amax(-1), torch.full((P, 128 // group), 127).to(torch.int8))


@pytest.mark.parametrize("group", [32, 64])
def test_scales_of_int4_have_the_least_error_of_their_candidates_and_are_bf16(group):
    weight = torch.randn(64, 256)
    stored, scale = q.quantize(weight, 4, group)
    assert torch.equal(scale, scale.bfloat16().float())
    groups = weight.view(64, -1, group)
    error = (q.dequantize(stored, scale).view_as(groups) - groups).square().sum(-1)
    extreme = groups.gather(-1, groups.abs().argmax(-1, keepdim=True))
    for step in (-8.0, -7.0, 7.0):
        s = extreme / step
        other = ((groups / s).round().clamp(-8, 7) * s - groups).square().sum(-1)
        # The scale of a candidate is fitted to its steps, and may lose that again as it is rounded.
        assert (error <= other * 1.02).all()


def test_numbers_of_the_grid_are_kept_exactly():
    steps = torch.randint(-127, 128, (8, 64), dtype=torch.int8)
    steps[:, 0] = 127
    scale = 2.0 ** torch.randint(-9, 9, (8, 1))
    stored, found = q.quantize(steps * scale, 8, 64)
    assert torch.equal(stored, steps) and torch.equal(found, scale)
    steps = torch.randint(-8, 8, (8, 64), dtype=torch.int8)
    steps[:, ::32] = -8
    weight = (steps.view(8, 2, 32) * scale[:, None]).view(8, 64)
    assert torch.equal(q.dequantize(*q.quantize(weight, 4, 32)), weight)


@pytest.mark.parametrize(("bits", "group"), FORMS)
def test_zeros_stay_zeros(bits, group):
    weight = torch.randn(4, 128)
    weight[1], weight[2, 64:] = 0.0, 0.0
    got = q.dequantize(*q.quantize(weight, bits, group or 128))
    assert not got[1].any() and not got[2, 64:].any() and got.isfinite().all()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize(("bits", "group"), FORMS)
def test_what_is_not_finite_is_refused(bits, group, bad):
    weight = torch.randn(4, 128)
    weight[2, 5] = bad
    with pytest.raises(ValueError, match="quantize: weight must be finite"):
        q.quantize(weight, bits, group or 128)


def test_blocks_do_not_show(monkeypatch):
    weight = torch.randn(37, 128)
    need = [q.quantize(weight, bits, 64) for bits in (8, 4)]
    monkeypatch.setattr(q, "BLOCK", {"cpu": 500})
    for (stored, scale), bits in zip(need, (8, 4)):
        assert all(map(torch.equal, q.quantize(weight, bits, 64), (stored, scale)))
        for rows in (1, 100):
            x = torch.randn(rows, 128)
            torch.testing.assert_close(q.product(x, stored, scale, None), x @ q.dequantize(stored, scale).mT)


# ---- products


@given(
    st.sampled_from(FORMS),
    st.sampled_from(DTYPES),
    st.integers(1, 40),
    st.sampled_from([64, 128, 192]),
    st.sampled_from([0, 1, 3, 17, 64, 65, 130]),
    st.booleans(),
    st.integers(0, 2**31),
)
def test_products_equal_those_of_fp64(form, dtype, P, C, rows, bias, seed):
    module = layer(*form, P, C, bias, seed, dtype=dtype)
    x = torch.randn(rows, C, generator=torch.Generator().manual_seed(seed)).to(dtype)
    with torch.no_grad():
        y = module(x)
    assert y.dtype == dtype and y.shape == (rows, P)
    need = exact(module, x)
    size = x.double().abs() @ module.dequantized(torch.float64).abs().mT + 1
    # Sums of C products in fp32, and one rounding of the result; many rows meet weights that have been rounded too.
    summed = C * torch.finfo(torch.promote_types(dtype, torch.float32)).eps * size
    rounded = torch.finfo(dtype).eps * (need.abs() + (size if rows > q.MOST_ROWS_CPU else 0))
    assert ((y.double() - need).abs() <= summed + rounded).all()


@pytest.mark.parametrize(("bits", "group"), FORMS)
def test_any_shape_and_strides(bits, group):
    module = layer(bits, group)
    x = torch.randn(128, 3, 5).transpose(0, 2)
    with torch.no_grad():
        torch.testing.assert_close(module(x), module(x.contiguous()))
        torch.testing.assert_close(module(x[0, 0]), module(x)[0, 0])
        assert module(x[:0]).shape == (0, 3, 24)
    for wrong in (torch.randn(2, 127), torch.randn(()), torch.zeros(2, 128, dtype=torch.int64)):
        with pytest.raises(RuntimeError, match=r"QuantizedLinear: x must be floating \[..., 128\], got"):
            module(wrong)


@pytest.mark.parametrize("rows", [5, 200])
@pytest.mark.parametrize(("bits", "group"), FORMS)
def test_gradients_go_to_x_and_bias(bits, group, rows):
    module = layer(bits, group, dtype=torch.float64)
    x = torch.randn(rows, 128, dtype=torch.float64, requires_grad=True)
    dy = torch.randn(rows, 24, dtype=torch.float64)
    dx, dbias = torch.autograd.grad(module(x), (x, module.bias), dy, create_graph=True)
    torch.testing.assert_close(dx, dy @ module.dequantized(torch.float64))
    torch.testing.assert_close(dbias, dy.sum(0))
    assert not module.weight.requires_grad and [name for name, _ in module.named_parameters()] == ["bias"]


def test_gradcheck():
    module = layer(8, None, 3, 8, dtype=torch.float64)
    x = torch.randn(2, 8, dtype=torch.float64, requires_grad=True)
    # The scales are fp32 and so is the weight, but the product is fp64.
    assert torch.autograd.gradcheck(module, (x,)) and torch.autograd.gradgradcheck(module, (x,))


@pytest.mark.parametrize("rows", [2, 100])
@pytest.mark.parametrize(("bits", "group"), FORMS)
def test_compiled(bits, group, rows):
    module, x = layer(bits, group), torch.randn(rows, 128, requires_grad=True)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), module(x))
    torch.testing.assert_close(*(torch.autograd.grad(f(x).square().sum(), x) for f in (compiled, module)))
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), module(x))


@pytest.mark.parametrize("rows", [2, 100])
def test_autocast_gives_its_dtype(rows):
    module, x = layer(8, None), torch.randn(rows, 128, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        y = module(x)
        assert module(x.double()).dtype == torch.float64
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y, module(x.bfloat16()))
    y.sum().backward()
    assert x.grad.dtype == torch.float32 and x.grad.any() and module.bias.grad.dtype == torch.float32


# ---- modules


@pytest.mark.parametrize(("bits", "group"), FORMS)
def test_a_cast_is_of_the_bias_alone(bits, group):
    module = layer(bits, group)
    weight, scale = module.weight.clone(), module.scale.clone()
    for cast in (nn.Module.bfloat16, nn.Module.half, nn.Module.double, lambda m: m.type(torch.float32)):
        cast(module)
        assert torch.equal(module.weight, weight) and torch.equal(module.scale, scale)
        assert module.scale.dtype == torch.float32
    assert module.bias.dtype == torch.float32
    moved = copy.deepcopy(module).to("meta", torch.bfloat16)
    assert moved.weight.is_meta and moved.weight.dtype == weight.dtype and moved.bias.dtype == torch.bfloat16
    assert moved(torch.randn(2, 128, device="meta")).shape == (2, 24)


def test_a_copy_is_its_own():
    module = layer(8, None)
    other = copy.deepcopy(module)
    other.weight.zero_()
    assert module.weight.any() and torch.equal(other(torch.randn(1, 128)), other.bias[None])


@pytest.mark.parametrize(("bits", "group"), FORMS)
def test_state_dicts(bits, group):
    linear = nn.Linear(128, 24)
    module, other = layer(bits, group, seed=1), layer(bits, group, seed=2)
    other.load_state_dict(module.state_dict())
    assert torch.equal(other.weight, module.weight) and torch.equal(other.scale, module.scale)
    other.load_state_dict(linear.state_dict())
    need = QuantizedLinear.from_linear(linear, bits, group)
    assert torch.equal(other.weight, need.weight) and torch.equal(other.scale, need.scale)
    assert torch.equal(other.bias, linear.bias)
    with pytest.raises(RuntimeError, match=r"weight must be \[24, 128\], got \[24, 64\]"):
        other.load_state_dict(nn.Linear(64, 24).state_dict())


def together(modules, x):
    """What `project` gives of layers, and whether it computed them as one."""
    calls = []
    with torch.no_grad(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(QuantizedLinear, "forward", lambda self, x: (calls.append(self), forward(self, x))[1])
        y = project({str(i): module for i, module in enumerate(modules)}, x)
    return y, not calls


forward = QuantizedLinear.forward


@pytest.mark.parametrize("assign", [False, True])
def test_a_float_state_dict_is_quantised_wherever_the_layer_is(assign):
    linear = nn.Linear(128, 24)
    module = layer(8, None)
    other = copy.deepcopy(module).to("meta") if assign else module
    other.load_state_dict(linear.state_dict(), assign=assign)
    need = QuantizedLinear.from_linear(linear, 8)
    assert all(map(torch.equal, other.state_dict().values(), need.state_dict().values()))


def test_a_state_dict_is_refused_by_name_and_its_scales_become_fp32():
    module = nn.Sequential(layer(8, None), layer(8, None, C=24))
    state = module.state_dict()
    module.load_state_dict({name: t.bfloat16() if "scale" in name else t for name, t in state.items()}, assign=True)
    assert module[1].scale.dtype == torch.float32
    wrong = {"0.weight": torch.full((24, 128), torch.nan), "1.weight": torch.zeros(3, 24)}
    with pytest.raises(RuntimeError) as error:
        module.load_state_dict(state | wrong)
    assert "0.weight: quantize: weight must be finite" in str(error.value)
    assert "1.weight must be [24, 24], got [3, 24]" in str(error.value)


@pytest.mark.parametrize(("bits", "group"), FORMS)
@pytest.mark.parametrize("bias", [True, False])
def test_joined_layers_equal_the_single_ones(bits, group, bias):
    modules = [layer(bits, group, P, bias=bias, seed=P) for P in (24, 5, 40)]
    alone = copy.deepcopy(modules)
    fuse_(modules)
    for rows in (1, 7, 100):
        x = torch.randn(rows, 128)
        got, as_one = together(modules, x)
        assert as_one and not together(alone, x)[1]
        for y, module, other in zip(got, modules, alone):
            with torch.no_grad():
                assert_error("y", y, other(x), 0 if rows < 64 else 1e-6)  # of many rows torch's product, in any order
                torch.testing.assert_close(y, other(x), rtol=0, atol=0 if rows < 64 else 5e-6)
                torch.testing.assert_close(module(x), other(x), rtol=0, atol=0)
    modules[1].quantize_weight_(torch.ones(5, 128))
    got, as_one = together(modules, x)
    assert as_one
    torch.testing.assert_close(got[1], modules[1](x).detach())


def test_what_differs_is_not_joined():
    subclass = layer(8, None)
    subclass.__class__ = type("Other", (QuantizedLinear,), {})
    others = [layer(4, 32), layer(8, 16), layer(8, None, C=64), layer(8, None, dtype=torch.bfloat16), subclass]
    others += [layer(8, None, bias=False), layer(8, None).to("meta"), nn.Linear(128, 24)]
    for other in others:
        base = layer(8, None)
        place = base.weight.data_ptr()
        fuse_([base, other])
        assert base.weight.data_ptr() == place and joined([base, other]) is None


def test_the_tiles_of_joined_layers_are_those_of_their_weights(monkeypatch):
    """Tiles are a copy, on CUDA; here their maker is counted."""
    made = []
    monkeypatch.setattr(q, "TILES_ON", ("cpu",))
    monkeypatch.setattr(q, "int4_tiles", lambda weight, scale: made.append(weight.clone()))
    modules = [layer(4, 32, seed=seed) for seed in range(2)]
    fuse_(modules)

    def tiles():
        made.clear()
        assert together(modules, torch.randn(1, 128))[1]
        assert all(module._tiles is None for module in modules)
        return made

    assert len(tiles()) == 1 and tiles() == []
    modules[1].quantize_weight_(torch.randn(24, 128))
    assert torch.equal(tiles()[0], torch.cat([module.weight for module in modules])) and tiles() == []
    modules[0].load_state_dict(modules[1].state_dict())
    assert len(tiles()) == 1 and tiles() == []
    modules[1].scale.mul_(2)
    assert len(tiles()) == 1


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ((128, 4, 3), "bits must be 8 or 4, got 3"),
        ((128, 4, 4, 16), "group_size of int4 must be 32 or 64, got 16"),
        ((48, 4, 4), "in_features must be a multiple of group_size = 32, got 48"),
        ((48, 4, 8, 0), "group_size must be a positive integer or None, got 0"),
        ((0, 4, 8), "in_features must be a multiple of group_size = 0, got 0"),
    ],
)
def test_wrong_options(arguments, says):
    with pytest.raises(ValueError, match=says):
        QuantizedLinear(*arguments)


def test_quantize_replaces_every_plain_linear_and_says_what_it_left():
    shared = nn.Linear(64, 64)
    module = nn.ModuleDict(
        {
            "a": nn.Linear(64, 8),
            "odd": nn.Linear(20, 8),
            "hooked": nn.Linear(64, 8),
            "inner": nn.Sequential(shared, nn.ReLU(), shared, nn.Linear(64, 4)),
            "normed": nn.utils.parametrizations.weight_norm(nn.Linear(64, 8)),
        }
    ).eval()
    module["hooked"].register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match="skip must name Linear layers, got b"):
        quantize_(module, 4, skip=("inner.3", "b"))
    assert not any(isinstance(m, QuantizedLinear) for m in module.modules())
    report = quantize_(module, 4, skip=("inner.3",))
    assert report.replaced == ["a", "inner.0", "inner.2"] and module["inner"][0] is module["inner"][2]
    assert set(report.left) == {"odd", "hooked", "inner.3", "normed"} and not module["a"].training
    assert report.left["odd"] == "its 20 columns are no multiple of 32"
    module["inner"][3].weight.data[0, 0] = torch.nan
    with pytest.raises(ValueError, match="inner.3: quantize: weight must be finite"):
        quantize_(module, 8)


def test_replaced_weights_are_freed_one_by_one():
    """No float weight outlives its turn."""
    import weakref

    module = nn.Sequential(*(nn.Linear(64, 64) for _ in range(4)))
    watched = [weakref.ref(linear) for linear in module]
    alive = []
    original = QuantizedLinear.from_linear

    def counting(*args):
        alive.append(sum(ref() is not None for ref in watched))
        return original(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(QuantizedLinear, "from_linear", counting)
        quantize_(module, 8)
    assert alive == [4, 3, 2, 1]


def test_layers_whose_weights_others_read_are_left():
    encoder = nn.TransformerEncoderLayer(32, 2, 64, batch_first=True).eval()
    report = quantize_(nn.ModuleList([encoder, nn.TransformerDecoderLayer(32, 2, 64)]), 8)
    assert report.left["0.linear1"] == report.left["0.linear2"] == "a TransformerEncoderLayer reads its weight itself"
    assert {"1.linear1", "1.linear2"} == set(report.replaced)
    with torch.no_grad():
        assert encoder(torch.randn(1, 3, 32)).isfinite().all()
    linear = nn.Linear(32, 8)
    del linear.bias
    linear.register_buffer("bias", torch.ones(8))
    assert quantize_(nn.Sequential(linear), 8).left == {"0": "its weight and bias are not both parameters"}


def test_a_quantised_layer_is_not_drawn():
    block = small_block()
    quantize_(block, 8)
    before = copy.deepcopy(block.state_dict())
    with pytest.raises(ValueError, match="init_weight_: tensor must be floating, got torch.int8"):
        block.reset_parameters()
    assert all(map(torch.equal, block.state_dict().values(), before.values()))


# ---- torch's CUDA kernels, as far as a CPU shows them


@pytest.mark.parametrize("group", [32, 64])
def test_the_packed_bytes_mean_to_torch_what_they_mean_here(group):
    """aten's CPU kernel has the same step and scale-and-zero; its conversion starts from steps instead of bytes."""
    weight, x = torch.randn(64, 128), torch.randn(5, 128).bfloat16()
    stored, scale = q.quantize(weight, 4, group)
    steps = (q.unpack_int4(stored) + 8).int()
    # The bytes that aten::_convert_weight_to_int4pack wants on CUDA (torch's tests and torchao make them so).
    assert torch.equal(q.halves_swapped(stored), (steps[:, ::2] << 4 | steps[:, 1::2]).to(torch.uint8))
    packed = torch._convert_weight_to_int4pack_for_cpu(steps, 1)
    got = torch._weight_int4pack_mm_for_cpu(x, packed, group, q.int4_scale_and_zero(scale))
    torch.testing.assert_close(got, q.product(x, stored, scale, None), rtol=2e-2, atol=0.1)
    need = x.double() @ q.dequantize(stored, scale, torch.float64).mT
    assert (got.double() - need).norm() < 5e-3 * need.norm()


def test_torchs_int8_kernel_takes_weight_and_scale_as_they_are():
    weight, x = torch.randn(64, 128), torch.randn(5, 128).bfloat16()
    stored, scale = q.quantize(weight, 8, 128)
    got = torch._weight_int8pack_mm(x, stored, scale[:, 0].bfloat16())
    need = x.double() @ q.dequantize(stored, scale, torch.float64).mT
    assert (got.double() - need).norm() < 1e-2 * need.norm()


class Called(TorchDispatchMode):
    """The names of the ops that run."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.add(func._schema.name.removeprefix("aten::"))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("form", "P", "C", "rows", "dtype", "kernel"),
    [
        ((8, None), 24, 256, 1, torch.bfloat16, "_weight_int8pack_mm"),
        ((8, None), 5, 20, 4, torch.float32, "_weight_int8pack_mm"),
        ((8, None), 24, 256, 5, torch.bfloat16, None),
        ((8, 16), 24, 256, 1, torch.bfloat16, None),
        ((8, None), 24, 256, 1, torch.float64, None),
        ((4, 32), 24, 256, 1, torch.bfloat16, "_weight_int4pack_mm"),
        ((4, 64), 24, 256, 64, torch.bfloat16, "_weight_int4pack_mm"),
        ((4, 64), 24, 256, 65, torch.bfloat16, None),
        ((4, 64), 24, 256, 0, torch.bfloat16, None),
        ((4, 32), 24, 256, 1, torch.float16, None),
        ((4, 32), 20, 256, 1, torch.bfloat16, None),
        ((4, 32), 24, 192, 1, torch.bfloat16, None),
    ],
)
def test_which_kernel_of_torch_is_called_on_cuda(monkeypatch, form, P, C, rows, dtype, kernel):
    """On fake tensors, which torch's own checks of types and shapes see."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    with FakeTensorMode(), torch.no_grad():
        module = QuantizedLinear(C, P, *form, device="cuda")
        module._make_tiles()
        if kernel == "_weight_int4pack_mm":
            assert module._tiles.weight.shape == (P // 8, C // 128, 32, 4)
            assert module._tiles.scale_and_zero.shape == (C // module.group_size, P, 2)
        with Called() as called:
            y = q.cuda_product(
                torch.empty(rows, C, device="cuda", dtype=dtype), module.weight, module.scale, module._tiles
            )
    assert (y is None) == (kernel is None) and (kernel is None or kernel in called.names)
    assert y is None or (y.shape, y.dtype, y.device.type) == ((rows, P), dtype, "cuda")


def test_tiles_want_tensor_cores(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    with FakeTensorMode():
        module = QuantizedLinear(256, 24, 4, device="cuda")
        module._make_tiles()
    assert module._tiles is None


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("rows", [1, 4, 5, 16, 64, 65])
@pytest.mark.parametrize(("bits", "group"), FORMS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_on_a_gpu(bits, group, rows, dtype):
    modules = [layer(bits, group, P, 256, dtype=dtype).cuda() for P in (64, 40)]
    x = torch.randn(rows, 256, device="cuda").to(dtype)
    with torch.no_grad():
        need = torch.cat([exact(module, x) for module in modules], -1)
        alone = torch.cat([module(x) for module in modules], -1)
        fuse_(modules)
        for y in (alone, torch.cat(together(modules, x)[0], -1)):
            assert (y.double() - need).norm() < 4 * torch.finfo(dtype).eps * need.norm()


# ---- models

WIDE = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4}


def wide_model(tied: bool = True, dtype=torch.float32):
    return small_model(dtype=dtype, tie_word_embeddings=tied, **WIDE).eval()


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(("bits", "most"), [(8, 0.1), (4, 0.7)])
def test_a_quantised_model_is_one_of_the_weights_that_it_stands_for(bits, most, tied):
    model, ids = wide_model(tied), tokens(2, 12)
    need = model(ids, labels=ids)
    config, untied = model.config, wide_model(False)
    report = model.quantize_(bits)
    assert "lm_head" in report.replaced and config.tie_word_embeddings == tied
    assert {name.rpartition(".")[2] for name in report.left} <= {"w2", "o_proj"}
    assert model.model.embed_tokens.weight.dtype == torch.float32
    got = model(ids, labels=ids)
    assert (got.logits - need.logits).norm() < most * need.logits.norm() and got.loss != need.loss
    rounded = {name: tensor for name, tensor in model.state_dict().items() if not name.endswith(".scale")}
    for name, module in model.named_modules():
        if isinstance(module, QuantizedLinear):
            rounded[f"{name}.weight"] = module.dequantized()
    untied.load_state_dict(rounded)
    torch.testing.assert_close(untied(ids).logits, got.logits, atol=1e-4, rtol=1e-4)
    cache = model.new_cache(2, 12)
    with torch.no_grad():
        pieces = [model(ids[:, a : a + 3], cache=cache).logits for a in range(0, 12, 3)]
    torch.testing.assert_close(torch.cat(pieces, 1), got.logits, atol=1e-4, rtol=1e-4)
    assert model.generate(ids, max_new_tokens=4, stop_token_ids=()).shape == (2, 16)
    assert not any(isinstance(m, nn.Linear) and n not in report.left for n, m in model.named_modules())


def test_names_that_are_skipped():
    model = wide_model()
    report = model.quantize_(8, skip=("lm_head", "a_proj", "layers.0.mlp.up_proj"))
    assert "lm_head" not in report.replaced and model.config.tie_word_embeddings
    assert type(model.model.layers[0].mlp.up_proj) is nn.Linear
    assert type(model.model.layers[1].mlp.up_proj) is QuantizedLinear
    assert all(type(layer.self_attn.a_proj) is nn.Linear for layer in model.model.layers if hasattr(layer, "a_proj"))


def test_layers_that_stay_give_back_the_memory_of_those_that_went():
    before = sum(whole.rows.nbytes for whole in joined_memory.values())
    block = small_block(hidden_size=64)
    with torch.no_grad():
        block(torch.randn(1, 1, 64), state=block.new_state(1))
    block.k_proj.register_forward_hook(lambda *_: None)
    report = quantize_(block, 8, skip=("a_proj", "w1"))
    assert {"a_proj", "k_proj", "dynamic_conv1d.kernel_generator.w1"} < set(report.left)
    assert sum(whole.rows.nbytes for whole in joined_memory.values()) == before
    # A group that stays whole stays joined.
    block = small_block()
    quantize_(block, 8, skip=[f"{name}_proj" for name in "qkvgab"] + ["w1"])
    assert joined([*block.projections().values()]) is not None


def test_quantised_models_are_trained_and_loaded_after_inference_mode():
    model, ids = wide_model(), tokens(1, 5)
    model.quantize_(8)
    state = copy.deepcopy(model.state_dict())
    with torch.inference_mode():
        need = model(ids).logits.clone()
        model.generate(ids, max_new_tokens=2)
    model(ids, labels=ids).loss.backward()
    assert all(p.grad is not None for p in model.parameters())
    model.load_state_dict(state)
    torch.testing.assert_close(model(ids).logits, need)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("bits", [8, 4])
def test_loading_quantised_equals_quantising_what_was_loaded(tmp_path, bits, tied):
    model = wide_model(tied, torch.bfloat16)
    model.save_pretrained(tmp_path)
    need = type(model).from_pretrained(tmp_path)
    need.quantize_(bits)
    got = type(model).from_pretrained(tmp_path, quantize=bits)
    for (name, a), (other, b) in zip(got.state_dict().items(), need.state_dict().items(), strict=True):
        assert name == other and a.dtype == b.dtype and torch.equal(a, b), name
    with pytest.raises(ValueError, match="save: .* are quantised, and a checkpoint holds floating weights"):
        got.save_pretrained(tmp_path / "other")
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("bits", [None, 8, 4])
def test_drawing_quantised_equals_quantising_what_was_drawn(bits, tied):
    config = wide_model(tied).config
    need = type(wide_model()).random(config, seed=3)
    again = type(wide_model()).empty(config)
    with torch.random.fork_rng():
        torch.manual_seed(3)
        again.reset_parameters()
    assert all(map(torch.equal, again.state_dict().values(), need.state_dict().values()))
    if bits is not None:
        need.quantize_(bits)
    got = type(need).random(config, seed=3, quantize=bits)
    for (name, a), (other, b) in zip(got.state_dict().items(), need.state_dict().items(), strict=True):
        assert name == other and torch.equal(a, b), name


def test_a_weight_that_is_not_finite_is_named_when_it_is_loaded(tmp_path):
    model = wide_model()
    model.model.layers[1].mlp.up_proj.weight.data[3, 4] = torch.inf
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="layers.1.mlp.up_proj.weight in .*: quantize: weight must be finite"):
        type(model).from_pretrained(tmp_path, quantize=8)


def test_adapters_learn_on_a_quantised_model():
    model, ids = wide_model(), tokens(2, 9)
    model.quantize_(4)

    class Adapter(nn.Module):
        def __init__(self, base):
            super().__init__()
            self.base = base
            self.A = nn.Parameter(torch.randn(2, base.in_features) * 0.1)
            self.B = nn.Parameter(torch.zeros(base.out_features, 2))

        def forward(self, x):
            return self.base(x) + x @ self.A.mT @ self.B.mT

    adapters = []
    for layer in model.model.layers:
        layer.self_attn.o_proj = Adapter(layer.self_attn.o_proj)
        adapters.append(layer.self_attn.o_proj)
    optimizer = torch.optim.Adam([p for a in adapters for p in (a.A, a.B)], 1e-2)
    losses = []
    for _ in range(15):
        optimizer.zero_grad()
        losses.append(model(ids, labels=ids).loss)
        losses[-1].backward()
        optimizer.step()
    assert adapters[0].B.grad.any() and losses[-1] < 0.8 * losses[0]


def test_a_model_is_cast_and_copied():
    model, ids = wide_model(), tokens(1, 6)
    model.quantize_(8)
    need = model(ids).logits
    torch.testing.assert_close(copy.deepcopy(model)(ids).logits, need)
    narrow = copy.deepcopy(model).to(torch.bfloat16)
    assert narrow.dtype == torch.bfloat16
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert (narrow(ids).logits - need).norm() < 0.05 * need.norm()


def test_weights_of_a_tied_model_load_into_a_quantised_one():
    source, model, ids = wide_model(), wide_model(), tokens(2, 6)
    with torch.no_grad():
        for p in source.parameters():
            p.mul_(1.5)
    model.quantize_(8)
    model.load_state_dict(source.state_dict())
    source.quantize_(8)
    with torch.no_grad():
        assert torch.equal(model(ids).logits, source(ids).logits)


def test_a_quantised_model_is_not_drawn_anew():
    model = wide_model()
    model.quantize_(8)
    before = model.model.embed_tokens.weight.clone()
    with pytest.raises(
        ValueError, match="reset_parameters: the model must not be quantised, got quantised model.layers"
    ):
        model.reset_parameters()
    assert torch.equal(model.model.embed_tokens.weight, before)
