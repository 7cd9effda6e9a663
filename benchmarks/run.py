"""Measure the ops, count what their kernels do on the simulator, or predict their times from the machine code.

Prints a table and writes ``benchmarks/results/<device>/<date>-<commit>.json`` with what is needed to repeat the run.
"""

import argparse
import json
from pathlib import Path

from benchmarks.provenance import processors, provenance
from benchmarks.report import write_text
from benchmarks.shapes import SHAPES, chosen_shapes

RESULTS = Path(__file__).parent / "results"
COMMAND = "python -m benchmarks.run"


def on_cpu(arguments: argparse.Namespace) -> tuple[dict, list[dict]]:
    from benchmarks import cpu

    facts = provenance(COMMAND)
    rows = cpu.measure(arguments.shape, arguments.op, arguments.repeats)
    cpu.print_rows(rows)
    return {**facts, "processors_after": processors()}, rows


def on_cuda(arguments: argparse.Namespace) -> tuple[dict, list[dict]]:
    import torch

    from benchmarks import measure
    from benchmarks.report import MEASURED, reasons, table
    from benchmarks.rows import Clock, Rows
    from jetkernels import ops  # noqa: F401  (registers torch.ops.jet)

    if not torch.cuda.is_available():
        raise SystemExit("there is no CUDA device here; it would measure\n  " + "\n  ".join(measure.describe()))
    rows = Rows()
    device = torch.device("cuda", torch.cuda.current_device())
    measure.measure(
        rows, Clock(arguments.seconds), device, chosen_shapes(arguments.shape), arguments.op, model=not arguments.op
    )
    facts, found = rows.rows[0]["provenance"], rows.rows[1:]
    print("\n" + table([row for row in found if "us" in row], MEASURED))
    print("\n".join(reasons(found)))
    return facts | provenance(COMMAND, "cuda"), found


def main() -> None:
    parser = argparse.ArgumentParser(prog=COMMAND, description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--op", default="", help="measure the ops whose name contains this")
    parser.add_argument("--shape", default="2b", choices=[s.name for s in SHAPES] + ["all"])
    parser.add_argument("--repeats", type=int, default=7, help="cpu: interleaved rounds; the median counts")
    parser.add_argument("--seconds", type=float, default=480, help="cuda: start nothing new after this long")
    parser.add_argument("--output", type=Path, help="folder for the JSON (default: benchmarks/results/<device>)")
    parser.add_argument(
        "--counters", action="store_true", help="count bytes, FLOP and conflicts on the simulator; measures no time"
    )
    parser.add_argument("--batch", type=int, default=2, help="counters: sequences of the ops of decode")
    parser.add_argument("--tokens", type=int, default=256, help="counters: tokens of the other ops")
    parser.add_argument(
        "--forecast",
        action="store_true",
        help="predict cycles and times from the machine code of a build; measures no time",
    )
    parser.add_argument(
        "--objects",
        type=Path,
        nargs="+",
        default=[],
        help="forecast: object files or folders; the first with a kernel counts",
    )
    parser.add_argument("--csrc", type=Path, help="forecast: the sources of the objects, if not those here")
    parser.add_argument("--write", action="store_true", help="forecast: replace the committed one")
    arguments = parser.parse_args()
    if arguments.forecast:
        from benchmarks.forecast.calls import print_forecast

        print_forecast(chosen_shapes(arguments.shape), arguments.op, arguments.objects, arguments.csrc, arguments.write)
        return
    if arguments.counters:
        from benchmarks.counters import print_counters

        print_counters(chosen_shapes(arguments.shape), arguments.batch, arguments.tokens, arguments.op)
        return
    facts, rows = (on_cpu if arguments.device == "cpu" else on_cuda)(arguments)
    folder = arguments.output or RESULTS / arguments.device
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{facts['date'][:10]}-{facts['commit']}.json"
    write_text(path, json.dumps({"provenance": facts, "rows": rows}, indent=1) + "\n")
    print(f"written to {path}")


if __name__ == "__main__":
    main()
