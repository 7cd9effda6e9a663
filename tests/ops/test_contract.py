"""What callers rely on besides the numbers: opcheck, torch.compile, autocast, output dtypes, the Python signatures."""

import inspect
from typing import NamedTuple

import pytest
import torch
from support.arguments import (
    ALL_OPS,
    IN_PLACE_OPS,
    ApplyInputs,
    ConvInputs,
    DeltaInputs,
    StepCall,
    accumulator,
    conv_inputs,
    cotangents,
    delta_inputs,
    example,
    floating,
    inputs_of,
    results_of,
)
from support.comparison import DTYPES, assert_bitwise, assert_error
from support.shapes import ConvShape, DeltaShape, ids
from torch import Tensor

import jetkernels
from jetkernels.ops._register import defined

BF16, F32, F64 = torch.bfloat16, torch.float32, torch.float64
DELTA = DeltaShape("rows, GVA, initial state", B=2, T=67, K=4, V=3)
DELTA_PACKED = DeltaShape("packed, no initial state", T=9, K=4, V=3, cu_seqlens=(0, 0, 4, 9), state=False, l2norm=False)
CONV = ConvShape("rows, bias, state", T=5)
CONV_PACKED = ConvShape(
    "packed, no bias, no state", B=1, T=9, cu_seqlens=(0, 0, 4, 9), bias=False, state=False, silu=False
)
SHAPES = {
    "chunk_gated_delta_rule": (DELTA, DELTA_PACKED),
    "dynamic_conv": (CONV, CONV_PACKED),
    "apply_dynamic_conv": (CONV, CONV_PACKED),
}
each_sequence_op = pytest.mark.parametrize(
    "op, shape",
    [(op, shape) for op, shapes in SHAPES.items() for shape in shapes],
    ids=lambda x: x if isinstance(x, str) else x.reason,
)
each_pool_op = pytest.mark.parametrize("op", IN_PLACE_OPS)


# ---- opcheck: schema, autograd registration, fake kernel, AOT dispatch with dynamic shapes


@each_sequence_op
@pytest.mark.parametrize("differentiable", (False, True), ids=("inference", "training"))
def test_opcheck(op, shape, differentiable):
    inputs = inputs_of(op, shape)
    if differentiable:
        inputs = inputs._replace(**{name: t.requires_grad_() for name, t in floating(inputs).items()})
    torch.library.opcheck(getattr(torch.ops.jet, op).default, tuple(inputs))


@each_sequence_op
@pytest.mark.parametrize("state_gradient", (True, False), ids=("state gradient", "no state gradient"))
def test_opcheck_of_the_backward(op, shape, state_gradient):
    inputs = inputs_of(op, shape)
    grads = cotangents(inputs)
    grads = grads if state_gradient else (grads[0], None)
    torch.library.opcheck(getattr(torch.ops.jet, op + "_backward").default, (*grads, *inputs))


@pytest.mark.parametrize("indexed", (True, False), ids=("indices", "rows in order"))
@each_pool_op
def test_opcheck_of_the_ops_in_place(op, indexed):
    torch.library.opcheck(getattr(torch.ops.jet, op).default, tuple(example(op, indexed=indexed)))


# ---- torch.compile


@pytest.mark.parametrize("dynamic", (False, True), ids=("static shapes", "dynamic shapes"))
@each_sequence_op
def test_compiles_without_graph_breaks(op, shape, dynamic):
    inputs = inputs_of(op, shape)
    names, grads = list(floating(inputs)), cotangents(inputs)

    def call(*leaves: Tensor):
        return getattr(torch.ops.jet, op)(*inputs._replace(**dict(zip(names, leaves))))

    results = []
    for function in (call, torch.compile(call, fullgraph=True, dynamic=dynamic, backend="aot_eager")):
        leaves = [getattr(inputs, name).clone().requires_grad_() for name in names]
        outs = function(*leaves)
        results.append((*outs, *torch.autograd.grad(outs, leaves, grads)))
    for name, eager, compiled in zip(("output", "state", *names), *results):
        assert_bitwise(compiled, eager, name)


