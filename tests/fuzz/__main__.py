"""``python -m tests.fuzz``: see the package."""

import argparse
import math
import sys
from collections.abc import Sequence

from . import __doc__ as description
from . import campaign


def main(command_line: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        "python -m tests.fuzz", description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, help="in all, shared by the backends (60 where --cases is not given)")
    parser.add_argument("--cases", type=int, help="in all, shared by the backends")
    parser.add_argument("--seed", type=int, default=0, help="number of the first case")
    parser.add_argument("--op", help="one op alone; its backward is part of it")
    parser.add_argument(
        "--backend",
        action="append",
        help="cpu-generic, cpu-avx2, cpu-avx512, plain, simulator or cuda; may be given more than once",
    )
    parser.add_argument("--case", type=int, help="run this case alone, and say what it is")
    parser.add_argument(
        "--sanitize", choices=("address", "thread"), help="the CPU library under ASan and UBSan, or under TSan"
    )
    parser.add_argument("--bits-only", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args(command_line)
    if arguments.child:
        campaign.child(
            arguments.backend[0],
            arguments.op,
            arguments.seed,
            arguments.cases,
            arguments.seconds,
            not arguments.bits_only,
        )
        return 0

    from . import backends, draw

    if arguments.op is not None and arguments.op not in draw.OPS:
        parser.error(f"--op must be one of {', '.join(draw.OPS)}, got {arguments.op}")
    chosen = arguments.backend or list(backends.here())
    for name in chosen:
        if name not in backends.here():
            parser.error(f"--backend must be one of {', '.join(backends.here())} on this machine, got {name}")
    if arguments.case is not None:
        if len(chosen) != 1 or arguments.sanitize:
            parser.error("--case needs one --backend, and no --sanitize")
        backends.start(chosen[0])
        row = campaign.run_case(arguments.case, arguments.op, chosen[0])
        print(f"{row.op} {row.dtype} {row.what}\n{row.reason or 'right'}")
        return int(row.reason is not None)

    seconds = arguments.seconds or (60 if arguments.cases is None else math.inf)
    if arguments.sanitize:
        from . import sanitize

        summary = sanitize.run(arguments.sanitize, arguments.op, arguments.seed, arguments.cases, seconds)
    else:
        summary = campaign.run(chosen, arguments.op, arguments.seed, arguments.cases, seconds)
    print(summary.text())
    return int(bool(summary.failures))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
