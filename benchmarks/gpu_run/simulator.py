"""The simulator's results on the same inputs against the hardware's.

    python -m benchmarks.gpu_run.simulator FILE      where the simulator runs (nvcc, no GPU)

writes inputs, results and, for the simulator's own test GEMMs, their machine code; the run on a GPU takes it by
--simulated FILE.
"""

import argparse
import ctypes
import subprocess
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path

import torch

from benchmarks import ROOT, machine, ops
from benchmarks.counters import hoppersim
from benchmarks.gpu_run.supervisor import Job
from benchmarks.shapes import SHAPES, Draw, chosen_shapes, few_heads

# Approximate instructions and the order of sums inside a tensor core differ; a 16-bit output may be rounded the other
# way.
DIFFERENCE_CEILING = 2e-3
GEMM_SIZE = (130, 74, 200)  # tails in every dimension
GEMMS = [(dtype, source) for dtype in ("bf16", "f16") for source in ("ss", "rs")]
SWIZZLE = 128
NOTHING = "no file was brought along: --simulated FILE"


def describe() -> list[str]:
    cases = [case.name for shape in SHAPES for case in ops.small(few_heads(shape))]
    what = f"{len(cases)} small calls of the ops with a kernel, and {len(GEMMS)} GEMMs of tests/simulated"
    return [f"{what}: RMS, largest difference, bitwise"]


def jobs(settings: dict) -> list[Job]:
    """The names of what was prepared; without a file there is nothing to do."""
    if not settings.get("simulated"):
        return []
    prepared = torch.load(settings["simulated"])
    return [Job("simulator", tuple(entry["name"] for entry in (*prepared["entries"], *prepared["gemms"])))]


def copies(args: tuple) -> tuple:
    return tuple(a.clone() if isinstance(a, torch.Tensor) else a for a in args)


def simulated(shapes, **options) -> Iterator[dict]:
    """Each small call on the simulator: arguments, results, launches; no launches where the op has no kernel."""
    simulator = hoppersim()
    from support.jet_sim import jet_sim

    jet_sim()
    for shape in shapes:
        for case in ops.small(few_heads(shape)):
            if not ops.exists(case.op):
                continue
            args = case.make(Draw())
            work = copies(args)  # in memory that the simulator knows
            with simulator.simulate(**options), warnings.catch_warnings():
                warnings.simplefilter("ignore")  # calls without a kernel are named in the file
                results = ops.results(case.op, work, "jet_sim")
            yield {"name": case.name, "op": case.op, "args": args, "results": results, "launches": simulator.launches()}


def machine_code(name: str) -> bytes:
    """One of the simulator's test kernels, compiled for the device."""
    import kernel_library

    include = hoppersim().cutlass_include()
    with tempfile.NamedTemporaryFile(suffix=".so") as file:
        command = [hoppersim().nvcc(), "-std=c++20", "-O3", "-gencode", "arch=compute_90a,code=sm_90a", "-DNDEBUG"]
        command += ["-shared", "-Xcompiler", "-fPIC", "-cudart", "static", "--expt-relaxed-constexpr"]
        command += [f"-I{ROOT}", f"-I{include}", "-o", file.name]
        subprocess.run([*command, str(kernel_library.KERNELS / f"{name}.cu")], check=True)
        return Path(file.name).read_bytes()


def simulated_gemms() -> Iterator[dict]:
    hoppersim()
    from kernel_library import Gemm

    for dtype, source in GEMMS:
        gemm = Gemm(*GEMM_SIZE, dtype)
        c = torch.from_numpy(gemm.variant(dtype, source, SWIZZLE).copy())
        operands = [torch.from_numpy(x.view("int16").copy()) for x in (gemm.a_memory, gemm.b_memory)]
        name = f"gemm_{dtype}_{source}"
        yield {"name": name, "code": machine_code(name), "operands": operands, "results": {"C": c}}


