"""The first minutes on a GPU: a verdict per kernel, the times that decide, tests, peers; whatever breaks.

Rows go to OUTPUT/rows-*.jsonl as they are known; results.json, summary.md and run.log are written after each part. What
OUTPUT already holds, or --again another run's folder, is not done again where it was good. Exit code: 0 all ran, 1
something failed, 3 no Hopper GPU.
"""

import argparse
import os
import shutil
import signal
import sys
import tempfile
import time
from importlib import import_module
from pathlib import Path

from benchmarks.gpu_run import library, plan, store, summary, versus
from benchmarks.gpu_run.supervisor import Background, Part, Pool
from benchmarks.rows import reason

NO_GPU = 3
LEAST = 8  # s: with less left, no part is begun


def gpu_problem() -> str | None:
    """Why this machine cannot be measured, or None."""
    import torch

    if not torch.cuda.is_available():
        return "there is no CUDA device here (torch.cuda.is_available() is false)"
    if (capability := torch.cuda.get_device_capability()) != (9, 0):
        return (
            f"the device is of compute capability {capability[0]}.{capability[1]}, the kernels are for 9.0 (H100, H200)"
        )
    return None


def stands_ready(problem: str, parts: list[Part]) -> str:
    lines = [f"Nothing was measured: {problem}.", "The run stands ready. On a machine with a Hopper GPU it would do:"]
    for part in (plan.LIBRARY, *parts):
        lines += ["", part.name, *(f"  * {line}" for line in import_module(part.module).describe())]
    return "\n".join(lines)


class Run:
    """The parts in turn, each with its share of the time that is left."""

    def __init__(self, parts: list[Part], output: Path, seconds: float, settings: dict):
        self.parts, self.output, self.settings = parts, output, settings
        self.end = time.monotonic() + seconds
        self.folder = Path(tempfile.mkdtemp(prefix="jetkernels-run-"))
        self.done: list[dict[str, object]] = []

    def left(self) -> float:
        return self.end - time.monotonic()

    def part(self, part: Part, seconds: float) -> None:
        start = time.monotonic()
        before = store.known(self.output)
        good = {case for (name, case), row in before.items() if name == part.name and store.is_good(row)}
        jobs = [job for job in self.jobs(part) if not job.cases or set(job.cases) - good]
        jobs = [job._replace(cases=tuple(case for case in job.cases if case not in good)) for job in jobs]
        print(f"---- {part.name}: up to {seconds:.0f} s", flush=True)
        finished = Pool(
            part, jobs, self.settings, start + seconds, self.folder, say=lambda text: print(text, flush=True)
        ).run()
        rows = summary.rows_of(part.name, store.known(self.output))
        line = summary.overview(part.name, rows, finished, time.monotonic() - start, len(good))
        if not jobs and not rows:
            line["reason"] = getattr(import_module(part.module), "NOTHING", "there was nothing to do")
        self.done.append(line)

    def jobs(self, part: Part) -> list:
        try:
            return import_module(part.module).jobs(self.settings)
        except Exception as error:  # one part must not stop the others
            store.append(
                self.output / f"rows-{part.rows}.jsonl", {"part": part.name, "case": part.name, "failed": reason(error)}
            )
            return []

    def after(self, part: Part) -> None:
        store.write_broken(self.output)
        if part.name == "smoke" and import_module(plan.FAILURES.module).failed(self.output) and self.left() > LEAST:
            self.part(plan.FAILURES, min(plan.FAILURES.most, self.left()))
            self.done.pop()  # what it found is in the rows of smoke
        summary.write(self.output, self.done)

    def go(self) -> list[dict[str, object]]:
        background = Background(
            plan.WARM, import_module(plan.WARM.module).jobs(self.settings), self.settings, self.folder
        )
        try:
            for i, part in enumerate(self.parts):
                share = self.left() * part.share / sum(later.share for later in self.parts[i:])
                if self.left() < min(LEAST, part.share):
                    self.done.append(
                        {
                            "part": part.name,
                            "status": "skipped",
                            "reason": "the time of the whole run was over",
                            "seconds": 0.0,
                        }
                    )
                    continue
                if part.module == versus.__name__:
                    background.end()
                background.pause() if part.quiet else background.resume()
                self.part(part, min(part.most, max(share, min(part.most, part.share, self.left()))))
                self.after(part)
        finally:
            background.end()
            shutil.rmtree(self.folder, ignore_errors=True)
            summary.write(self.output, self.done)
        return self.done