@each_pool_op
def test_ops_in_place_compile_without_graph_breaks(op):
    function = getattr(torch.ops.jet, op)
    args = example(op)
    again = tuple(t.clone() if isinstance(t, Tensor) else t for t in args)
    eager, compiled = (
        function(*args),
        torch.compile(lambda *a: function(*a), fullgraph=True, backend="aot_eager")(*again),
    )
    for a, b in zip((eager, *args), (compiled, *again)):
        if isinstance(a, Tensor):
            assert_bitwise(b, a, "output or argument")


def test_inductor_compiles_a_layer_of_ops():
    """Convolution, delta rule and a state pool in one graph, forward and backward."""
    conv = conv_inputs(ConvShape("", B=2, T=5, D=24), F32)
    delta = delta_inputs(DeltaShape("", B=2, T=5), F32)

    def layer(x: Tensor, q: Tensor, pool: Tensor):
        v, _ = jetkernels.dynamic_conv(x, conv.hidden * 2, conv.weight, conv.bias)
        v = v.unflatten(-1, (2, 12))
        o, S = jetkernels.chunk_gated_delta_rule(q, delta.k, v, delta.g, delta.beta, output_final_state=True)
        with torch.no_grad():
            last = [t[:, :1].detach().contiguous() for t in (q, delta.k, v, delta.g, delta.beta)]
            step = jetkernels.recurrent_gated_delta_rule_(*last, pool)
        return o.tanh() + step, S

    results = []
    for function in (layer, torch.compile(layer, fullgraph=True)):
        x, q, pool = conv.x.clone().requires_grad_(), delta.q.clone().requires_grad_(), delta.initial_state.clone()
        o, S = function(x, q, pool)
        results.append((o, S, pool, *torch.autograd.grad((o.sum() + S.sum()), (x, q))))
    for name, eager, compiled in zip(("o", "final_state", "pool", "dx", "dq"), *results):
        assert_error(name, compiled, eager, 1e-6)


# ---- autocast


@each_sequence_op
def test_autocast_of_ops_over_sequences(op, shape):
    """Activations and weights go to bf16; g and the delta rule's state stay fp32; gradients come back in fp32."""
    inputs = inputs_of(op, shape)
    keep = ("g", "beta", "initial_state")
    cast = inputs._replace(**{name: t.to(BF16) for name, t in floating(inputs).items() if name not in keep})
    expected = getattr(torch.ops.jet, op)(*cast)
    leaves = {name: t.clone().requires_grad_() for name, t in floating(inputs).items()}
    with torch.autocast("cpu", BF16):
        outs = getattr(torch.ops.jet, op)(*inputs._replace(**leaves))
        doubles = getattr(torch.ops.jet, op)(*inputs_of(op, shape, F64))
    for out, ref in zip(outs, expected):
        assert_bitwise(out, ref, op)
    assert all(out.dtype == F64 for out in doubles)
    sum(out.float().sum() for out in outs).backward()
    assert all(leaf.grad is not None and leaf.grad.dtype == F32 for leaf in leaves.values())


def low(call: NamedTuple) -> NamedTuple:
    """What autocast makes of q, k and v."""
    return call._replace(q=call.q.to(BF16), k=call.k.to(BF16), v=call.v.to(BF16))


def test_autocast_of_ops_in_place():
    """The pool is written in place, so it keeps its dtype; the convolution's decides that of its step."""
    call = example("recurrent_gated_delta_rule")
    again = low(call)._replace(state=call.state.clone())
    expected = torch.ops.jet.recurrent_gated_delta_rule(*again)
    with torch.autocast("cpu", BF16):
        assert_bitwise(torch.ops.jet.recurrent_gated_delta_rule(*call), expected, "o")
    assert_bitwise(call.state, again.state, "pool")
    call = example("recurrent_gated_delta_rule_verify")
    again = low(call)._replace(keys=call.keys.clone(), updates=call.updates.clone())
    expected = torch.ops.jet.recurrent_gated_delta_rule_verify(*again)
    with torch.autocast("cpu", BF16):
        assert_bitwise(torch.ops.jet.recurrent_gated_delta_rule_verify(*call), expected, "o of verify")
        torch.ops.jet.recurrent_gated_delta_rule_commit(*example("recurrent_gated_delta_rule_commit"))
    for name in ("keys", "updates"):
        assert_bitwise(getattr(call, name), getattr(again, name), name)
    for dtype in (F32, BF16):
        call = example("dynamic_conv_step", dtype)
        mixed = StepCall(*(t.to(F32) for t in call[:4]), *call[4:])
        again = call._replace(conv_state=call.conv_state.clone())
        with torch.autocast("cpu", BF16):
            y = torch.ops.jet.dynamic_conv_step(*mixed)
        assert_bitwise(y, torch.ops.jet.dynamic_conv_step(*again), "y")
        assert_bitwise(mixed.conv_state, again.conv_state, "conv_state")


