"""jet::linear, linear_int8 and linear_int4 against their definitions."""

import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.arguments import LINEAR_OPS, linear_inputs
from support.comparison import DTYPES, assert_bitwise, assert_error
from support.paths import ROOT, TESTS
from support.shapes import ids
from torch import Tensor

import jetkernels
from jetkernels import ops
from jetkernels.ops.linear import MOST_ROWS
from jetkernels.plain import linear as plain
from reference import linear as reference

BF16, F32, F64 = torch.bfloat16, torch.float32, torch.float64
TOLERANCE = {F64: 1e-12, F32: 1e-5, torch.float16: 1e-3, BF16: 4e-3}
INTEGER_OPS = ("linear_int8", "linear_int4")
each_op = pytest.mark.parametrize("op", LINEAR_OPS)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=ids)


def arguments(op: str, N: int, C: int, P: int, G: int, dtype: torch.dtype, bias: bool = True, seed: int = 0) -> list:
    return list(linear_inputs(op, N, C, P=P, G=G, dtype=dtype, bias=bias, seed=seed))


def check(op: str, args: list, functions=torch.ops.jet) -> None:
    y = getattr(functions, op)(*args)
    assert y.dtype == args[0].dtype and y.is_contiguous()
    assert_error("y", y, getattr(reference, op)(*args), TOLERANCE[y.dtype])


def strided(x: Tensor, layout: str) -> Tensor:
    """The values of x [N, C] in other places, between NaN."""
    N, C = x.shape
    if layout == "columns of a wider row":
        wide = torch.full((N, C + 5), float("nan"), dtype=x.dtype)
        wide[:, 3 : 3 + C] = x
        return wide[:, 3 : 3 + C]
    if layout == "every other column":
        wide = torch.full((N, 2 * C), float("nan"), dtype=x.dtype)
        wide[:, ::2] = x
        return wide[:, ::2]
    return x.mT.contiguous().mT


SIZES = st.tuples(
    st.sampled_from((0, 1, 2, 3, 6, 13, 16, 17, 33, 48, 64, 65, 100, 130)),  # N
    st.sampled_from((1, 3, 15, 16, 17, 24, 33, 40)),  # P
    st.sampled_from((1, 2, 3)),  # G
    st.sampled_from((0, 1, 7, 15, 16, 31, 32, 33, 64, 100)),  # columns of a group; times 2 for linear_int4
)


@each_dtype
@each_op
@given(sizes=SIZES, bias=st.booleans(), seed=st.integers(0, 2**31))
def test_equals_the_definition(op, dtype, sizes, bias, seed):
    N, P, G, columns = sizes
    C = columns if op == "linear" else G * columns * (2 if op == "linear_int4" else 1)
    check(op, arguments(op, N, C, P, G, dtype, bias, seed))


@each_dtype
@each_op
def test_plain_equals_the_definition(op, dtype):
    check(op, arguments(op, 5, 96, 37, 3, dtype), plain)
    check(op, arguments(op, 0, 96, 37, 3, dtype, bias=False), plain)


@pytest.mark.parametrize("layout", ("columns of a wider row", "every other column", "transposed"))
@each_dtype
@each_op
@pytest.mark.parametrize("N", (1, 5, 40))
def test_strided_rows(op, dtype, layout, N):
    args = arguments(op, N, 108, 21, 2, dtype)
    assert_bitwise(
        getattr(torch.ops.jet, op)(strided(args[0], layout), *args[1:]), getattr(torch.ops.jet, op)(*args), layout
    )


@each_op
def test_any_number_of_dimensions(op):
    x, *rest = arguments(op, 8, 64, 20, 2, BF16)  # the op serves so many rows on every CPU
    function = getattr(ops, op)
    y = function(x, *rest)
    assert_bitwise(function(x[0], *rest), function(x[:1], *rest)[0], "one row")
    assert_bitwise(function(x.view(2, 1, 4, 64), *rest), y.view(2, 1, 4, 20))
    wide = torch.cat([x, x], 1).view(2, 4, 128)[..., :64]  # rows at one stride
    assert_bitwise(function(wide, *rest), y.view(2, 4, 20))
    turned = x.view(2, 4, 64).transpose(0, 1)  # and not
    assert_bitwise(function(turned, *rest), y.view(2, 4, 20).transpose(0, 1))
    assert function(x.view(2, 4, 64)[:, :0], *rest).shape == (2, 0, 20)


