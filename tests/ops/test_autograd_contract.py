"""What autograd is told: versions of what is overwritten, and a sentence wherever there is no derivative."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.arguments import DIFFERENTIABLE_OPS, IN_PLACE_OPS, LINEAR_OPS, cotangents, example, floating
from support.backends import listed
from support.comparison import assert_bitwise
from support.strategies import seeds
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

import jetkernels
from jetkernels import ops

F64 = torch.float64
WRITTEN = {
    "recurrent_gated_delta_rule": ("state",),
    "recurrent_gated_delta_rule_verify": ("keys", "updates"),
    "recurrent_gated_delta_rule_commit": ("state",),
    "prefill_gated_delta_rule": ("state",),
    "dynamic_conv_step": ("conv_state",),
    "jet_block_step": ("conv_state", "state"),
    "attention_step": ("key", "value"),
}
each_pool_op = pytest.mark.parametrize("op", IN_PLACE_OPS)
each_differentiable_op = pytest.mark.parametrize("op", DIFFERENTIABLE_OPS)


def op_named(op: str):
    return getattr(torch.ops.jet, op)


def argument_names(op: str) -> list[str]:
    return [a.name for a in op_named(op).default._schema.arguments]


def differentiable_names(op: str, args) -> list[str]:
    return [n for n, t in zip(argument_names(op), args) if isinstance(t, Tensor) and t.is_floating_point()]


# ---- in place


@each_pool_op
@pytest.mark.parametrize("mode", (torch.enable_grad, torch.no_grad, torch.inference_mode))
def test_versions_of_what_is_written_and_of_nothing_else(op, mode):
    args = example(op)
    tensors = {n: t for n, t in zip(argument_names(op), args) if isinstance(t, Tensor)}
    before = {n: t._version for n, t in tensors.items()}
    with mode():
        op_named(op)(*args)
    for name, t in tensors.items():
        assert (t._version > before[name]) == (name in WRITTEN[op]), name


@each_pool_op
def test_a_saved_tensor_that_was_overwritten_raises(op):
    args = example(op)
    for name in WRITTEN[op]:
        w = torch.ones((), requires_grad=True)
        loss = (w * dict(zip(argument_names(op), args))[name]).sum()
        with torch.no_grad():
            op_named(op)(*args)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


@each_pool_op
def test_a_view_of_a_pool_and_the_pool_share_a_version(op):
    args = list(example(op))
    place = argument_names(op).index(WRITTEN[op][0])
    base = torch.stack([args[place]] * 2)
    args[place] = base[1]
    with torch.no_grad():
        op_named(op)(*args)
    assert base._version > 0


@each_pool_op
def test_inference_tensors_are_taken_inside_and_outside_of_inference_mode(op):
    with torch.inference_mode():
        args = example(op)
        op_named(op)(*args)
    op_named(op)(*args)


@pytest.mark.parametrize("op", (*IN_PLACE_OPS, *LINEAR_OPS))
def test_an_input_that_requires_a_gradient_is_refused_before_anything_is_written(op):
    args = example(op)
    for name in differentiable_names(op, args):
        place = argument_names(op).index(name)
        for leaf in (True, False):
            t = args[place].clone().requires_grad_()
            again = [a.clone() if isinstance(a, Tensor) else a for a in args]
            again[place] = t if leaf else t * 1
            before = [a.detach().clone() if isinstance(a, Tensor) else a for a in again]
            with pytest.raises(
                RuntimeError, match=f"^{op}: {name} requires a gradient, .*not differentiable.*no_grad.*or use "
            ):
                op_named(op)(*again)
            for a, b in zip(again, before):
                if isinstance(a, Tensor):
                    assert_bitwise(a.detach(), b, "argument")
            with torch.no_grad():
                op_named(op)(*again)


def test_the_python_functions_name_themselves():
    q, k, v, g, beta, state, rows, *_ = example("recurrent_gated_delta_rule")
    with pytest.raises(RuntimeError, match="^recurrent_gated_delta_rule_: q requires a gradient"):
        jetkernels.recurrent_gated_delta_rule_(q.requires_grad_(), k, v, g, beta, state, rows)


# ---- second derivatives, forward mode, function transforms


@each_differentiable_op
@settings(max_examples=5)
@given(seed=seeds, data=st.data())
def test_second_derivatives_raise_when_they_are_asked_for(op, seed, data):
    torch.manual_seed(seed)
    inputs = example(op, F64, indexed=False)
    names = list(floating(inputs))
    of, then = data.draw(st.sampled_from(names)), data.draw(st.sampled_from(names))
    inputs = inputs._replace(**{n: getattr(inputs, n).requires_grad_() for n in names})
    loss = sum(out.square().sum() for out in listed(op_named(op)(*inputs)))
    once = torch.autograd.grad(loss, getattr(inputs, of), create_graph=True)[0]
    assert once.requires_grad
    with pytest.raises(RuntimeError, match=f"{op}: not differentiable twice"):
        torch.autograd.grad(once.square().sum(), getattr(inputs, then))


@each_differentiable_op
def test_create_graph_gives_the_first_derivative(op):
    inputs = example(op, F64, indexed=False)
    leaves = [t.requires_grad_() for t in floating(inputs).values()]
    grads = cotangents(inputs)
    outs = listed(op_named(op)(*inputs))
    expected = torch.autograd.grad(outs, leaves, grads, retain_graph=True)
    for found, ref in zip(torch.autograd.grad(outs, leaves, grads, create_graph=True), expected):
        assert_bitwise(found.detach(), ref, op)


@pytest.mark.parametrize("op", tuple(ops._register.defined))
def test_forward_mode_raises(op):
    if op.removesuffix("_backward") not in DIFFERENTIABLE_OPS:
        args = example(op)
    else:
        inputs = example(op.removesuffix("_backward"), F64, indexed=False)
        args = (*cotangents(inputs), *inputs) if op.endswith("_backward") else tuple(inputs)
    for name in differentiable_names(op, args):
        place = argument_names(op).index(name)
        with torch.no_grad(), forward_ad.dual_level():
            dual = forward_ad.make_dual(args[place], torch.ones_like(args[place]))
            with pytest.raises(
                NotImplementedError, match=f"^{op}: {name} has a tangent.*not differentiable in forward mode"
            ):
                op_named(op)(*args[:place], dual, *args[place + 1 :])
            op_named(op)(*args)


@each_differentiable_op
def test_function_transforms(op):
    """torch.func.grad and vmap are right; jvp, jacfwd and hessian raise."""
    inputs = example(op, F64, indexed=False)

    def loss(x: Tensor) -> Tensor:
        out, *others = listed(op_named(op)(x, *inputs[1:]))
        return out.square().sum() + sum(other.sum() for other in others)

    x = inputs[0]
    leaf = x.clone().requires_grad_()
    expected = torch.autograd.grad(loss(leaf), leaf)[0]
    assert_bitwise(torch.func.grad(loss)(x), expected, "grad")
    pullback = torch.func.vjp(loss, x)[1]
    assert_bitwise(pullback(torch.ones((), dtype=F64))[0], expected, "vjp")
    xs = torch.stack([x, 2 * x])
    torch.testing.assert_close(torch.func.vmap(loss)(xs), torch.stack([loss(t) for t in xs]))
    for transform in (torch.func.jacfwd, torch.func.hessian):
        with pytest.raises((RuntimeError, NotImplementedError), match="not differentiable"):
            transform(loss)(x)
    with pytest.raises(NotImplementedError, match="not differentiable in forward mode"):
        torch.func.jvp(loss, (x,), (x,))
    with pytest.raises(RuntimeError, match="not differentiable twice"):
        torch.func.grad(lambda t: torch.func.grad(loss)(t).square().sum())(x)


@each_differentiable_op
def test_gradcheck(op):
    inputs = example(op, F64, indexed=False)
    names = list(floating(inputs))
    leaves = [getattr(inputs, n).clone().requires_grad_() for n in names]
    assert torch.autograd.gradcheck(
        lambda *t: op_named(op)(*inputs._replace(**dict(zip(names, t)))), leaves, fast_mode=True
    )


@each_differentiable_op
@pytest.mark.parametrize("use_reentrant", (False, True))
def test_gradients_under_checkpoint_are_those_without(op, use_reentrant):
    inputs = example(op)
    names = list(floating(inputs))

    def gradients(call):
        leaves = [getattr(inputs, n).clone().requires_grad_() for n in names]
        out = call(lambda *t: op_named(op)(*inputs._replace(**dict(zip(names, t)))), *leaves)
        sum(o.square().sum() for o in listed(out)).backward()
        return [leaf.grad for leaf in leaves]

    wanted = gradients(lambda f, *t: f(*t))
    for grad, want in zip(gradients(lambda f, *t: checkpoint(f, *t, use_reentrant=use_reentrant)), wanted):
        assert_bitwise(grad, want, op)


def test_python_functions_compile_without_graph_breaks():
    q, k, v, g, beta, state, rows, *_ = example("recurrent_gated_delta_rule")

    def calls(q, pool):
        o = jetkernels.fused_recurrent_gated_delta_rule(
            q, k, v, g, beta, initial_state=state[:3], output_final_state=True
        )
        return o, jetkernels.recurrent_gated_delta_rule_(q, k, v, g, beta, pool, rows)

    pools = state.clone(), state.clone()
    with torch.no_grad():
        expected = calls(q, pools[0])
        found = torch.compile(calls, fullgraph=True, backend="aot_eager")(q, pools[1])
    assert_bitwise(found[1], expected[1], "o")
    assert_bitwise(found[0][1], expected[0][1], "state")
    assert_bitwise(pools[1], pools[0], "pool")
    assert pools[1]._version > 0
    with pytest.raises(Exception, match="requires a gradient"):
        torch.compile(calls, fullgraph=True, backend="aot_eager")(q.clone().requires_grad_(), pools[1])