# ---- dtypes, gradients, signatures


@pytest.mark.parametrize("dtype", DTYPES, ids=ids)
@each_sequence_op
def test_dtypes_and_shapes_of_outputs_and_gradients(op, shape, dtype):
    inputs = inputs_of(op, shape, dtype)
    grads = cotangents(inputs)
    out, state = getattr(torch.ops.jet, op)(*inputs)
    for result, (expected_shape, expected_dtype) in zip((out, state), results_of(inputs)):
        assert (result.shape, result.dtype) == (expected_shape, expected_dtype) and result.is_contiguous()
    found = getattr(torch.ops.jet, op + "_backward")(*grads, *inputs)
    for name, value, grad in zip(inputs._fields, inputs, found):
        if value is not None:
            assert (grad.dtype, grad.shape) == (value.dtype, value.shape) and grad.is_contiguous(), name
    assert found[-1].shape == grads[1].shape, "the state's gradient exists even without a state"
    assert len(found) == {DeltaInputs: 6, ConvInputs: 5, ApplyInputs: 3}[type(inputs)]


@each_sequence_op
def test_autograd_equals_the_backward_op(op, shape):
    inputs = inputs_of(op, shape)
    grads = cotangents(inputs)
    leaves = {name: t.requires_grad_() for name, t in floating(inputs).items()}
    outs = getattr(torch.ops.jet, op)(*inputs)
    found = torch.autograd.grad(outs, list(leaves.values()), grads)
    with torch.no_grad():
        direct = dict(zip(inputs._fields, getattr(torch.ops.jet, op + "_backward")(*grads, *inputs)))
    for name, grad in zip(leaves, found):
        assert_bitwise(grad, direct[name], name)


@each_sequence_op
def test_only_what_asks_for_a_gradient_gets_one(op, shape):
    inputs = inputs_of(op, shape)
    for name, t in floating(inputs).items():
        leaf = t.clone().requires_grad_()
        out, state = getattr(torch.ops.jet, op)(*inputs._replace(**{name: leaf}))
        assert out.requires_grad and state.requires_grad
        assert torch.autograd.grad(out.sum() + state.sum(), leaf)[0].shape == leaf.shape, name


GATED_DELTA_RULE = (
    "q, k, v, g=None, beta=None, scale=None, initial_state=None, output_final_state=False, "
    "use_qk_l2norm_in_kernel=False, cu_seqlens=None, state_v_first=False, use_gate_in_kernel=False, A_log=None, "
    "dt_bias=None, use_beta_sigmoid_in_kernel=False, allow_neg_eigval=False, cu_seqlens_cpu=None, chunk_indices=None, "
    "chunk_size=64, autotune_interval=None, use_cache=None, transpose_state_layout=None, gk=None, gv=None, "
    "cp_context=None"
)
GATES = "use_gate_in_kernel=False, A_log=None, dt_bias=None, use_beta_sigmoid_in_kernel=False, allow_neg_eigval=False"
SIGNATURES = {
    "chunk_gated_delta_rule": GATED_DELTA_RULE,
    "fused_recurrent_gated_delta_rule": GATED_DELTA_RULE,
    "prefill_gated_delta_rule_": "q, k, v, g, beta, state, cu_seqlens, state_indices=None, has_initial_state=None, "
    "mark_tokens=None, mark_indices=None, scale=None, use_qk_l2norm_in_kernel=False, " + GATES,
    "recurrent_gated_delta_rule_": "q, k, v, g, beta, state, state_indices=None, scale=None, "
    "use_qk_l2norm_in_kernel=False, " + GATES,
    "recurrent_gated_delta_rule_verify": "q, k, v, g, beta, state, keys, updates, state_indices=None, scale=None, "
    "use_qk_l2norm_in_kernel=False",
    "recurrent_gated_delta_rule_commit_": "keys, updates, g, num_accepted, state, state_indices=None",
    "dynamic_conv": "x, hidden, weight, bias=None, conv_state=None, cu_seqlens=None, activation='silu', "
    "output_final_state=False",
    "dynamic_conv_step_": "x, hidden, weight, bias, conv_state, state_indices=None, activation='silu'",
    "jet_block_step_": "q, k, v, hidden, a, b, gate, weight, bias, A_log, dt_bias, norm_weight, conv_state, state, "
    "state_indices=None, scale=None, eps=1e-05",
    "attention_step_": "q, k, v, cos, sin, key, value, lengths, scale=None",
    "rms_norm": "x, weight, eps=1e-06",
    "add_rms_norm": "x, residual, weight, eps=1e-06",
    "gated_rms_norm": "x, gate, weight, eps=1e-05",
    "swiglu": "gate, up",
    "delta_gates": "a, b, A_log, dt_bias",
    "linear": "x, weight, bias=None",
    "linear_int8": "x, weight, scale, bias=None",
    "linear_int4": "x, weight, scale, bias=None",
}


