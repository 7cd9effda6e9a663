"""Measure the ops on a CPU, side by side with their peers."""

import torch
from tqdm import tqdm

import jetkernels
from benchmarks import peers
from benchmarks.shapes import Shape, chosen_shapes, conv_inputs, delta_rule_inputs
from benchmarks.timing import Timing, side_by_side

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def chunk(shape: Shape, dtype: torch.dtype, repeats: int) -> dict[str, Timing]:
    inputs = delta_rule_inputs(shape, 1, 2048, dtype)
    options = dict(use_qk_l2norm_in_kernel=True, output_final_state=True)
    peer, _ = peers.transformers_delta_rule()
    return side_by_side(
        {
            "jetkernels": lambda: jetkernels.chunk_gated_delta_rule(**inputs, **options),
            "transformers": lambda: peer(*inputs.values(), **options),
        },
        repeats,
    )


def recurrent(shape: Shape, dtype: torch.dtype, repeats: int) -> dict[str, Timing]:
    inputs = delta_rule_inputs(shape, 8, 1, dtype)
    state = torch.randn(8, shape.H, shape.K, shape.V, generator=torch.Generator().manual_seed(1)) * 0.1
    _, peer = peers.transformers_delta_rule()
    # The peer takes a state and returns a new one; ours updates the pool. Each starts from the same values.
    ours = state.clone()
    return side_by_side(
        {
            "jetkernels": lambda: jetkernels.recurrent_gated_delta_rule_(
                **inputs, state=ours, use_qk_l2norm_in_kernel=True
            ),
            "transformers": lambda: peer(
                *inputs.values(), initial_state=state, output_final_state=True, use_qk_l2norm_in_kernel=True
            ),
        },
        repeats,
        inner=20,
    )


def conv(shape: Shape, dtype: torch.dtype, repeats: int) -> dict[str, Timing]:
    inputs = conv_inputs(shape, 1, 2048, dtype)
    return side_by_side(
        {
            "jetkernels": lambda: jetkernels.dynamic_conv(*inputs),
            "generator GEMM": lambda: peers.generator_gemm(*inputs),
            "unfused torch": lambda: peers.unfused_dynamic_conv(*inputs),
        },
        repeats,
    )


def conv_step(shape: Shape, dtype: torch.dtype, repeats: int) -> dict[str, Timing]:
    x, hidden, weight, bias = conv_inputs(shape, 1, 8, dtype)
    conv_state = torch.zeros(8, shape.D, shape.W - 1, dtype=dtype)
    return side_by_side(
        {
            "jetkernels": lambda: jetkernels.dynamic_conv_step_(x[0], hidden[0], weight, bias, conv_state),
            "generator GEMM": lambda: peers.generator_gemm(x[0], hidden[0], weight, bias),
        },
        repeats,
        inner=5,
    )


def backward(op):
    """Times the gradient alone: the graph is built once and kept."""

    def measure(shape: Shape, dtype: torch.dtype, repeats: int) -> dict[str, Timing]:
        if op == "chunk":
            inputs = [t.requires_grad_() for t in delta_rule_inputs(shape, 1, 2048, dtype).values()]
            forward = {
                "jetkernels": lambda: jetkernels.chunk_gated_delta_rule(*inputs, use_qk_l2norm_in_kernel=True)[0],
                "transformers": lambda: peers.transformers_delta_rule()[0](*inputs, use_qk_l2norm_in_kernel=True)[0],
            }
        else:
            inputs = [t.requires_grad_() for t in conv_inputs(shape, 1, 2048, dtype)]
            forward = {
                "jetkernels": lambda: jetkernels.dynamic_conv(*inputs)[0],
                "unfused torch": lambda: peers.unfused_dynamic_conv(*inputs),
            }
        outputs = {name: function() for name, function in forward.items()}
        return side_by_side(
            {
                name: lambda y=y: torch.autograd.grad(y, inputs, torch.ones_like(y), retain_graph=True)
                for name, y in outputs.items()
            },
            repeats,
            warmup=1,
        )

    return measure


MEASUREMENTS = {
    "chunk_gated_delta_rule 1x2048": chunk,
    "chunk_gated_delta_rule_backward 1x2048": backward("chunk"),
    "recurrent_gated_delta_rule 8x1": recurrent,
    "dynamic_conv 1x2048": conv,
    "dynamic_conv_backward 1x2048": backward("conv"),
    "dynamic_conv_step 8": conv_step,
}


def measure(shape: str, only: str, repeats: int) -> list[dict[str, object]]:
    todo = [
        (name, each, dtype)
        for name in MEASUREMENTS
        if only in name
        for each in chosen_shapes(shape)
        for dtype in DTYPES
    ]
    rows = []
    for name, each, dtype in (bar := tqdm(todo, unit="row")):
        bar.set_description(f"{name} {each.name} {dtype}")
        timings = MEASUREMENTS[name](each, DTYPES[dtype], repeats)
        ours = timings["jetkernels"]
        rows.append(
            {
                "op": name,
                "shape": each._asdict(),
                "dtype": dtype,
                "seconds": {peer: t._asdict() for peer, t in timings.items()},
                "ratio": {peer: t.median / ours.median for peer, t in timings.items() if peer != "jetkernels"},
            }
        )
    return rows


def print_rows(rows: list[dict[str, object]]) -> None:
    print(f"{'op':40} {'shape':8} {'dtype':5} {'ms':>9}   peers: time / ours (above 1: we are faster)")
    for row in rows:
        ratios = ", ".join(f"{peer} {ratio:.2f}x" for peer, ratio in row["ratio"].items())
        ms = row["seconds"]["jetkernels"]["median"] * 1e3
        print(f"{row['op']:40} {row['shape']['name']:8} {row['dtype']:5} {ms:9.3f}   {ratios}")
