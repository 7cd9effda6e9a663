"""What only a GPU can show of the ops: streams, devices, graphs, compilation, autograd across backends."""

import pytest
import torch
from support.arguments import (
    NORM_OPS,
    apply_inputs,
    attention_call,
    block_step_call,
    conv_inputs,
    cotangents,
    delta_inputs,
    gates_inputs,
    norm_inputs,
    recurrent_call,
    step_call,
    swiglu_inputs,
)
from support.comparison import assert_bitwise, rms_error
from support.device_backends import has_hopper
from support.shapes import AttentionShape, ConvShape, DeltaShape

import jetkernels

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not has_hopper(), reason="needs a GPU of compute capability 9.0")]
BF16 = torch.bfloat16


def on_gpu(arguments):
    return [t.cuda() if isinstance(t, torch.Tensor) else t for t in arguments]


TOKENS, CHANNELS = DeltaShape("", B=2, T=200, Hk=2, H=4, K=96, V=256), ConvShape("", B=2, T=300, D=512, R=64)
CALLS = {
    "recurrent_gated_delta_rule": lambda: recurrent_call(TOKENS._replace(B=4, T=2), BF16, rows=(2, 0, 3, 1)),
    "dynamic_conv_step": lambda: step_call(CHANNELS._replace(B=4), BF16),
    "dynamic_conv": lambda: conv_inputs(CHANNELS, BF16),
    "apply_dynamic_conv": lambda: apply_inputs(CHANNELS, BF16),
    "chunk_gated_delta_rule": lambda: delta_inputs(TOKENS, BF16),
    "jet_block_step": lambda: block_step_call(3, 4, 96, 256, 64, dtype=BF16, state_dtype=torch.float32, rows=(2, 0, 3)),
    "attention_step": lambda: attention_call(AttentionShape("", (700, 0, 5), 12, 2, 128, 1024), BF16, dirty=False),
    **{op: lambda op=op: norm_inputs(op, 5, 4, 256, dtype=BF16) for op in NORM_OPS},
    "swiglu": lambda: swiglu_inputs(5, 8960, dtype=BF16),
    "delta_gates": lambda: gates_inputs(70, 12, dtype=BF16),
}
# ops whose backward has a kernel too
CALLS |= {
    f"{op}_backward": lambda forward=CALLS[op]: (*cotangents(forward()), *forward())
    for op in (*NORM_OPS, "swiglu", "delta_gates", "chunk_gated_delta_rule", "dynamic_conv", "apply_dynamic_conv")
}
each_op = pytest.mark.parametrize("name", CALLS)


def call(name, arguments):
    """All that the op returns or writes."""
    arguments = [t.clone() if isinstance(t, torch.Tensor) else t for t in arguments]
    out = getattr(torch.ops.jet, name)(*arguments)
    schema = getattr(torch.ops.jet, name).default._schema
    written = [t for t, a in zip(arguments, schema.arguments) if a.alias_info is not None and a.alias_info.is_write]
    return [*([out] if isinstance(out, torch.Tensor) else out), *written]


@each_op
def test_a_graph_replays_what_a_call_does(name):
    arguments = on_gpu(CALLS[name]())
    expected = call(name, arguments)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        call(name, arguments)
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        captured = call(name, arguments)
    for out in captured:
        out.fill_(float("nan"))
    for _ in range(2):
        graph.replay()
    torch.cuda.synchronize()
    for out, ref in zip(captured, expected):
        assert_bitwise(out.cpu(), ref.cpu(), name)


@each_op
def test_the_current_stream_is_used(name):
    """The inputs come late on a side stream: a launch on another stream would not see them."""
    arguments = on_gpu(CALLS[name]())
    expected = call(name, arguments)
    late = [
        torch.full_like(t, float("nan")) if isinstance(t, torch.Tensor) and t.is_floating_point() else t
        for t in arguments
    ]
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda._sleep(50_000_000)
        for t, source in zip(late, arguments):
            if isinstance(t, torch.Tensor) and t.is_floating_point():
                t.copy_(source)
        outs = call(name, late)
    torch.cuda.synchronize()
    for out, ref in zip(outs, expected):
        assert_bitwise(out.cpu(), ref.cpu(), name)


@each_op
def test_a_side_device_is_used(name):
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    arguments = on_gpu(CALLS[name]())
    expected = call(name, arguments)
    there = [t.to("cuda:1") if isinstance(t, torch.Tensor) else t for t in arguments]
    for out, ref in zip(call(name, there), expected):
        assert out.device.index == 1
        assert_bitwise(out.cpu(), ref.cpu(), name)
    assert torch.cuda.current_device() == 0


@each_op
def test_opcheck(name):
    torch.library.opcheck(getattr(torch.ops.jet, name).default, tuple(on_gpu(CALLS[name]())))


@each_op
def test_no_host_synchronisation(name):
    arguments = on_gpu(CALLS[name]())
    call(name, arguments)
    torch.cuda.set_sync_debug_mode("error")
    try:
        getattr(torch.ops.jet, name)(*arguments)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_compiled_equals_eager():
    x, hidden, weight, bias, *_ = on_gpu(CALLS["dynamic_conv"]())

    def function(x, hidden):
        y, _ = jetkernels.dynamic_conv(x, hidden, weight, bias)
        return y * 2

    compiled = torch.compile(function, fullgraph=True)
    assert_bitwise(compiled(x, hidden).cpu(), function(x, hidden).cpu())


def test_autocast_takes_the_kernel():
    x, hidden, weight, bias, *_ = (
        t.float() if isinstance(t, torch.Tensor) else t for t in on_gpu(CALLS["dynamic_conv"]())
    )
    with torch.autocast("cuda", BF16):
        y, _ = jetkernels.dynamic_conv(x, hidden, weight, bias)
    expected, _ = jetkernels.dynamic_conv(*(t.to(BF16) for t in (x, hidden, weight, bias)))
    assert_bitwise(y.cpu(), expected.cpu())


def test_gradients_flow_through_the_forward_kernels():
    """And through those of the backward, as the CPU's."""
    arguments = conv_inputs(ConvShape("", B=1, T=130, D=64, R=64, state=False), BF16)
    leaves = [t.clone().requires_grad_() for t in arguments[:4]]
    y, _ = jetkernels.dynamic_conv(*leaves)
    y.square().sum().backward()
    here = [t.cuda().requires_grad_() for t in arguments[:4]]
    y, _ = jetkernels.dynamic_conv(*here)
    y.square().sum().backward()
    for leaf, there in zip(leaves, here):
        assert rms_error(there.grad.cpu(), leaf.grad) < 1e-2


def test_peak_memory_of_a_prefill_has_no_generated_kernels():
    B, T, D, R, W = 8, 2048, 1024, 128, 4
    x, hidden = torch.randn(B, T, D, device="cuda", dtype=BF16), torch.randn(B, T, R, device="cuda", dtype=BF16)
    weight = torch.randn(D * W, R, device="cuda", dtype=BF16)
    jetkernels.dynamic_conv(x[:1, :128], hidden[:1, :128], weight)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    y, _ = jetkernels.dynamic_conv(x, hidden, weight)
    assert torch.cuda.max_memory_allocated() - before <= y.numel() * 2 + B * D * (W - 1) * 2 + (1 << 20)
