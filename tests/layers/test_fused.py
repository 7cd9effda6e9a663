"""Where the pointwise ops stand for operations of PyTorch in the layers, and where they must not."""

import pytest
import torch
import torch.nn.functional as F
from support.comparison import TOLERANCE, assert_error
from support.model_cases import small_block, small_config
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from jetkernels.model.hybrid import MLP

BF16, F32, F64 = torch.bfloat16, torch.float32, torch.float64


class Calls(TorchDispatchMode):
    """Which ops of the library a call makes."""

    def __init__(self):
        super().__init__()
        self.ops: set[str] = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "jet":
            self.ops.add(function._schema.name.removeprefix("jet::"))
        return function(*args, **(kwargs or {}))


class Labelled(Tensor):
    """A subclass of Tensor: what it does with an operation is its own affair."""


def small_mlp(dtype: torch.dtype = F32, device: str = "cpu") -> MLP:
    torch.manual_seed(0)
    return MLP(small_config(initializer_range=0.3), device=device, dtype=dtype)


def definition(mlp: MLP, x: Tensor) -> Tensor:
    gate, up, down = (getattr(mlp, f"{name}_proj").weight.double() for name in ("gate", "up", "down"))
    return (F.silu(x.double() @ gate.mT) * (x.double() @ up.mT)) @ down.mT


def ops_of(module: torch.nn.Module, x: Tensor) -> set[str]:
    with Calls() as calls:
        module(x)
    return calls.ops


@pytest.mark.parametrize("dtype", (F64, F32, BF16), ids=str)
def test_mlp_is_its_definition(dtype):
    mlp = small_mlp(dtype)
    x = torch.randn(2, 5, 32, dtype=dtype)
    assert_error("y", mlp(x), definition(mlp, x), 2 * TOLERANCE[dtype].output)
    assert ops_of(mlp, x) == {"swiglu"}


def test_gates_of_a_block_are_one_op():
    block = small_block()
    assert "delta_gates" in ops_of(block, torch.randn(1, 3, 20))
    x = torch.randn(2, 3, 20)
    g, beta = block._gates(block.a_proj(x), block.b_proj(x))
    assert_error("beta", beta, torch.sigmoid(block.b_proj(x).double()), 1e-6)
    softplus = F.softplus(block.a_proj(x).double() + block.dt_bias)
    assert_error("g", g, -block.A_log.double().exp() * softplus, 1e-6)


def test_subclasses_and_mixed_dtypes_are_left_to_pytorch():
    mlp, x = small_mlp(), torch.randn(5, 32)
    y = mlp(x.as_subclass(Labelled))
    assert type(y) is Labelled and ops_of(mlp, x.as_subclass(Labelled)) == set()
    assert_error("y", y.as_subclass(Tensor), definition(mlp, x), 1e-5)
    mlp.up_proj.register_forward_hook(lambda module, inputs, output: output.double())
    mlp.down_proj.to(F64)
    assert ops_of(mlp, x) == set()
    block = small_block()
    block.b_proj.register_forward_hook(lambda module, inputs, output: output.to(BF16))
    assert "delta_gates" not in ops_of(block, torch.randn(1, 3, 20))


def test_autocast_computes_in_its_dtype():
    mlp, x = small_mlp(), torch.randn(5, 32)
    with torch.autocast("cpu", BF16):
        y = mlp(x)
    assert y.dtype == BF16
    assert_error("y", y, definition(mlp, x), 2 * TOLERANCE[BF16].output)


def test_transforms_of_torch_func():
    mlp, x = small_mlp(F64), torch.randn(5, 32, dtype=F64)
    assert_error("vmap", torch.func.vmap(mlp)(x), definition(mlp, x), 1e-12)
    _, tangent = torch.func.jvp(mlp, (x,), (x,))
    y = x.clone().requires_grad_()
    (grad,) = torch.autograd.grad(mlp(y).sum(), y)
    assert_error("jvp", tangent.sum(), (grad * x).sum(), 1e-12)
    hessian = torch.func.hessian(lambda x: mlp(x).sum())(x[0])
    assert_error("hessian", hessian, torch.func.hessian(lambda x: definition(mlp, x).sum())(x[0]), 1e-10)


@pytest.mark.parametrize("backend", ("aot_eager", "inductor"))
def test_compiled_mlp_equals_eager(backend):
    mlp, x = small_mlp(), torch.randn(5, 32)
    compiled = torch.compile(mlp, fullgraph=True, backend=backend)
    grads = []
    for run in (mlp, compiled):
        mlp.zero_grad()
        run(x).sum().backward()
        grads.append(mlp.gate_proj.weight.grad.clone())
    assert_error("y", compiled(x), mlp(x), 1e-6)
    assert_error("gradient", grads[1], grads[0], 1e-6)


def test_meta():
    assert small_mlp(device="meta")(torch.empty(5, 32, device="meta")).shape == (5, 32)
