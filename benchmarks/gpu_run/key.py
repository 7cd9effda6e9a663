"""The times that decide, each beside a peer in the same process: ceilings first, then a process per op."""

from functools import cache

import torch
import torch.nn.functional as F

from benchmarks import measure, ops, peers
from benchmarks.floors import H200, Ceilings
from benchmarks.gpu_run.supervisor import Job
from benchmarks.ops import BF16, FP32, Case
from benchmarks.rows import Rows
from benchmarks.shapes import SHAPES, Draw
from benchmarks.timing import device_time, l2_bytes, rotations

CEILINGS = "ceilings"
KERNELS = " / kernels"  # the launches of a call one by one
PEER = " / peer"
CHUNKS = ((1, 8192), (8, 4096), (1, 32768))
ROWS = (1, 64, 256, 8)
STEPS = (1, 128)
ATTENTION = ((1, 65536), (16, 4096), (128, 4096))
PROFILED_CALLS = 10
PLAIN = "plain PyTorch"
PEERS = {  # of the others PLAIN
    "attention_step": "attention of PyTorch, without rotation and writing",
    "dynamic_conv": "cuBLAS product of the generator",
    "dynamic_conv_step": "cuBLAS product of the generator",
}


def peer_of(op: str) -> str:
    return PEERS.get(op, PLAIN)


@cache
def groups() -> dict[str, list[Case]]:
    """A process each."""
    b2, b4 = SHAPES[:2]
    found = {}
    for shape in (b4, b2):
        found[f"chunk {shape.name}"] = [ops.chunk(shape, B, T) for B, T in CHUNKS]
    for pool in (FP32, BF16):
        found[f"recurrent {ops.NAMES[pool]}"] = [ops.recurrent(shape, n, pool) for shape in (b2, b4) for n in ROWS]
    found["JetBlock step"] = [ops.jet_block_step(shape, n) for shape in (b2, b4) for n in ops.BLOCK_STEP_ROWS]
    found["attention step"] = [ops.attention_step(b2, N, L) for N, L in ATTENTION]
    found["norm of a step"] = [ops.norm("add_rms_norm", b2, n) for n in STEPS]
    found["swiglu of a step"] = [ops.swiglu(b2, n) for n in ops.POINTWISE_ROWS[:2]]
    found["convolution"] = [ops.conv(shape, 1, 8192) for shape in (b2, b4)]
    found["convolution step"] = [ops.conv_step(shape, n) for shape in (b2, b4) for n in STEPS]
    return found


@cache
def cases() -> dict[str, Case]:
    return {case.name: case for group in groups().values() for case in group}


def names_of(group: list[Case]) -> tuple[str, ...]:
    """All times first, then what stands beside them."""
    ours = [case.name for case in group]
    launches = [name + KERNELS for name in ours if name.startswith("chunk")]
    return tuple(ours + launches + [name + PEER for name in ours])


def describe() -> list[str]:
    return [
        measure.CEILINGS,
        *(
            f"{name}: {', '.join(case.name for case in group)}; beside {peer_of(group[0].op)}"
            for name, group in groups().items()
        ),
    ]


def jobs(settings: dict) -> list[Job]:
    return [Job(CEILINGS, (CEILINGS,)), *(Job(name, names_of(group)) for name, group in groups().items())]


def measure_ceilings(context) -> dict[str, object]:
    """Without the library there is still a copy and a product."""
    rows = Rows()
    try:
        measure.measure_ceilings(rows, context.device)
    except ImportError as error:
        print(f"no empty launch: {error}")
    by_op = {row["op"]: row for row in rows.rows}
    found = {"gb_per_s": by_op["copy"]["gb_per_s"], "tflop_per_s": by_op["bf16 product"]["tflop_per_s"]}
    return found | ({"us": by_op["empty launch"]["us"]} if "empty launch" in by_op else {})


def ceilings(context) -> tuple[Ceilings, float, str]:
    """(ceilings, seconds of an empty launch, whose they are)."""
    row = context.known(CEILINGS, "key")
    if "gb_per_s" not in row:
        return H200, 0.0, "floor by an H200's ceilings"
    return Ceilings(row["gb_per_s"] * 1e9, row["tflop_per_s"] * 1e12), row.get("us", 0.0) * 1e-6, ""


def measured(case: Case, context) -> dict[str, object]:
    from jetkernels import ops as _  # noqa: F401  (registers torch.ops.jet)

    found, empty, note = ceilings(context)
    row = measure.measure_case(case, context.device, found, empty)
    return {**row, "note": note} if note else row


def kernel_name(demangled: str) -> str:
    """The plain name in a demangled one."""
    text = demangled.replace("(anonymous namespace)", "")
    for bracket in "<(":
        text = text.partition(bracket)[0]
    return text.split("::")[-1].split(" ")[-1]


def per_kernel(events) -> dict[str, float]:
    """Name -> us a call, of the kernels that the profiler saw in PROFILED_CALLS calls."""
    found: dict[str, float] = {}
    for event in events:
        if event.device_type == torch.autograd.DeviceType.CUDA and "mem" not in event.key.lower()[:6]:
            name = kernel_name(event.key)
            found[name] = found.get(name, 0.0) + event.self_device_time_total / PROFILED_CALLS
    return found


def launches(case: Case, context) -> dict[str, object]:
    """The time of each kernel of a call. Kernels that overlap by programmatic launch are each counted whole."""
    from torch.profiler import ProfilerActivity, profile

    op = ops.function(case.op)
    sets = [
        case.make(Draw(context.device, seed=2 + i)) for i in range(rotations(case.work.bytes, l2_bytes(context.device)))
    ]
    for args in sets[:2]:
        op(*args)
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        for i in range(PROFILED_CALLS):
            op(*sets[i % len(sets)])
        torch.cuda.synchronize()
    found = per_kernel(profiler.key_averages())
    if not found:
        raise RuntimeError("the profiler saw no kernel on the device")
    return {"kernels": {name: round(us, 2) for name, us in found.items()}}


def peer_call(case: Case, args: tuple):
    """A call of what stands beside an op, on the same arguments."""
    if case.op in ("dynamic_conv", "dynamic_conv_step"):
        return lambda: peers.generator_gemm(*args[:4])
    if case.op == "attention_step":
        q, key, value = args[0][:, :, None], *args[5:7]
        return lambda: F.scaled_dot_product_attention(q, key, value, enable_gqa=True)
    plain = ops.plain_function(case.op)
    return lambda: plain(*args)


def peer(case: Case, context) -> dict[str, object]:
    if peer_of(case.op) == PLAIN:
        from jetkernels import ops as _  # noqa: F401  (registers torch.ops.jet_plain)
    sets = [
        case.make(Draw(context.device, seed=2 + i)) for i in range(rotations(case.work.bytes, l2_bytes(context.device)))
    ]
    timing = device_time([peer_call(case, args) for args in sets], seconds=0.1)
    ours = context.known(case.name).get("us")
    row = {"peer": peer_of(case.op), **measure.timing_row(timing), "ours_us": ours}
    return row | ({"times_ours": row["us"] / ours} if ours else {})


def work(name: str, context) -> dict[str, object]:
    if name == CEILINGS:
        return measure_ceilings(context)
    case = cases()[name.partition(" / ")[0]]
    if name.endswith(KERNELS):
        return launches(case, context)
    return peer(case, context) if name.endswith(PEER) else measured(case, context)
