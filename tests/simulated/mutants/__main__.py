"""``python -m tests.simulated.mutants``: see the package."""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from . import __doc__ as description


def main(command_line: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        "python -m tests.simulated.mutants",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--count", type=int, default=220, help="mutants that are reached and no equivalents")
    parser.add_argument("--kernels", nargs="*", default=(), help="parts of the mangled names of kernels; all without")
    parser.add_argument("--classes", nargs="*", default=(), help="classes of mutants; all without")
    parser.add_argument("--draw", type=int, default=0, help="another sample of the mutants for every number")
    parser.add_argument("--seeds", type=int, default=10, help="seeds, each in both timings")
    parser.add_argument("--legal", type=int, default=0, metavar="COUNT", help="legal alterations too, in 3 schedules")
    parser.add_argument("--jobs", type=int, default=1, help="processes")
    parser.add_argument("--json", type=Path, help="every outcome")
    parser.add_argument("--report", type=Path, help="Markdown: rates by class, escapes, the legal alterations")
    arguments = parser.parse_args(command_line)

    from support.jet_sim import jet_sim

    from hoppersim import mutate

    from . import campaign, report
    from .calls import calls

    if unknown := set(arguments.classes) - set(mutate.CLASSES):
        parser.error(f"--classes must be of {', '.join(mutate.CLASSES)}, got {', '.join(sorted(unknown))}")
    jet_sim()
    kernels = campaign.targets(calls(), arguments.kernels)
    if not kernels:
        parser.error(f"no kernel's name has a part of --kernels: {' '.join(arguments.kernels)}")
    tell = lambda outcome: print(report.line(outcome), flush=True)
    planted = campaign.run(
        kernels,
        arguments.count,
        campaign.schedules(arguments.seeds),
        arguments.classes,
        jobs=arguments.jobs,
        draw=arguments.draw,
        tell=tell,
    )
    legal = campaign.run(
        kernels,
        arguments.legal,
        (("early", 0), ("late", 1), ("early", 2)),
        generate=mutate.legal,
        jobs=arguments.jobs,
        draw=arguments.draw,
        tell=tell,
    )
    if arguments.json:
        rows = [outcome._asdict() for outcome in (*planted, *legal)]
        arguments.json.write_text("\n".join(json.dumps(row) for row in rows) + "\n")
    text = report.markdown(planted, legal, arguments.seeds, arguments.draw)
    if arguments.report:
        arguments.report.write_text(text)
    print(text)
    return int(any(outcome.state in ("noticed", "lost") for outcome in legal))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