def peers_path(wheels: Path | None) -> str | None:
    if wheels is None:
        return None
    try:
        return versus.install_wheels(wheels)
    except Exception as error:  # the peers are the least of it
        print(f"no wheels: {type(error).__name__}: {error}", flush=True)
        return None


def arguments_of(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_run", description=__doc__.splitlines()[0])
    parser.add_argument(
        "output", type=Path, help="folder for the results; good rows in it are kept, the others are done again"
    )
    parser.add_argument(
        "--again", type=Path, metavar="EARLIER", help="folder of an earlier run: do only what was not good there"
    )
    parser.add_argument("--fresh", action="store_true", help="forget what OUTPUT holds")
    parser.add_argument(
        "--parts",
        default=",".join(part.name for part in plan.PARTS),
        help="comma-separated, in this order (default: all)",
    )
    parser.add_argument(
        "--wheels",
        type=Path,
        default=os.environ.get("PEER_WHEELS"),
        help="folder of the peers' wheels (or PEER_WHEELS)",
    )
    parser.add_argument(
        "--simulated", type=Path, help="what `python -m benchmarks.gpu_run.simulator FILE` wrote on another machine"
    )
    parser.add_argument(
        "--seconds", type=float, default=plan.SECONDS, help=f"time of the whole run (default {plan.SECONDS})"
    )
    parser.add_argument("--commit", help="the commit of this tree, where it has no git")
    parser.add_argument(
        "--device",
        default="cuda",
        choices=("cuda", "cpu"),
        help="cpu: a rehearsal of smoke and the supervisor, no times",
    )
    arguments = parser.parse_args(argv)
    try:
        arguments.parts = plan.chosen(arguments.parts)
    except ValueError as error:
        parser.error(str(error))
    return arguments


def settings_of(arguments: argparse.Namespace) -> dict:
    """What the children are told."""
    return {
        "output": str(arguments.output.resolve()),
        "device": arguments.device,
        "watchdog": str(library.WATCHDOG) if library.WATCHDOG.exists() and arguments.device == "cuda" else None,
        "simulated": str(arguments.simulated.resolve()) if arguments.simulated else None,
        "peers_path": peers_path(Path(arguments.wheels) if arguments.wheels else None),
        "command": " ".join(["python -m benchmarks.gpu_run", *sys.argv[1:]]),
    }


def main(argv: list[str] | None = None) -> int:
    start = time.monotonic()
    arguments = arguments_of(argv)
    if arguments.device == "cuda" and (problem := gpu_problem()):
        print(stands_ready(problem, arguments.parts))
        return NO_GPU
    if arguments.commit:
        os.environ["JETKERNELS_COMMIT"] = arguments.commit
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # children are ended and what is known is written
    output = arguments.output.resolve()
    output.mkdir(parents=True, exist_ok=True)
    if arguments.fresh:
        store.clear(output)
    if kept := store.carry_over(output, arguments.again.resolve() if arguments.again else output):
        print(f"{kept} rows of an earlier run were good and are kept")
    store.write_broken(output)
    settings = settings_of(arguments)
    if arguments.device == "cuda" and settings["watchdog"] is None:
        print(
            f"{library.WATCHDOG.name} was not brought along: a dead-lock ends by its time limit and does not say where"
        )
    run = Run([plan.LIBRARY, *arguments.parts], output, arguments.seconds - (time.monotonic() - start), settings)
    done = run.go()
    print("\n" + summary.screen(output, done))
    files = ", ".join(sorted(path.name for path in output.iterdir()))
    print(f"\n{time.monotonic() - start:.0f} s; written to {arguments.output}: {files}")
    return int(any(part["status"] in ("failed", "out of time") for part in done))


if __name__ == "__main__":
    raise SystemExit(main())
