"""Measure the ops side by side with their peers: ``python -m benchmarks.run --device cpu``.

Prints a table and writes ``benchmarks/results/<device>/<date>-<commit>.json`` with what is needed to repeat the run.
"""

import argparse
import datetime
import json
import platform
import subprocess
import sys
from pathlib import Path

import torch
from tqdm import tqdm

import jetkernels
from benchmarks import peers
from benchmarks.shapes import SHAPES, Shape
from benchmarks.timing import Timing, side_by_side

RESULTS = Path(__file__).parent / "results"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def delta_rule_inputs(shape: Shape, B: int, T: int, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)

    def normal(*size):
        return torch.randn(*size, generator=generator)

    return {
        "q": normal(B, T, shape.Hk, shape.K).to(dtype),
        "k": normal(B, T, shape.Hk, shape.K).to(dtype),
        "v": normal(B, T, shape.H, shape.V).to(dtype),
        "g": -torch.nn.functional.softplus(normal(B, T, shape.H)),
        "beta": normal(B, T, shape.H).sigmoid(),
    }


def conv_inputs(shape: Shape, B: int, T: int, dtype: torch.dtype) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    sizes = ((B, T, shape.D), (B, T, shape.R), (shape.D * shape.W, shape.R), (shape.D * shape.W,))
    scales = (1.0, 1.0, shape.R**-0.5, 0.02)
    return [(torch.randn(size, generator=generator) * scale).to(dtype) for size, scale in zip(sizes, scales)]


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
            "jetkernels": lambda: jetkernels.recurrent_gated_delta_rule_(**inputs, state=ours, use_qk_l2norm_in_kernel=True),
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


def provenance() -> dict[str, object]:
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=RESULTS.parent)
    dirty = subprocess.run(["git", "status", "--porcelain"], capture_output=True, text=True, cwd=RESULTS.parent)
    cpu = next((l.split(":")[1].strip() for l in open("/proc/cpuinfo") if l.startswith("model name")), platform.processor())
    return {
        "device": cpu,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "build": jetkernels._library.build_info(),
        "commit": commit.stdout.strip() + ("+changes" if dirty.stdout.strip() else ""),
        "command": "python -m benchmarks.run " + " ".join(sys.argv[1:]),
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
    }


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.run", description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=["cpu"], default="cpu")
    parser.add_argument("--only", default="", help="measure the ops whose name contains this")
    parser.add_argument("--shape", default="2b", choices=[s.name for s in SHAPES] + ["all"])
    parser.add_argument("--repeats", type=int, default=7, help="interleaved rounds; the median counts")
    parser.add_argument("--output", type=Path, help="folder for the JSON (default: benchmarks/results/<device>)")
    arguments = parser.parse_args()

    shapes = [s for s in SHAPES if arguments.shape in (s.name, "all")]
    todo = [
        (name, shape, dtype)
        for name in MEASUREMENTS
        if arguments.only in name
        for shape in shapes
        for dtype in DTYPES
    ]
    rows = []
    for name, shape, dtype in (bar := tqdm(todo, unit="row")):
        bar.set_description(f"{name} {shape.name} {dtype}")
        timings = MEASUREMENTS[name](shape, DTYPES[dtype], arguments.repeats)
        ours = timings["jetkernels"]
        rows.append(
            {
                "op": name,
                "shape": shape._asdict(),
                "dtype": dtype,
                "seconds": {peer: t._asdict() for peer, t in timings.items()},
                "ratio": {peer: t.median / ours.median for peer, t in timings.items() if peer != "jetkernels"},
            }
        )
    print(f"{'op':40} {'shape':8} {'dtype':5} {'ms':>9}   peers: time / ours (above 1: we are faster)")
    for row in rows:
        ratios = ", ".join(f"{peer} {ratio:.2f}x" for peer, ratio in row["ratio"].items())
        ms = row["seconds"]["jetkernels"]["median"] * 1e3
        print(f"{row['op']:40} {row['shape']['name']:8} {row['dtype']:5} {ms:9.3f}   {ratios}")

    facts = provenance()
    folder = arguments.output or RESULTS / arguments.device
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{facts['date'][:10]}-{facts['commit']}.json"
    path.write_text(json.dumps({"provenance": facts, "rows": rows}, indent=1) + "\n")
    print(f"written to {path}")


if __name__ == "__main__":
    main()