@each_op
def test_rows_of_a_wider_weight(op):
    x, weight, *rest = arguments(op, 3, 64, 20, 2, BF16)
    y = getattr(ops, op)(x, weight, *rest)
    wide = torch.cat([weight, weight], 1)
    assert_bitwise(getattr(ops, op)(x, wide[:, : weight.shape[1]], *rest), y)
    assert_bitwise(getattr(ops, op)(x, weight.mT.contiguous().mT, *rest), y)


@each_dtype
@each_op
@pytest.mark.parametrize("N", (2, 7, 16, 70))
def test_a_row_depends_on_itself_alone(op, dtype, N):
    args = arguments(op, N, 70 if op == "linear" else 80, 35, 2, dtype)
    y = getattr(torch.ops.jet, op)(*args)
    args[0][N // 2] = float("nan")
    poisoned = getattr(torch.ops.jet, op)(*args)
    assert poisoned[N // 2].isnan().all()
    others = [n for n in range(N) if n != N // 2]
    assert_bitwise(poisoned[others], y[others])


@each_dtype
@each_op
@pytest.mark.parametrize("N", (1, 5, 20, 70))
def test_one_thread_and_several_compute_the_same_bits(op, dtype, N):
    args = arguments(op, N, 256, 333, 2, dtype)
    before = torch.get_num_threads()
    try:
        found = []
        for threads in (1, 2, 3, 2):
            torch.set_num_threads(threads)
            found.append(getattr(torch.ops.jet, op)(*args))
    finally:
        torch.set_num_threads(before)
    for y in found[1:]:
        assert_bitwise(y, found[0])


@pytest.mark.parametrize("value", (float("inf"), float("nan"), -float("inf")))
def test_what_is_not_finite_reaches_its_outputs_alone(value):
    for dtype in DTYPES:
        x, weight, _ = arguments("linear", 3, 40, 20, 1, dtype)
        weight[18, 39] = value
        y = torch.ops.jet.linear(x, weight, None)
        assert not y[:, 18].isfinite().any() and y[:, [p for p in range(20) if p != 18]].isfinite().all()


def check_sums(op: str, args: list) -> None:
    """Errors relative to what is summed: an element may be as small as rows of other sizes make it."""
    x, weight, scale, _ = args
    y = getattr(torch.ops.jet, op)(x, weight, scale, None).double()
    numbers = reference.scaled(weight if op == "linear_int8" else reference.unpacked(weight), scale)
    error = (y - x.double() @ numbers.mT).abs()
    assert (error <= TOLERANCE[x.dtype] * (x.double().abs() @ numbers.abs().mT) + torch.finfo(x.dtype).tiny).all()


@pytest.mark.parametrize("op", INTEGER_OPS)
@pytest.mark.parametrize("dtype", (BF16, torch.float16, F32), ids=ids)
@pytest.mark.parametrize("N", (1, 2, 3, 5, 12))
def test_rows_whose_elements_differ_by_orders_of_magnitude(op, dtype, N):
    for C, G in ((9000, 1), (768, 6), (64, 2)):
        args = arguments(op, N, C, 19, G, dtype, bias=False)
        args[0] *= torch.logspace(-4, 1, C).to(dtype)
        args[0][:, ::7] = 0
        check_sums(op, args)
        args[0][N // 2] = 0
        assert not getattr(torch.ops.jet, op)(*args)[N // 2].any()


@pytest.mark.parametrize("op", INTEGER_OPS)
@pytest.mark.parametrize("size", (2.0**-126, 2.0**-100, 2.0**110))
def test_rows_of_any_size(op, size):
    args = arguments(op, 2, 128, 19, 1, BF16, bias=False)
    args[0] = torch.ones_like(args[0]) * size
    args[0][1] = 1
    check_sums(op, args)


@pytest.mark.parametrize("op", INTEGER_OPS)
@pytest.mark.parametrize("value", (float("inf"), -float("inf"), float("nan")))
def test_a_row_of_x_that_is_not_finite(op, value):
    """Infinities reach y with their signs."""
    for dtype in (BF16, torch.float16, F32):
        x, weight, scale, _ = arguments(op, 3, 128, 19, 2, dtype)
        weight[:, 20] = 0x31
        x[1, 41 if op == "linear_int4" else 20] = value
        y, expected = getattr(torch.ops.jet, op)(x, weight, scale, None), getattr(reference, op)(x, weight, scale, None)
        assert_bitwise(y[1].double(), expected[1])
        assert y[[0, 2]].isfinite().all()


@pytest.mark.parametrize("op", INTEGER_OPS)
def test_all_weights_of_a_format(op):
    """Every number that 8 or 4 bits can hold, exactly."""
    x = torch.eye(256, dtype=BF16)
    if op == "linear_int8":
        weight = torch.arange(-128, 128, dtype=torch.int8).expand(20, 256).contiguous()
    else:
        weight = torch.arange(256, dtype=torch.uint8).expand(20, 256).contiguous()[:, :128]
        weight = torch.cat([weight[:10], weight[:10] + 128])
    for rows in (x, x[:1], x[130:135]):
        y = getattr(torch.ops.jet, op)(rows, weight, torch.ones(20, 4), None)
        assert_bitwise(y, getattr(reference, op)(rows, weight, torch.ones(20, 4), None).to(BF16) + 0.0)


VARIANTS = """if True:
    import sys, itertools, torch
    sys.path[:0] = sys.argv[1:]
    from ops.test_linear import DTYPES, LINEAR_OPS, arguments, check
    for op, dtype, N in itertools.product(LINEAR_OPS, DTYPES, (1, 2, 4, 7, 16, 37)):
        for C, P, G in ((96, 33, 1), (132, 16, 3), (34, 5, 1), (1028, 40, 2)):
            check(op, arguments(op, N, C, P, G, dtype))
"""


@pytest.mark.parametrize("isa", ("generic", "avx2", "avx512"))
def test_variants_of_the_cpu_code(isa):
    """The processes of the tests above run the best one, with AMX where there is AMX; avx512 is without."""
    environment = {**os.environ, "JETKERNELS_CPU_ISA": isa}
    done = subprocess.run(
        [sys.executable, "-c", VARIANTS, ROOT, TESTS], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_beside_torch():
    """Both set up the tile registers of AMX."""
    args = arguments("linear", 40, 96, 64, 1, BF16)
    y = torch.ops.jet.linear(*args)
    expected = torch.nn.functional.linear(*args)
    for _ in range(3):
        assert_bitwise(torch.nn.functional.linear(*args), expected)
        assert_bitwise(torch.ops.jet.linear(*args), y)


# ---- the contract


@each_op
@pytest.mark.parametrize("bias", (True, False), ids=("bias", "no bias"))
def test_opcheck(op, bias):
    for dtype in (BF16, F64):
        args = arguments(op, 6, 32, 9, 2, dtype, bias)
        torch.library.opcheck(getattr(torch.ops.jet, op).default, [args[0].view(2, 3, 32), *args[1:]])


@each_op
def test_compiles_as_one_graph(op):
    function = torch.compile(getattr(ops, op), fullgraph=True, backend="aot_eager")
    args = arguments(op, 3, 32, 9, 2, BF16)
    with torch.no_grad():
        assert_bitwise(function(*args), getattr(ops, op)(*args))


@each_op
def test_autocast(op):
    args = arguments(op, 3, 32, 9, 2, F32)
    scale = 2 if op != "linear" else None  # which place it has
    low = [a.bfloat16() if a.is_floating_point() and i != scale else a for i, a in enumerate(args)]
    with torch.autocast("cpu", dtype=BF16):
        y = getattr(torch.ops.jet, op)(*args)
    assert_bitwise(y, getattr(torch.ops.jet, op)(*low))


@each_op
def test_the_op_refuses_gradients(op):
    args = arguments(op, 3, 32, 9, 2, F32)
    args[0].requires_grad_()
    with pytest.raises(RuntimeError, match=f"{op}: x requires a gradient.*torch.nn.functional.linear"):
        getattr(torch.ops.jet, op)(*args)
    with torch.no_grad():
        getattr(torch.ops.jet, op)(*args)


def test_the_function_has_gradients_from_torch():
    x, weight, bias = (a.requires_grad_() for a in arguments("linear", 3, 32, 9, 1, F64))
    for rows in (x, x[:1]):
        torch.autograd.gradcheck(ops.linear, (rows, weight, bias))


@each_dtype
def test_the_function_gives_many_rows_to_torch(dtype):
    most = MOST_ROWS[dtype]
    args = arguments("linear", most + 1, 32, 9, 1, dtype)
    assert_bitwise(ops.linear(*args), torch.nn.functional.linear(*args))
    few = [args[0][:most], *args[1:]]
    assert_bitwise(ops.linear(*few), torch.ops.jet.linear(*few))


def test_the_function_differentiates_forwards():
    x, weight, _ = arguments("linear", 3, 32, 9, 1, F64)
    y, tangent = torch.func.jvp(lambda x: ops.linear(x, weight), (x,), (x,))
    assert torch.equal(y, tangent)


def test_the_function_is_exported_for_any_number_of_rows():
    class Module(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.randn(5, 8), requires_grad=False)

        def forward(self, x):
            return ops.linear(x, self.weight)

    module, rows = Module(), torch.export.Dim("rows", min=2, max=100)
    program = torch.export.export(module, (torch.randn(4, 8),), dynamic_shapes=({0: rows},)).module()
    for N in (3, 90):
        x = torch.randn(N, 8)
        torch.testing.assert_close(program(x), module(x))


@pytest.mark.parametrize("rows", (3, 100))
def test_the_function_refuses_the_same_for_any_number_of_rows(rows):
    x = torch.randn(rows, 8)
    for weight, bias, says in (
        (torch.randn(8), None, "weight must have 2 dimensions"),
        (torch.randn(5, 8), torch.randn(1), "bias .* must be P = 5"),
        (torch.randn(5, 8), torch.tensor(1.0), "bias must have 1 dimension"),
        (torch.randn(5, 7), None, "weight .* must be C = 8"),
    ):
        with pytest.raises(RuntimeError, match=f"linear: {says}"):
            ops.linear(x, weight, bias)


def test_the_function_refuses_what_the_op_refuses():
    with pytest.raises(TypeError, match="linear: weight must be a Tensor, got int"):
        ops.linear(X, 3, None)
    with pytest.raises(RuntimeError, match="linear_int8: x requires a gradient"):
        ops.linear_int8(X.clone().requires_grad_(), W8, S)


@each_op
def test_backend(op):
    args = arguments(op, 3, 32, 9, 2, BF16)
    assert jetkernels.backend_of(op, *args).name == "cpu"


X, W, W8, W4 = torch.zeros(3, 8), torch.zeros(5, 8), torch.zeros(5, 8, dtype=torch.int8), torch.zeros(5, 4).byte()
S, B = torch.ones(5, 2), torch.zeros(5)


@pytest.mark.parametrize(
    "op, args, message",
    (
        ("linear", (X[0, 0], W, B), r"x must have 1 to 8 dimensions \[...,C\], got 0 with shape \[\]"),
        ("linear", (X.long(), W, B), "x must be float32 or bfloat16 or float16 or float64, got int64"),
        ("linear", (X, W[0], B), r"weight must have 2 dimensions \[P,C\], got 1"),
        ("linear", (X, W[:, 1:], B), r"weight \[P,C\] dimension 1 must be C = 8 \(as in x\), got 7"),
        ("linear", (X, W.double(), B), "weight must be float32 like x, got float64"),
        ("linear", (X, W, B[1:]), r"bias \[P\] dimension 0 must be P = 5 \(as in weight\), got 4"),
        ("linear", (X, W, B.half()), "bias must be float32 like x, got float16"),
        ("linear_int8", (X, W, S, B), "weight must be int8, got float32"),
        ("linear_int8", (X, W8, S.double(), B), "scale must be float32, got float64"),
        ("linear_int8", (X, W8, S[1:], B), r"scale \[P,G\] dimension 0 must be P = 5 \(as in weight\), got 4"),
        ("linear_int8", (X, W8, S[:, :0], B), r"scale dimension 1 \(G\) must divide C = 8 \(as in x\), got 0"),
        ("linear_int8", (X, W8, torch.ones(5, 3), B), r"scale dimension 1 \(G\) must divide C = 8 \(as in x\), got 3"),
        ("linear_int4", (X, W8, S, B), r"weight \[P,C/2\] dimension 1 must be C/2 = 4 \(from x\), got 8"),
        ("linear_int4", (X, W4.char(), S, B), "weight must be uint8, got int8"),
        ("linear_int4", (X[:, 1:], W4, S, B), r"x dimension 1 \(C\) must be even, got 7"),
        ("linear_int4", (X, W4, torch.ones(5, 8), B), "groups of a multiple of 2 columns, got 1 = C / G"),
    ),
)
def test_refusals(op, args, message):
    with pytest.raises(RuntimeError, match=f"^{op}: .*{message}"):
        getattr(ops, op)(*args)
    with pytest.raises(RuntimeError, match=f"^{op}: .*{message}"):
        getattr(torch.ops.jet, op)(*(a.to("meta") for a in args))


@pytest.mark.parametrize("rows", (1, 1000))
@pytest.mark.parametrize("name", ("x", "weight", "bias"))
def test_a_tensor_on_another_device_is_named(name, rows):
    args = {"x": torch.randn(rows, 5), "weight": torch.randn(3, 5), "bias": torch.randn(3)}
    args[name] = args[name].to("meta")
    named = "weight" if name == "x" else name
    with pytest.raises(RuntimeError, match=rf"^linear: {named} must be on (cpu|meta) like x, got (cpu|meta)$"):
        jetkernels.linear(**args)
