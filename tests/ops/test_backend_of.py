"""``jetkernels.backend_of``: it asks the place that decides, and nothing is run."""

import ctypes
import os
import subprocess
import sys
import threading
import warnings
from typing import NamedTuple

import pytest
import torch
from support.arguments import (
    DIFFERENTIABLE_OPS,
    LINEAR_OPS,
    NORM_OPS,
    POINTWISE_OPS,
    SEQUENCE_OPS,
    attention_call,
    block_step_call,
    call_of,
    cotangents,
    example,
    gates_inputs,
    inputs_of,
    linear_inputs,
    norm_inputs,
    prefill_call,
    swiglu_inputs,
)
from support.device_backends import EARLY, has_hopper, hoppersim, simulated
from support.jet_sim import build
from support.shapes import AttentionShape, ConvShape, DeltaShape
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

import jetkernels
from jetkernels import _library
from jetkernels.ops._register import defined

FORWARD = [op for op in defined if not op.endswith("_backward")]
BACKWARD = [op for op in defined if op.endswith("_backward")]
REFUSING = [op for op in FORWARD if op not in DIFFERENTIABLE_OPS]
DIFFERENTIABLE = [op for op in defined if op not in REFUSING]
NOT_TAKEN = "no kernel takes this shape or dtype"
each_op = pytest.mark.parametrize("op", defined)


def schema(op: str):
    return getattr(torch.ops.jet, op).default._schema


def call(op: str, dtype: torch.dtype, H: int, K: int, V: int, D: int, R: int) -> NamedTuple:
    if op == "jet_block_step":
        return block_step_call(2, H, K, V, R, dtype=dtype)
    if op == "attention_step":
        return attention_call(AttentionShape("", (5, 0), 2 * H, H, 2 * V, 12), dtype, dirty=False)
    if op in NORM_OPS:
        return norm_inputs(op, 3, D, dtype=dtype)
    if op in LINEAR_OPS:
        return linear_inputs(op, 3, 2 * D, P=R, dtype=dtype)
    if op in POINTWISE_OPS:
        return swiglu_inputs(3, D, dtype=dtype) if op == "swiglu" else gates_inputs(3, H, dtype=dtype)
    if op == "prefill_gated_delta_rule":
        return prefill_call(DeltaShape("", 1, 3, 1, H, K, V, (0, 2, 3)), dtype)
    shape = DeltaShape("", 2, 3, 1, H, K, V) if "delta" in op else ConvShape("", 2, 3, D, R)
    return (inputs_of if op in SEQUENCE_OPS else call_of)(op, shape, dtype)


def arguments(op: str, dtype=torch.bfloat16, device="cpu", H=2, K=64, V=32, D=16, R=8) -> list:
    """Arguments of ``op``, or of its backward."""
    forward = op.removesuffix("_backward")
    args = call(forward, dtype, H, K, V, D, R)
    args = (*cotangents(args), *args) if op != forward else args
    return [a.to(device) if isinstance(a, Tensor) else a for a in args]


def python(script: str, **environment: str) -> str:
    return subprocess.run(
        [sys.executable, "-W", "error::UserWarning", "-c", script],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), **environment},
        capture_output=True,
        text=True,
        check=True,
    ).stdout


@each_op
def test_a_cpu_tensor_is_served_by_the_cpu_code(op):
    expected = jetkernels.Backend("cpu", _library.build_info()["cpu_isa"])
    packet = getattr(torch.ops.jet, op)
    args = arguments(op)
    assert jetkernels.backend_of(op, *args) == expected
    assert jetkernels.backend_of(packet, *args) == jetkernels.backend_of(packet.default, *args) == expected
    assert jetkernels.backend_of(op, *arguments(op, torch.float64, K=5, V=3, D=7, R=3)) == expected


