"""Compare the simulator with hardware on the same inputs.

``prepare FILE`` runs where the simulator does (nvcc, no GPU) and writes inputs, the simulator's results and, for its own
test GEMMs, their machine code. ``compare FILE`` runs on a GPU. ``compare`` alone prepares first, where that is possible.
"""

import ctypes
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path

import torch

from benchmarks import ops, parts
from benchmarks.parts import Rows
from benchmarks.provenance import ROOT, commit
from benchmarks.shapes import SHAPES, Draw, chosen_shapes, few_heads

# Approximate instructions and the order of sums inside a tensor core differ; a 16-bit output may be rounded the other way.
DIFFERENCE_CEILING = 2e-3
GEMM_SIZE = (130, 74, 200)  # tails in every dimension
GEMMS = [(dtype, source) for dtype in ("bf16", "f16") for source in ("ss", "rs")]
SWIZZLE = 128


def describe() -> list[str]:
    cases = [case.name for shape in SHAPES for case in ops.small(few_heads(shape))]
    return [f"{len(cases)} small calls of the ops with a kernel, and {len(GEMMS)} GEMMs of tests/hoppersim: RMS, largest difference, bitwise"]


def hoppersim():
    """The simulator, built on first use."""
    sys.path[:0] = [path for path in (str(ROOT / "tests" / "hoppersim"),) if path not in sys.path]
    import hoppersim as found

    return found


def copies(args: tuple) -> tuple:
    return tuple(a.clone() if isinstance(a, torch.Tensor) else a for a in args)


def simulated(shapes, **options) -> Iterator[dict]:
    """Each small call on the simulator: arguments, results, launches; no launches where the op has no kernel."""
    simulator = hoppersim()
    simulator.jet_sim()
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

    include = kernel_library.cutlass_source() / "include"
    with tempfile.NamedTemporaryFile(suffix=".so") as file:
        command = [hoppersim().nvcc(), "-std=c++17", "-O3", "-gencode", "arch=compute_90a,code=sm_90a", "-shared", "-Xcompiler", "-fPIC"]
        command += ["-cudart", "static", f"-I{ROOT}", f"-I{include}", "--expt-relaxed-constexpr", "-DNDEBUG", "-o", file.name]
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
    torch.save({"commit": commit(), "entries": entries, "without_kernel": sorted(without), "gemms": found}, file)
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


def compare(rows: Rows, clock: parts.Clock, file: Path) -> None:
    from jetkernels import ops as _  # noqa: F401  (registers torch.ops.jet)

    prepared = torch.load(file)
    rows.add(prepared_at=prepared["commit"])
    for op in prepared["without_kernel"]:
        rows.add(case=op, skipped="no kernel")
    for entry in prepared["entries"]:
        what = {"case": entry["name"]}
        try:
            args = tuple(a.cuda() if isinstance(a, torch.Tensor) else a for a in entry["args"])
            if (served := ops.served_by(entry["op"], copies(args))) != "kernel":
                rows.add(**what, failed=f"a kernel ran on the simulator, here {served}")
                continue
            found = ops.results(entry["op"], args)
        except Exception as error:  # a broken op must not stop the others
            rows.add(**what, failed=f"{type(error).__name__}: {str(error)[:300]}")
            continue
        for name, simulated in entry["results"].items():
            rows.add(**what, output=name, **difference(found[name], simulated))
    for entry in prepared["gemms"]:
        C = entry["results"]["C"]
        rows.attempt(clock, lambda entry=entry, C=C: difference(run_gemm(entry), C), case=entry["name"], output="C")


def main() -> None:
    parser = parts.parser("simulator", __doc__)
    parser.add_argument("what", choices=("prepare", "compare"))
    parser.add_argument("file", nargs="?", type=Path, help="what prepare writes and compare reads")
    parser.add_argument("--no-gemms", action="store_true", help="prepare: the ops only")
    arguments = parser.parse_args()
    shapes = chosen_shapes(arguments.shape)[: 1 if arguments.quick else None]
    if arguments.what == "prepare":
        if arguments.file is None:
            parser.error("prepare needs FILE")
        prepare(arguments.file, shapes, gemms=not arguments.no_gemms)
        return
    if not torch.cuda.is_available():
        print("no CUDA device")
        raise SystemExit(parts.SKIPPED)
    with tempfile.TemporaryDirectory() as folder:
        file = arguments.file
        if file is None:
            file = Path(folder) / "simulated.pt"
            command = [sys.executable, "-m", "benchmarks.simulator", "prepare", str(file), "--shape", arguments.shape]
            done = subprocess.run(command + ["--quick"] * arguments.quick, timeout=arguments.seconds)
            if done.returncode != 0:
                print("no prepared file was brought along, and the simulator does not run here (see above)")
                raise SystemExit(parts.SKIPPED)
        rows = Rows(arguments.rows)
        compare(rows, parts.Clock(arguments.seconds), file)
    raise SystemExit(parts.failed(rows.rows))


if __name__ == "__main__":
    main()
