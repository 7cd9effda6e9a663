"""Outcomes for people: a line each, and the whole in Markdown."""

import re
from collections.abc import Sequence

from hoppersim import mutate

from .campaign import Outcome


def line(o: Outcome) -> str:
    """One outcome."""
    how = f" by {o.by} in run {o.run}" if o.state == "noticed" else f": {o.by}" if o.by else ""
    return f"{o.state}{how} | {o.kind}, {o.what} | {o.kernel}, line {o.line}: {o.instruction[:100]}"


def _rate(part: int, whole: int) -> str:
    return f"{part} of {whole} ({100 * part / whole:.1f}%)" if whole else "-"


def _of(outcomes: Sequence[Outcome], *states: str) -> list[Outcome]:
    return [o for o in outcomes if o.state in states]


def _row(name: str, outcomes: Sequence[Outcome]) -> str:
    bugs = _of(outcomes, "noticed", "escaped", "lost")
    noticed = _of(bugs, "noticed")
    first = [o for o in noticed if o.run == 0]
    others = (len(_of(outcomes, state)) for state in ("not reached", "equivalent"))
    cells = (name, _rate(len(first), len(bugs)), _rate(len(noticed), len(bugs)), *others)
    return "| " + " | ".join(map(str, cells)) + " |"


def _table(outcomes: Sequence[Outcome], *headings: str) -> list[str]:
    lines = ["| " + " | ".join(headings) + " |", "|" + "---|" * len(headings)]
    for o in outcomes:
        cells = (f"{o.kind}, {o.what}", o.kernel, o.line, f"`{o.instruction[:120]}`", o.by)
        lines.append("| " + " | ".join(str(cell).replace("|", "\\|") for cell in cells[: len(headings)]) + " |")
    return lines


def markdown(planted: Sequence[Outcome], legal: Sequence[Outcome], seeds: int, draw: int = 0) -> str:
    """The detection rate by class, what escaped, what is no bug, and the legal alterations."""
    bugs = _of(planted, "noticed", "escaped", "lost")
    kernels = {o.kernel for o in bugs}
    lines = [
        "# Bugs planted in the library's kernels, and how many the simulator notices",
        "",
        f"Made by `python -m tests.simulated.mutants --draw {draw}`.",
        "",
        f"{len(bugs)} planted bugs in {len(kernels)} kernels. One default run: early, seed 0; all runs: {seeds} seeds "
        "in both timings, until one notices.",
        "",
        "| class | noticed in one default run | noticed in all runs | not reached | no bug |",
        "|---|---|---|---|---|",
    ]
    for kind in mutate.CLASSES:
        if of_kind := [o for o in planted if o.kind == kind]:
            lines.append(_row(kind, of_kind))
    lines += [_row("all", planted), "", "## Escapes", ""]
    escapes = _of(planted, "escaped", "lost")
    lines += _table(escapes, "what", "kernel", "line", "instruction", "why") if escapes else ["None."]
    lines += ["", "## No bugs", ""]
    equivalent = _of(planted, "equivalent")
    lines += _table(equivalent, "what", "kernel", "line", "instruction", "why it is right") if equivalent else ["None."]
    lines += ["", "## Legal alterations", ""]
    reached = _of(legal, "noticed", "escaped", "lost")
    wrong = _of(legal, "noticed", "lost")
    kinds = sorted({re.sub(r"^\d+ ", "", o.what) for o in reached})
    lines.append(f"{_rate(len(reached) - len(wrong), len(reached))} passed unnoticed: {', '.join(kinds)}.")
    if wrong:
        lines += ["", *_table(wrong, "what", "kernel", "line", "instruction", "reported as")]
    return "\n".join(lines) + "\n"