@pytest.mark.parametrize("op, requires_grad", [(op, False) for op in defined] + [(op, True) for op in DIFFERENTIABLE])
def test_nothing_is_written(op, requires_grad):
    args = arguments(op)
    tensors = [a.requires_grad_(requires_grad) for a in args if isinstance(a, Tensor) and a.is_floating_point()]
    before = [(t.detach().clone(), t._version) for t in tensors]
    jetkernels.backend_of(op, *args)
    for t, (values, version) in zip(tensors, before):
        assert torch.equal(t, values) and t._version == version
    if not op.endswith("_backward"):
        getattr(torch.ops.jet, op)(*args)  # what was asked before does not end it


@pytest.mark.parametrize(
    "environment, expected",
    (
        ({"JETKERNELS_BACKEND": "plain"}, ("plain", "JETKERNELS_BACKEND=plain asks for it")),
        ({"JETKERNELS_CPU_ISA": "generic"}, ("cpu", "generic")),
    ),
)
def test_what_the_environment_asks_for(environment, expected):
    script = """if True:
        import jetkernels
        from ops.test_backend_of import arguments, defined
        print({tuple(jetkernels.backend_of(op, *arguments(op))) for op in defined})
    """
    assert python(script, **environment).strip() == str({expected})


def test_without_value_heads_verify_is_plain_as_its_call_says():
    args = arguments("recurrent_gated_delta_rule_verify", H=0)
    assert jetkernels.backend_of("recurrent_gated_delta_rule_verify", *args) == ("plain", NOT_TAKEN)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        jetkernels.ops._register._announced.clear()
        torch.ops.jet.recurrent_gated_delta_rule_verify(*args)
    assert [str(w.message) for w in caught if NOT_TAKEN in str(w.message)]


@each_op
def test_wrong_arguments_are_refused_with_the_sentence_of_the_op(op):
    args = arguments(op)
    for place, argument in enumerate(schema(op).arguments):
        if not isinstance(args[place], Tensor):
            continue
        wrong = [*args[:place], args[place][(None,) * 9], *args[place + 1 :]]
        with pytest.raises(RuntimeError, match=f"^{op}: {argument.name} ") as asked:
            jetkernels.backend_of(op, *wrong)
        with pytest.raises(RuntimeError) as called:
            getattr(torch.ops.jet, op)(*wrong)
        assert str(asked.value) == str(called.value)
    with pytest.raises(RuntimeError, match="Expected a value of type"):
        jetkernels.backend_of(op, 1, *args[1:])


@pytest.mark.parametrize("op", REFUSING)
def test_a_gradient_that_the_op_refuses_is_refused(op):
    args = arguments(op)
    args[0] = args[0].requires_grad_()
    with pytest.raises(RuntimeError, match="requires a gradient, and this op is not differentiable"):
        jetkernels.backend_of(op, *args)


@each_op
def test_tensors_without_data_are_refused(op):
    first = schema(op).arguments[0].name
    with pytest.raises(RuntimeError, match=f"^{op}: backend_of needs tensors that hold data, got {first} on meta"):
        jetkernels.backend_of(op, *arguments(op, device="meta"))
    with FakeTensorMode(), pytest.raises(RuntimeError, match=f"^{op}: backend_of needs tensors that hold data"):
        jetkernels.backend_of(op, *arguments(op))


@pytest.mark.parametrize("op", ("softmax", "jet::dynamic_conv", torch.ops.aten.add, torch.ops.aten.add.Tensor))
def test_other_ops_are_refused(op):
    with pytest.raises(ValueError, match="^backend_of: op must be a name .*dynamic_conv"):
        jetkernels.backend_of(op, torch.ones(1))


def test_only_the_thread_that_asks_is_asked():
    args, results = arguments("apply_dynamic_conv"), []

    def another_thread_calls():
        thread = threading.Thread(target=lambda: results.append(torch.ops.jet.apply_dynamic_conv(*args)))
        thread.start()
        thread.join()

    assert _library.ask_backend(another_thread_calls) is None
    assert torch.equal(results[0][0], torch.ops.jet.apply_dynamic_conv(*args)[0])


# ---- Hopper kernels

