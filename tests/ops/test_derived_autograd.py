"""Autograd that ``jetkernels.ops._register`` derives from the schemas, on an op made here."""

import subprocess
import sys

# In a process of its own: an op stays registered.
SCRIPT = """if True:
    import torch
    from jetkernels.ops import _register

    calls = []

    def scaled(x, bias, index, factor, double):
        y = x * factor if bias is None else x * factor + bias
        return y, (2 if double else 1) * x.double()[index]

    def scaled_backward(grad_y, grad_z, x, bias, index, factor, double):
        calls.append((grad_y.clone(), grad_z))
        dx = grad_y * factor
        if grad_z is not None:
            dx = dx.index_add(0, index, (2 if double else 1) * grad_z.to(x.dtype))
        return dx, grad_y.clone()

    _register.define(
        "scaled",
        "(Tensor x, Tensor? bias, Tensor index, float factor, bool double) -> (Tensor y, Tensor z)",
        fake=lambda checks, a: (a.x.new_empty(a.x.shape), a.x.new_empty(a.index.shape, dtype=torch.float64)),
        plain=scaled,
    )
    _register.define_backward(
        "scaled",
        constant=("index",),
        fake=lambda checks, a: (a.x.new_empty(a.x.shape), a.x.new_empty(a.x.shape)),
        plain=scaled_backward,
    )
    _register._jet.impl("scaled", scaled, "CPU")
    _register._jet.impl("scaled_backward", scaled_backward, "CPU")
    schema = torch.ops.jet.scaled_backward.default._schema
    assert str(schema) == (
        "jet::scaled_backward(Tensor grad_y, Tensor? grad_z, Tensor x, Tensor? bias, Tensor index, float factor, "
        "bool double) -> (Tensor dx, Tensor dbias)"
    ), schema

    x, bias = (torch.randn(4, requires_grad=True) for _ in range(2))
    index = torch.tensor([2, 0])
    y, z = torch.ops.jet.scaled(x, bias, index, 3.0, True)
    dx, dbias = torch.autograd.grad(y.sum(), (x, bias), retain_graph=True)
    assert calls.pop()[1] is None and dx.tolist() == [3] * 4 and dbias.tolist() == [1] * 4
    dx, dbias = torch.autograd.grad(z.sum(), (x, bias))  # no gradient flows into y: zeros in its shape and dtype
    grad_y, grad_z = calls.pop()
    assert grad_y.tolist() == [0] * 4 and grad_y.dtype == x.dtype and grad_z.dtype == torch.float64
    assert dx.tolist() == [2, 0, 2, 0] and dbias.tolist() == [0] * 4

    y, z = torch.ops.jet.scaled(x, None, index, 3.0, False)
    assert len(y.grad_fn.saved_tensors) == 3
    (y.sum() + z.sum()).backward()
    assert x.grad.tolist() == [4, 3, 4, 3]

    wide, more = (torch.randn(4, dtype=torch.float64, requires_grad=True) for _ in range(2))
    torch.autograd.gradcheck(lambda x, bias: torch.ops.jet.scaled(x, bias, index, 3.0, True), (wide, more))
    torch.library.opcheck(torch.ops.jet.scaled, (x, bias, index, 3.0, True))
    torch.library.opcheck(torch.ops.jet.scaled, (x, None, index, 3.0, False))
    print("right")
"""


def test_gradients_follow_from_the_two_schemas():
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True)
    assert done.stdout == "right\n", done.stderr[-3000:]
