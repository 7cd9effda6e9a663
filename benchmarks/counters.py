"""Count on the simulator what a kernel does, and the time that follows from an H200's ceilings."""

import sys
import warnings

from benchmarks import ROOT, floors, ops
from benchmarks.floors import Work
from benchmarks.ops import BF16, FP32, Case
from benchmarks.report import table
from benchmarks.shapes import Draw, Shape

COLUMNS = {
    "op": "op",
    "shape": "shape",
    "size": "size",
    "dtype": "dtype",
    "kernel": "kernel",
    "grid": "grid",
    "read": "read B",
    "written": "written B",
    "ideal": "least B",
    "bytes_ratio": "bytes / least",
    "per_sector": "bytes / sectors",
    "flop": "tensor FLOP",
    "flop_ratio": "FLOP / least",
    "conflicts": "conflict factor",
    "bound_us": "bound us",
    "floor_us": "floor us",
}
SECTOR = 32


def cases(shape: Shape, B: int, T: int) -> list[Case]:
    """Each op at one size: B sequences for the ops of decode, T tokens of one sequence for the others."""
    decode = [op(shape, B, pool) for pool in (FP32, BF16) for op in (ops.recurrent, ops.verify, ops.commit)]
    return [
        *decode,
        ops.conv_step(shape, B),
        ops.chunk(shape, 1, T),
        ops.conv(shape, 1, T),
        ops.apply_conv(shape, 1, T),
    ]


def traffic(counters: dict) -> tuple[int, int]:
    """Bytes read and written in global memory: by threads, and by bulk copies."""
    return (
        counters["global_read_bytes"] + counters["bulk_read_bytes"],
        counters["global_write_bytes"] + counters["bulk_write_bytes"],
    )


def moved(counters: dict) -> int:
    """Bytes that the memory moves for them: whole sectors."""
    sectors = counters["global_read_sectors"] + counters["global_write_sectors"]
    return SECTOR * sectors + counters["bulk_read_bytes"] + counters["bulk_write_bytes"]


def conflict_factor(counters: dict) -> float:
    """Wavefronts of the threads' accesses to shared memory over the fewest that would do."""
    ideal = counters["shared_ideal_wavefronts"]
    return counters["shared_wavefronts"] / ideal if ideal else 1.0


def added(all_counters: list[dict]) -> dict:
    numbers = [name for name, value in all_counters[0].items() if isinstance(value, int)]
    return {name: sum(c[name] for c in all_counters) for name in numbers}


def row_of(kernel: str, grid: str, counters: dict) -> dict[str, object]:
    read, written = traffic(counters)
    by_threads = counters["global_read_bytes"] + counters["global_write_bytes"]
    sectors = counters["global_read_sectors"] + counters["global_write_sectors"]
    done = Work(moved(counters), counters["tensor_flop"])
    return {
        "kernel": kernel,
        "grid": grid,
        "read": read,
        "written": written,
        "per_sector": by_threads / (SECTOR * sectors) if sectors else None,
        "flop": counters["tensor_flop"],
        "conflicts": conflict_factor(counters),
        "bound_us": done.seconds(floors.H200) * 1e6,
    }


def rows_of(case: Case, launches: list[dict]) -> list[dict[str, object]]:
    """A row per launch, and one for the whole op with its floor."""
    what = {"op": case.op, "shape": case.shape.name, "size": case.size, "dtype": case.dtype}
    if not launches:
        return [
            {**what, "kernel": "no kernel", "ideal": case.work.bytes, "floor_us": case.work.seconds(floors.H200) * 1e6}
        ]
    rows = []
    if len(launches) > 1:
        rows = [{**what, **row_of(short(r["mangled"]), "x".join(map(str, r["grid"])), r["counters"])} for r in launches]
    whole = row_of("all" if rows else short(launches[0]["mangled"]), "", added([r["counters"] for r in launches]))
    if not rows:
        whole["grid"] = "x".join(map(str, launches[0]["grid"]))
    whole["bound_us"] = (
        sum(Work(moved(r["counters"]), r["counters"]["tensor_flop"]).seconds(floors.H200) for r in launches) * 1e6
    )
    whole |= {"ideal": case.work.bytes, "bytes_ratio": (whole["read"] + whole["written"]) / case.work.bytes}
    whole |= {"floor_us": case.work.seconds(floors.H200) * 1e6}
    whole |= {"flop_ratio": whole["flop"] / case.work.flop} if case.work.flop else {}
    return [*rows, {**what, **whole}]


def short(mangled: str) -> str:
    """The last plain name inside a mangled one: enough to tell the launches of an op apart."""
    names, i = [], 0
    while i < len(mangled):
        digits = 0
        while i + digits < len(mangled) and mangled[i + digits].isdigit():
            digits += 1
        length = int(mangled[i : i + digits] or 0)
        if digits and mangled[i + digits : i + digits + length].isidentifier():
            names.append(mangled[i + digits : i + digits + length])
            i += length
        i += max(digits, 1)
    return next((name for name in names if "kernel" in name), names[-1] if names else mangled)


def hoppersim():
    """The simulator, built on first use."""
    wanted = [str(ROOT / folder) for folder in ("hoppersim", "tests", "tests/simulated")]
    sys.path[:0] = [path for path in wanted if path not in sys.path]
    import hoppersim as found

    return found


def count(shapes: list[Shape], B: int, T: int, only: str = "") -> list[dict[str, object]]:
    simulator = hoppersim()
    from support.jet_sim import jet_sim

    jet_sim()
    rows = []
    for case in (case for shape in shapes for case in cases(shape, B, T)):
        if only not in case.op or not ops.exists(case.op):
            continue
        args = case.make(Draw())
        with simulator.simulate(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # "no kernel" is in the table
            ops.results(case.op, args, "jet_sim")
        rows += rows_of(case, simulator.launches())
    return rows


def print_counters(shapes: list[Shape], B: int, T: int, only: str = "") -> None:
    rows = count(shapes, B, T, only)
    print(table(rows, COLUMNS))
    H200 = floors.H200
    ceilings = f"{H200.bandwidth / 1e12} TB/s, FLOP at {H200.tensor / 1e12:.0f} TFLOP/s"
    print(f"\nbound: whole sectors at {ceilings}, launch by launch;")
    print("floor: the same for the least bytes and FLOP of the op. Both leave out launches, latency and instructions.")
    print(
        "bytes / sectors: of the threads' accesses; below 1 something is moved and not used, above 1 lanes share bytes."
    )
