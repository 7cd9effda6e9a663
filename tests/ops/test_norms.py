"""jet::rms_norm, add_rms_norm and gated_rms_norm against their definitions, and what callers rely on."""

import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.arguments import NORM_OPS, accumulator, cotangents, floating, norm_inputs
from support.backends import OPS, each_backend, each_dtype, listed
from support.comparison import DTYPES, assert_bitwise
from support.layouts import with_layouts
from support.memory import poisoned_allocations
from support.norm_properties import check_norm, check_norm_gradients, nan_stays, rows_alone
from support.strategies import layouts, seeds
from torch import Tensor

import jetkernels
from jetkernels import _library

BF16, F32, F64 = torch.bfloat16, torch.float32, torch.float64
each_op = pytest.mark.parametrize("op", NORM_OPS)
SHAPES = (
    (1,),
    (7,),
    (1, 1536),
    (3, 2048),
    (2, 3, 12, 256),
    (2, 5, 64),
    (9, 65),
    (2, 2, 2047),
    (4, 8200),
    (70, 33),
    (1, 2, 1, 2, 1, 2, 1, 5),
)
EMPTY = ((0,), (0, 8), (3, 0), (2, 0, 5), (0, 3, 4))


@st.composite
def shapes(draw) -> tuple[int, ...]:
    leading = draw(st.lists(st.integers(1, 4), max_size=3))
    return (*leading, draw(st.one_of(st.integers(1, 70), st.sampled_from((96, 255, 256, 257, 576)))))


# ---- the numbers


@each_backend
@each_dtype
@each_op
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_the_definition(backend, dtype, op, shape):
    with poisoned_allocations():
        check_norm(backend, op, norm_inputs(op, *shape, dtype=dtype))
        check_norm(backend, op, norm_inputs(op, *shape, dtype=dtype, weight_dtype=F32))


@each_backend
@each_op
@given(shape=shapes(), dtype=st.sampled_from(DTYPES), wide=st.booleans(), layouts=layouts, seed=seeds)
def test_any_shape_dtype_and_layout(backend, op, shape, dtype, wide, layouts, seed):
    inputs = norm_inputs(op, *shape, dtype=dtype, weight_dtype=F32 if wide else None, seed=seed)
    other = with_layouts(inputs, layouts)
    with poisoned_allocations():
        check_norm(backend, op, other)
        check_norm_gradients(backend, op, other, cotangents(inputs))
    if not OPS.is_plain:
        for out, same in zip(listed(OPS(op, *other)), listed(OPS(op, *inputs))):
            assert_bitwise(out, same, op)


@each_backend
@each_dtype
@each_op
@pytest.mark.parametrize("shape", ((1,), (3, 2048), (2, 3, 12, 256), (70, 33), (3000, 17)), ids=str)
def test_gradients_equal_fp64_differentiation(backend, dtype, op, shape):
    for weight_dtype in {dtype, F32}:
        inputs = norm_inputs(op, *shape, dtype=dtype, weight_dtype=weight_dtype)
        check_norm_gradients(backend, op, inputs, cotangents(inputs))


@each_backend
def test_gradient_of_one_output_alone(backend):
    inputs = norm_inputs("add_rms_norm", 3, 20)
    grad_y, grad_sum = cotangents(inputs)
    check_norm_gradients(backend, "add_rms_norm", inputs, (grad_y, None))
    check_norm_gradients(backend, "add_rms_norm", inputs, (torch.zeros_like(grad_y), grad_sum))
    assert all(
        grad.any() for name, grad in OPS.gradients("add_rms_norm", inputs, (None, grad_sum)).items() if name != "weight"
    )


@each_op
def test_gradcheck(op):
    inputs = norm_inputs(op, 2, 3, 5, dtype=F64)
    *leaves, eps = (t.requires_grad_() if isinstance(t, Tensor) else t for t in inputs)
    assert torch.autograd.gradcheck(lambda *leaves: getattr(torch.ops.jet, op)(*leaves, eps), leaves)