def prepare(file: Path, shapes, gemms: bool = True) -> None:
    entries, without = [], set()
    for entry in simulated(shapes):
        print(f"{entry['name']}: {len(entry['launches'])} launches", flush=True)
        entries.append(entry) if entry["launches"] else without.add(entry["op"])
    # The GEMMs come last: compiling them costs the most.
    found = []
    if gemms:
        try:
            found = list(simulated_gemms())
        except Exception as error:  # CUTLASS's headers may be missing
            print(f"no GEMMs: {type(error).__name__}: {error}", flush=True)
    torch.save(
        {"commit": machine.commit(), "entries": entries, "without_kernel": sorted(without), "gemms": found}, file
    )
    print(f"{len(entries)} calls and {len(found)} GEMMs, {file.stat().st_size / 1e6:.1f} MB, written to {file}")


def difference(found: torch.Tensor, simulated: torch.Tensor) -> dict[str, object]:
    found = found.cpu()
    bitwise = found.contiguous().view(torch.uint8).equal(simulated.contiguous().view(torch.uint8))
    row = {
        "rms_difference": ops.rms_error(found, simulated),
        "max_difference": (found.double() - simulated.double()).abs().max().item(),
        "bitwise_equal": bitwise,
    }
    if not bitwise and not row["rms_difference"] <= DIFFERENCE_CEILING:
        row["failed"] = f"hardware and simulator differ by more than {DIFFERENCE_CEILING}"
    return row


def run_gemm(entry: dict) -> torch.Tensor:
    hoppersim()
    from kernel_library import Problem

    m, n, k = GEMM_SIZE
    a, b = (x.cuda() for x in entry["operands"])
    c = torch.full(entry["results"]["C"].shape, float("nan"), device="cuda")
    with tempfile.NamedTemporaryFile(suffix=".so") as file:
        Path(file.name).write_bytes(entry["code"])
        library = ctypes.CDLL(file.name)
    pointers = [x.data_ptr() for x in (a, b, c)]
    problem = Problem(*pointers, m, n, k, a.shape[1], b.shape[1], c.shape[1])
    message = ctypes.create_string_buffer(512)
    if library[entry["name"]](SWIZZLE, 0, 0, ctypes.byref(problem), message) != 0:
        raise RuntimeError(message.value.decode())
    torch.cuda.synchronize()
    return c


def compared(results: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> dict[str, object]:
    """One row of all outputs: the largest differences, and which output they are of."""
    rows = {name: difference(results[name], simulated) for name, simulated in expected.items()}
    worst = max(rows, key=lambda name: rows[name]["max_difference"])
    found = {name: max(row[name] for row in rows.values()) for name in ("rms_difference", "max_difference")}
    found["bitwise_equal"] = all(row["bitwise_equal"] for row in rows.values())
    failed = next((f"{name}: {row['failed']}" for name, row in rows.items() if "failed" in row), None)
    return {**found, **({} if found["bitwise_equal"] else {"output": worst}), **({"failed": failed} if failed else {})}


def on_device(entry: dict, device: torch.device) -> dict[str, object]:
    from jetkernels import ops as _  # noqa: F401  (registers torch.ops.jet)

    args = tuple(a.to(device) if isinstance(a, torch.Tensor) else a for a in entry["args"])
    if (served := ops.served_by(entry["op"], copies(args))) != "kernel":
        return {"failed": f"a kernel ran on the simulator, here {served}"}
    return compared(ops.results(entry["op"], args), entry["results"])


def work(name: str, context) -> dict[str, object]:
    if not hasattr(context, "entries"):
        prepared = torch.load(context.settings["simulated"])
        context.entries = {entry["name"]: entry for entry in (*prepared["entries"], *prepared["gemms"])}
        print(
            f"prepared at {prepared['commit']}; no kernel then: {', '.join(prepared['without_kernel']) or 'none'}",
            flush=True,
        )
    entry = context.entries[name]
    return compared({"C": run_gemm(entry)}, entry["results"]) if "code" in entry else on_device(entry, context.device)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_run.simulator", description=__doc__.splitlines()[0])
    parser.add_argument("file", type=Path)
    parser.add_argument("--shape", default="all", help="2b, 4b, 128/128 or all")
    parser.add_argument("--no-gemms", action="store_true", help="the ops only")
    arguments = parser.parse_args()
    prepare(arguments.file, chosen_shapes(arguments.shape), gemms=not arguments.no_gemms)


if __name__ == "__main__":
    main()
