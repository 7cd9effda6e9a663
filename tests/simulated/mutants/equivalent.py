"""Mutants that are no bugs: each with the reason why the altered kernel is right too."""

import re
from collections.abc import Mapping
from typing import NamedTuple

from hoppersim.mutate import Mutant


class Equivalent(NamedTuple):
    """Regular expressions of a kernel's name, what is done to it and the instruction; which of the kernel's
    instructions that match (from 1; all without); and the reason.
    """

    kernel: str
    kind: str
    what: str
    instruction: str
    which: tuple[int, ...]
    reason: str


EQUIVALENT = (
    Equivalent(
        "attention_step_kernel",
        "wait",
        "removed|one more group may be left",
        r"cp\.async\.wait_group 0",
        (),
        "the loop has waited for every group with a copy in it; the groups left are empty",
    ),
    Equivalent(
        r"chunk_sweep_kernel<SweepConfig<64, [03]",
        "wait",
        "removed|one more group may be left",
        r"wgmma\.wait_group\.sync\.aligned 1",
        (2,),
        "a wait for all groups comes before the next access to what this one covers",
    ),
    Equivalent(
        "chunk_sweep_kernel|chunk_reverse_kernel",
        "fence",
        "removed",
        r"fence\.proxy\.async",
        (1,),
        "behind the barrier that follows, the warps that normalise fence before they release their chunk to a wgmma",
    ),
    Equivalent(
        "hidden_gradient_kernel",
        "fence",
        "removed",
        r"wgmma\.fence",
        (2, 4),
        "no register of its products is touched between the fence of the products before and these",
    ),
    Equivalent(
        "pingpong_dynamic_conv_kernel|input_gradient_kernel",
        "fence",
        "removed",
        r"wgmma\.fence",
        (2, 3),
        "no register of its products is touched between the fence of the products before and these",
    ),
)


def reason_why_equivalent(kernel: str, lines: Mapping[int, str], mutant: Mutant) -> str:
    """Of a mutant of a kernel with these lines; empty for a bug."""
    for one in EQUIVALENT:
        if not re.search(one.kernel, kernel) or one.kind != mutant.kind or not re.fullmatch(one.what, mutant.what):
            continue
        places = [line for line, text in lines.items() if re.search(one.instruction, text)]
        if mutant.line in places and (not one.which or places.index(mutant.line) + 1 in one.which):
            return one.reason
    return ""
