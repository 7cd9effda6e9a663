"""The command `hoppersim`."""

import argparse
import json
import os
import sys

from . import _summary
from ._control import kinds, named
from ._run import CannotRun, Run, resolve, run

_DESCRIPTION = """\
Runs a CUDA program on the simulated Hopper GPU, once for each seed and timing, and reports the hazards of its kernels.
The program is taken as it is. It must be linked with the shared CUDA runtime and hold PTX for sm_90a:

  nvcc -gencode arch=compute_90a,code=compute_90a -cudart shared -lineinfo program.cu -o program
  hoppersim run ./program

-lineinfo gives the lines of the CUDA source; machine code beside the PTX does no harm. The program's standard input is
empty; the output of the first run is passed on, that of a later one is shown if it ends with another status. A kernel
stops at its first error (--go-on)."""
_STATUSES = """\
exit status:
  0  no errors (warnings are told), and the program returned 0 in every run
  1  errors, or the program itself failed in some run (its status is told)
  2  it could not be run, or a kernel holds what is not simulated; the reason is told"""


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="hoppersim", description="A functional simulator of NVIDIA Hopper (sm_90a).")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    runner = commands.add_parser(
        "run",
        help="run a CUDA program on the simulator and report hazards",
        description=_DESCRIPTION,
        epilog=_STATUSES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    runner.add_argument(
        "--seeds",
        type=_positive,
        default=4,
        metavar="N",
        help="run with the seeds 0 to N - 1: orders of warps and CTAs, 0 is in order (default: %(default)s)",
    )
    runner.add_argument(
        "--timing",
        choices=["early", "late", "both"],
        default="both",
        help="asynchronous copies and wgmma take effect at once, as late as allowed, or both in turn (default: both)",
    )
    runner.add_argument(
        "--allow",
        action="append",
        default=[],
        metavar="KIND",
        help='do not report this kind, such as "missing proxy fence"; may be given several times. '
        "`hoppersim kinds` lists those that can be allowed",
    )
    runner.add_argument("--strict", action="store_true", help="warnings are errors: they stop the kernel, and count")
    runner.add_argument(
        "--go-on",
        action="store_true",
        help="collect errors and run on, where the kind leaves the machine in a defined state; what a kernel computes "
        "after its first error may be wrong for that reason, and so may later findings",
    )
    runner.add_argument("--json", metavar="FILE", help="write everything that was found and counted as JSON")
    runner.add_argument(
        "--max-instructions",
        type=_positive,
        metavar="N",
        help="report a live-lock when a cluster executes more instructions of warps without getting on: without a "
        "store, copy, product, arrival or barrier",
    )
    runner.add_argument("program", metavar="PROGRAM", help="path of the program, or a name on PATH")
    runner.add_argument("arguments", nargs=argparse.REMAINDER, metavar="ARGS", help="its arguments")
    commands.add_parser("kinds", help="list the kinds of reports: severity, whether it can be allowed, meaning")
    return parser


def _kinds() -> int:
    for name, kind in kinds().items():
        print(f"{name}\n  {kind.severity}{', can be allowed' * kind.goes_on}: {kind.meaning}")
    return 0


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise ValueError(text)
    return value


_positive.__name__ = "number above zero"  # argparse names it in its error


def _all_runs(options: argparse.Namespace) -> list[Run]:
    command = [options.program, *options.arguments]
    resolve(options.program)
    named("--allow", options.allow, goes_on=True)
    extra = {
        "HOPPERSIM_ALLOW": ",".join(options.allow),
        "HOPPERSIM_STRICT": str(int(options.strict)),
        "HOPPERSIM_GO_ON": str(int(options.go_on)),
        "HOPPERSIM_MAX_INSTRUCTIONS": str(options.max_instructions or ""),
    }
    timings = ["early", "late"] if options.timing == "both" else [options.timing]
    runs: list[Run] = []
    for seed in range(options.seeds):
        for timing in timings:
            sys.stdout.flush()
            new = run(command, seed, timing, extra, pass_on=not runs)
            if new.output and all(new.status != old.status for old in runs):
                print(f"---- output with seed {seed}, timing {timing}:\n{new.output.rstrip()}")
            runs.append(new)
            if not new.modules:
                raise CannotRun(
                    f"{options.program} registered no kernels with the simulated CUDA runtime, and ended with "
                    f"{_summary.told_status(new.status)}. Link it with -cudart shared: without it nvcc puts CUDA's own "
                    "runtime into the program"
                )
    return runs


def _run(options: argparse.Namespace) -> int:
    runs = _all_runs(options)
    status = _summary.exit_status(runs)
    found = _summary.findings(runs)
    seeds = f"seeds 0 to {options.seeds - 1}" if options.seeds > 1 else "seed 0"
    print(f"==== hoppersim: {len(runs)} runs of {options.program} ({seeds}, timing {options.timing})")
    if found:
        print(_summary.text_of_findings(runs) + "\n")
    for kernel, error in _summary.refusals(runs):
        print(f"refused launch of {kernel}: {error}, as hardware would\n")
    print(_summary.table_of_launches(runs[0]) + "\n")
    print(_summary.text_of_statuses(runs))
    print(f"{len(found)} finding{'s' * (len(found) != 1)}." if found else "No findings.")
    if options.json:
        told = {
            "program": [options.program, *options.arguments],
            "status": status,
            "findings": found,
            "launches": _summary.launches(runs[0]),
            "runs": [
                {
                    "seed": run.seed,
                    "timing": run.timing,
                    "status": run.status,
                    "findings": run.findings,
                    "launches": run.launches,
                    "refusals": run.refusals,
                }
                for run in runs
            ],
        }
        with open(options.json, "w") as file:
            json.dump(told, file, indent=1)
            file.write("\n")
    return status


def main(arguments: list[str] | None = None) -> int:
    """Runs the command; returns its exit status."""
    options = _parser().parse_args(arguments)
    try:
        status = _kinds() if options.command == "kinds" else _run(options)
        sys.stdout.flush()
        return status
    except BrokenPipeError:  # whoever read, as `head` does, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except (CannotRun, OSError, RuntimeError, ValueError) as error:
        print(f"hoppersim: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