@pytest.mark.parametrize("name", SIGNATURES)
def test_python_signatures(name):
    parameters = inspect.signature(getattr(jetkernels, name)).parameters.values()
    text = ", ".join(p.name if p.default is p.empty else f"{p.name}={p.default!r}" for p in parameters)
    assert text == SIGNATURES[name]


def test_python_functions_translate_their_arguments():
    q, k, v, g, beta, S, _, _, _ = delta_inputs(DELTA, F32)
    o, none = jetkernels.chunk_gated_delta_rule(q, k, v, g, beta)
    assert none is None
    assert_bitwise(
        o, torch.ops.jet.chunk_gated_delta_rule(q, k, v, g, beta, None, None, 4**-0.5, False)[0], "scale=None"
    )
    outs = jetkernels.chunk_gated_delta_rule(q, k, v, g, beta, 0.3, S, True, True)
    for out, ref in zip(outs, torch.ops.jet.chunk_gated_delta_rule(q, k, v, g, beta, S, None, 0.3, True)):
        assert_bitwise(out, ref, "scale, state, l2norm")
    call = example("recurrent_gated_delta_rule")
    again = call._replace(state=call.state.clone())
    assert_bitwise(
        jetkernels.recurrent_gated_delta_rule_(*call[:7], use_qk_l2norm_in_kernel=True),
        torch.ops.jet.recurrent_gated_delta_rule(*again),
        "recurrent",
    )
    x, hidden, weight, bias, state, _, _ = conv_inputs(CONV, F32)
    for activation, silu in (("silu", True), ("swish", True), (None, False)):
        y, none = jetkernels.dynamic_conv(x, hidden, weight, bias, state, activation=activation)
        assert none is None
        assert_bitwise(y, torch.ops.jet.dynamic_conv(x, hidden, weight, bias, state, None, silu)[0], str(activation))
    with pytest.raises(ValueError, match="activation must be 'silu'"):
        jetkernels.dynamic_conv(x, hidden, weight, activation="relu")


@pytest.mark.parametrize("op", ALL_OPS)
def test_named_tuples_of_the_tests_have_the_names_of_the_schema(op):
    schema = getattr(torch.ops.jet, op).default._schema
    assert list(ALL_OPS[op]._fields) == [argument.name for argument in schema.arguments]


def test_schemas_have_no_string_and_only_positional_tensors():
    """A str argument leaks memory on every call."""
    for op in defined:
        for argument in getattr(torch.ops.jet, op).default._schema.arguments:
            assert "str" not in str(argument.type) and not argument.kwarg_only, f"{op}: {argument}"


def test_state_dtype_is_the_dtype_of_the_arithmetic():
    for dtype in DTYPES:
        inputs = delta_inputs(DELTA._replace(state=False), dtype)
        assert torch.ops.jet.chunk_gated_delta_rule(*inputs)[1].dtype == accumulator(dtype)
