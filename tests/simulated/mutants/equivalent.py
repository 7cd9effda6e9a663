"""Mutants that are no bugs: each with the reason why the altered kernel is right too."""

import re
from typing import NamedTuple

from hoppersim.mutate import Mutant


class Equivalent(NamedTuple):
    """Regular expressions of a kernel's name, and of what is done and its instruction; and the reason."""

    kernel: str
    kind: str
    what: str
    instruction: str
    reason: str


EQUIVALENT: tuple[Equivalent, ...] = ()


def reason_why_equivalent(kernel: str, mutant: Mutant) -> str:
    """Empty for a bug."""
    for one in EQUIVALENT:
        if (
            re.search(one.kernel, kernel)
            and one.kind == mutant.kind
            and re.fullmatch(one.what, mutant.what)
            and re.search(one.instruction, mutant.instruction)
        ):
            return one.reason
    return ""