KERNELS = [op for op in FORWARD if op not in LINEAR_OPS]
TAKEN = {op: ({}, {"H": 4, "V": 64, "D": 32}) for op in KERNELS}
CHUNK_LEFT = ({"K": 80}, {"V": 24}, {"dtype": torch.float32}, {"dtype": torch.float64})
LEFT = {
    "chunk_gated_delta_rule": CHUNK_LEFT,
    "prefill_gated_delta_rule": CHUNK_LEFT,
    "dynamic_conv": ({"D": 12}, {"R": 4}, {"dtype": torch.float32}),
    "dynamic_conv_step": ({"D": 12}, {"R": 4}, {"dtype": torch.float32}),
    "apply_dynamic_conv": ({"D": 12}, {"dtype": torch.float32}),
    **{op: ({"dtype": torch.float64}, {"D": 8200}, {"D": 8193}) for op in NORM_OPS},
    **{op: ({"dtype": torch.float64},) for op in POINTWISE_OPS},
    "attention_step": ({"V": 48}, {"dtype": torch.float32}),
    "jet_block_step": ({"K": 80}, {"V": 24}, {"R": 4}, {"dtype": torch.float32}),
    **{op: ({"K": 80}, {"V": 24}, {"dtype": torch.float64}) for op in FORWARD if op.startswith("recurrent")},
}


# They take what their forward takes.
BACKWARD_KERNELS = [
    f"{op}_backward"
    for op in (*NORM_OPS, *POINTWISE_OPS, "chunk_gated_delta_rule", "dynamic_conv", "apply_dynamic_conv")
]


def check_hopper(backend_of, device="cpu") -> None:
    for op in (*KERNELS, *BACKWARD_KERNELS):
        forward = op.removesuffix("_backward")
        for sizes in TAKEN[forward]:
            assert backend_of(op, *arguments(op, device=device, **sizes)) == ("hopper", "sm_90a"), (op, sizes)
        for sizes in LEFT[forward]:
            assert backend_of(op, *arguments(op, device=device, **sizes)) == ("plain", NOT_TAKEN), (op, sizes)
    for op in (*LINEAR_OPS, *(op for op in BACKWARD if op not in BACKWARD_KERNELS)):
        no_kernel = ("plain", "this version has no Hopper kernel for it")
        assert backend_of(op, *arguments(op, device=device)) == no_kernel, op


@simulated
@pytest.mark.filterwarnings("ignore:jetkernels")
def test_on_the_simulated_device():
    """The bindings of the simulator's library answer for it, and as its calls do."""
    functions = EARLY.functions
    library = ctypes.CDLL(str(build() / "libjet_sim.so"))

    def backend_of(op: str, *args):
        return tuple(_library.ask_backend(lambda: getattr(functions, op)(*args), library).values())

    check_hopper(backend_of)
    for sizes, launches in (({}, True), ({"D": 12}, False)):
        with hoppersim.simulate():
            functions.apply_dynamic_conv(*arguments("apply_dynamic_conv", **sizes))
            assert bool(hoppersim.launches()) == launches


@pytest.mark.gpu
@pytest.mark.skipif(not has_hopper(), reason="needs a GPU of compute capability 9.0")
def test_on_the_gpu(monkeypatch):
    monkeypatch.setenv("JETKERNELS_FLA", "0")  # what no kernel takes may go there where it is installed
    check_hopper(jetkernels.backend_of, "cuda")


def test_a_traced_graph_does_not_make_the_call():
    call = example("dynamic_conv_step")
    answers = []

    def traced(x):
        answers.append(jetkernels.backend_of("dynamic_conv_step", *call))
        return x + 1

    graph = make_fx(traced)(torch.ones(2))
    assert answers[0].name == jetkernels.backend_of("dynamic_conv_step", *call).name
    assert "dynamic_conv_step" not in graph.code
    with pytest.raises(RuntimeError, match="cannot be traced by torch.jit"):
        torch.jit.trace(traced, torch.ones(2))