@pytest.mark.parametrize("isa", ("generic", "avx2", "avx512"))
def test_every_instruction_set(isa):
    """In a process of its own: the choice is made once."""
    facts = _library.build_info()
    if isa not in facts["cpu_isas"][: facts["cpu_isas"].index(facts["cpu_isa"]) + 1]:
        pytest.skip(f"this machine or build cannot run {isa}")
    script = """if True:
        import torch
        from jetkernels import _library
        from support.arguments import NORM_OPS, cotangents, norm_inputs
        from support.backends import OPS
        from support.comparison import DTYPES
        from support.norm_properties import check_norm, check_norm_gradients
        print(_library.build_info()["cpu_isa"])
        for op in NORM_OPS:
            for dtype in DTYPES:
                for shape in ((3, 2048), (2, 3, 64), (5, 61), (2, 7)):
                    inputs = norm_inputs(op, *shape, dtype=dtype)
                    check_norm(OPS, op, inputs)
                    check_norm_gradients(OPS, op, inputs, cotangents(inputs))
    """
    environment = {**os.environ, "JETKERNELS_CPU_ISA": isa, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == isa


# ---- rows


@each_dtype
@each_op
def test_a_row_gives_the_same_bits_in_every_batch(dtype, op):
    rows_alone(OPS, op, norm_inputs(op, 200, 264, dtype=dtype), (0, 77, 199))


@each_backend
@each_dtype
@each_op
def test_nan_stays_in_its_row(backend, dtype, op):
    nan_stays(backend, op, norm_inputs(op, 3, 40, dtype=dtype))


@each_op
def test_nan_stays_in_its_row_of_the_gradients(op):
    inputs = norm_inputs(op, 3, 40)
    grads = cotangents(inputs)
    x = inputs.x.clone()
    x[1, 3] = torch.nan
    clean, spoiled = OPS.gradients(op, inputs, grads), OPS.gradients(op, inputs._replace(x=x), grads)
    assert spoiled.pop("weight").isnan().all() and clean.pop("weight").isfinite().all()
    for name, grad in spoiled.items():
        assert grad[1].isnan().all(), name
        assert_bitwise(grad[[0, 2]], clean[name][[0, 2]], name)


@each_backend
@each_op
def test_zeros_and_extremes(backend, op):
    inputs = norm_inputs(op, 2, 16, eps=1e-6)
    zeros = inputs._replace(**{n: torch.zeros_like(inputs.x) for n in ("x", "residual") if hasattr(inputs, n)})
    assert not listed(backend(op, *zeros))[0].any()
    for size in (1e-12, 1e15):
        check_norm(backend, op, inputs._replace(x=inputs.x * size))
        of_size = inputs._replace(x=inputs.x * size, eps=0.0)
        check_norm_gradients(backend, op, of_size, cotangents(of_size))
    without = inputs._replace(eps=0.0)
    check_norm(backend, op, without)


def test_gates_of_any_size():
    gate = torch.tensor([-torch.inf, -1e4, -100.0, -87.5, -20.0, -0.0, 0.0, 20.0, 100.0, torch.inf], dtype=F32)
    x, weight = torch.ones_like(gate), torch.ones_like(gate)
    y = jetkernels.gated_rms_norm(x, gate, weight)
    torch.testing.assert_close(y, torch.nn.functional.silu(gate), atol=1e-35, rtol=1e-5, equal_nan=True)


# ---- layouts


@each_op
def test_heads_of_a_fused_projection_are_read_where_they_are(op):
    """[N, T, H, V] as columns of [N, T, P], with the first tokens of each row left out."""
    inputs = norm_inputs(op, 2, 3, 4, 16, dtype=BF16)
    names = [name for name in ("x", "residual", "gate") if hasattr(inputs, name)]
    fused = torch.full((2, 5, 200), torch.nan, dtype=BF16)
    views = {}
    for i, name in enumerate(names):
        views[name] = fused[:, 2:, 8 + 70 * i :][..., :64].unflatten(-1, (4, 16))
        views[name].copy_(getattr(inputs, name))
    for out, same in zip(listed(OPS(op, *inputs._replace(**views))), listed(OPS(op, *inputs))):
        assert_bitwise(out, same, op)
    one = {names[-1]: views[names[-1]]}  # where the others have one stride
    for out, same in zip(listed(OPS(op, *inputs._replace(**one))), listed(OPS(op, *inputs))):
        assert_bitwise(out, same, op)


@each_op
def test_expanded_and_transposed_arguments(op):
    inputs = norm_inputs(op, 4, 3, 5, 10)
    for other in (
        inputs._replace(x=inputs.x[:1].expand(4, 3, 5, 10)),
        inputs._replace(x=inputs.x[:, :1, :1].expand(4, 3, 5, 10)),
        inputs._replace(x=inputs.x[..., :1].expand(4, 3, 5, 10)),
        inputs._replace(x=inputs.x.transpose(0, 2).contiguous().transpose(0, 2)),
        inputs._replace(x=inputs.x.permute(1, 2, 0, 3).contiguous().permute(2, 0, 1, 3)),
    ):
        dense = other._replace(**{n: t.contiguous() for n, t in floating(other).items()})
        for out, same in zip(listed(OPS(op, *other)), listed(OPS(op, *dense))):
            assert_bitwise(out, same, op)


@each_backend
@each_dtype
@each_op
@pytest.mark.parametrize("shape", EMPTY, ids=str)
def test_nothing_to_do(backend, dtype, op, shape):
    inputs = norm_inputs(op, *shape, dtype=dtype)
    with poisoned_allocations():
        for out in listed(backend(op, *inputs)):
            assert out.shape == shape and out.dtype == dtype
        grads = backend.gradients(op, inputs, cotangents(inputs))
    assert grads["weight"].shape == (shape[-1],) and not grads["weight"].any()


# ---- the contract


@each_op
@pytest.mark.parametrize("differentiable", (False, True), ids=("inference", "training"))
@pytest.mark.parametrize("weight_dtype", (BF16, F32), ids=str)
def test_opcheck(op, differentiable, weight_dtype):
    inputs = norm_inputs(op, 2, 3, 8, dtype=BF16, weight_dtype=weight_dtype)
    inputs = inputs._replace(**{name: t.requires_grad_(differentiable) for name, t in floating(inputs).items()})
    torch.library.opcheck(getattr(torch.ops.jet, op).default, tuple(inputs), rtol=0, atol=0)


@each_op
def test_opcheck_of_the_backward(op):
    inputs = norm_inputs(op, 2, 3, 8)
    grads = cotangents(inputs)
    for given_grads in {grads, (grads[0], *(None for _ in grads[1:]))}:
        torch.library.opcheck(getattr(torch.ops.jet, op + "_backward").default, (*given_grads, *inputs))


@pytest.mark.parametrize("dynamic", (False, True), ids=("static shapes", "dynamic shapes"))
@each_op
def test_compiles_without_graph_breaks(op, dynamic):
    inputs = norm_inputs(op, 2, 3, 8)
    names, grads = list(floating(inputs)), cotangents(inputs)

    def call(*leaves: Tensor):
        return listed(getattr(torch.ops.jet, op)(*leaves, inputs.eps))

    results = []
    for function in (call, torch.compile(call, fullgraph=True, dynamic=dynamic, backend="aot_eager")):
        leaves = [getattr(inputs, name).clone().requires_grad_() for name in names]
        outs = function(*leaves)
        results.append((*outs, *torch.autograd.grad(outs, leaves, grads)))
    for eager, compiled in zip(*results):
        assert_bitwise(compiled, eager, op)


@each_op
def test_neither_twice_nor_in_forward_mode(op):
    inputs = norm_inputs(op, 2, 5, dtype=F64)
    x = inputs.x.requires_grad_()
    (grad,) = torch.autograd.grad(listed(OPS(op, *inputs))[0].square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match=f"{op}: not differentiable twice"):
        grad.sum().backward()
    with pytest.raises(NotImplementedError, match=f"{op}: x has a tangent"):
        torch.func.jvp(lambda x: listed(OPS(op, *inputs._replace(x=x)))[0], (inputs.x.detach(),), (inputs.x.detach(),))


@each_op
def test_autocast_computes_in_the_wider_dtype(op):
    inputs = norm_inputs(op, 3, 8)
    with torch.autocast("cpu", BF16):
        for out, same in zip(listed(OPS(op, *inputs)), listed(OPS(op, *inputs))):
            assert out.dtype == F32
            assert_bitwise(out, same, op)
        if op != "rms_norm":
            leaves = [inputs.x.to(BF16).requires_grad_(), *inputs[1:]]
            outs = listed(OPS(op, *leaves))
            expected = listed(OPS(op, *inputs._replace(x=inputs.x.to(BF16).float())))
            for out, same in zip(outs, expected):
                assert_bitwise(out, same, op)
            outs[0].sum().backward()
            assert leaves[0].grad.dtype == BF16 and leaves[0].grad.any()


@each_op
def test_outputs_and_gradients_have_the_dtypes_of_their_arguments(op):
    for dtype in DTYPES:
        for weight_dtype in (dtype, F32):
            inputs = norm_inputs(op, 2, 8, dtype=dtype, weight_dtype=weight_dtype)
            leaves = {name: t.requires_grad_() for name, t in floating(inputs).items()}
            outs = listed(OPS(op, *inputs))
            assert all(out.dtype == dtype for out in outs)
            sum(out.to(accumulator(dtype)).sum() for out in outs).backward()
            for leaf in leaves.values():
                assert leaf.grad.dtype == leaf.dtype and leaf.grad.shape == leaf.shape and leaf.grad.is_contiguous()


def test_functions_are_the_ops():
    for op in NORM_OPS:
        inputs = norm_inputs(op, 2, 8)
        for out, same in zip(listed(getattr(jetkernels, op)(*inputs)), listed(OPS(op, *inputs))):
            assert_bitwise(out, same, op)


WRONG = (
    ({"x": torch.tensor(1.0)}, "x must have 1 to 8 dimensions, got 0 with shape []"),
    ({"x": torch.ones(2, 8, dtype=torch.int64)}, "x must be float32 or bfloat16 or float16 or float64, got int64"),
    ({"weight": torch.ones(7)}, "weight [C] dimension 0 must be C = 8 (as in x), got 7"),
    ({"weight": torch.ones(1, 8)}, "weight must have 1 dimensions [C], got 2 with shape [1,8]"),
    ({"weight": torch.ones(8, dtype=BF16)}, "weight must be float32 like x, got bfloat16"),
    ({"weight": torch.ones(8, device="meta")}, "weight must be on "),
)
WRONG_OTHER = (
    (torch.ones(2, 7), "must have the shape [2,8] of x, got [2,7]"),
    (torch.ones(8), "must have the shape [2,8] of x, got [8]"),
    (torch.ones(2, 8, dtype=BF16), "must be float32 like x, got bfloat16"),
)


@each_op
def test_wrong_arguments_are_refused_with_a_sentence(op):
    inputs = norm_inputs(op, 2, 8)
    other = {"add_rms_norm": "residual", "gated_rms_norm": "gate"}.get(op)
    cases = [*WRONG, *(({other: t}, f"{other} {text}") for t, text in WRONG_OTHER if other)]
    for changes, text in cases:
        with pytest.raises(RuntimeError) as error:
            getattr(jetkernels, op)(*inputs._replace(**changes))
        assert str(error.value).startswith(f"{op}: {text}")
