"""Mutants that are no bugs, with the reason why the altered kernel is right too, and escapes that are understood."""

import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from hoppersim.mutate import Mutant


class Known(NamedTuple):
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
    Known(
        "attention_step_kernel",
        "wait",
        "removed|one more group may be left",
        r"cp\.async\.wait_group 0",
        (),
        "the loop has waited for every group with a copy in it; the groups left are empty",
    ),
    Known(
        r"chunk_sweep_kernel<SweepConfig<64, [03]",
        "wait",
        "removed|one more group may be left",
        r"wgmma\.wait_group\.sync\.aligned 1",
        (2,),
        "a wait for all groups comes before the next access to what this one covers",
    ),
    Known(
        "chunk_sweep_kernel|chunk_reverse_kernel",
        "fence",
        "removed",
        r"fence\.proxy\.async",
        (1,),
        "behind the barrier that follows, the warps that normalise fence before they release their chunk to a wgmma",
    ),
    Known(
        "chunk_gradients_kernel",
        "fence",
        "removed",
        r"wgmma\.fence",
        (6,),
        "no register of its products is touched between the fence of the products before and these",
    ),
    Known(
        "hidden_gradient_kernel",
        "fence",
        "removed",
        r"wgmma\.fence",
        (2, 4),
        "no register of its products is touched between the fence of the products before and these",
    ),
    Known(
        "pingpong_dynamic_conv_kernel|input_gradient_kernel",
        "fence",
        "removed",
        r"wgmma\.fence",
        (2, 3),
        "no register of its products is touched between the fence of the products before and these",
    ),
    Known(
        r"hidden_gradient_kernel<HiddenGradientConfig<\w+, 4, 64",
        "parity",
        "toggle removed",
        r"xor\.b32",
        (3, 6),
        "the ring has an even number of stages, and this is the step from an even one to an odd one",
    ),
    Known(
        "recurrent_kernel<RecurrentConfig<float, 32, 3",
        "stage",
        "buffers not taken in turn",
        r"xor\.b32",
        (),
        "a block's step has one token: the buffer is used once",
    ),
    Known(
        "chunk_gradients_kernel",
        "fence",
        "removed",
        r"wgmma\.fence",
        (2, 5),
        "its products are the first instructions that touch their registers",
    ),
    Known(
        "chunk_join_kernel",
        "wait",
        "falls through",
        r"mbarrier\.try_wait",
        (1, 2),
        "the ring is empty at first: there is nothing to wait for",
    ),
    Known(
        "chunk_join_kernel",
        "barrier",
        "removed",
        r"bar\.warp\.sync",
        (1,),
        "it keeps the lanes together, and passes nothing from one to another",
    ),
    Known(
        "weight_gradient_kernel",
        "barrier",
        "removed",
        r"bar\.warp\.sync",
        (),
        "barrier.cluster follows at once, which all lanes execute together",
    ),
    Known(
        "chunk_sweep_kernel|chunk_reverse_kernel",
        "barrier",
        "removed",
        r"bar\.warp\.sync",
        (),
        "the stage was read by wgmma, and by lanes before its wait, which the warp executes as one",
    ),
    Known(
        "attention_step_kernel",
        "barrier",
        "removed",
        r"bar\.warp\.sync",
        (3, 4),
        "what is overwritten was read by ldmatrix, which the warp executes as one",
    ),
    Known(
        "single_tile_dynamic_conv_kernel",
        "barrier",
        "removed",
        r"bar\.warp\.sync",
        (),
        "the producer's lanes meet there, and pass nothing to each other",
    ),
    Known(
        "chunk_sweep_kernel|chunk_reverse_kernel",
        "fence",
        "removed",
        r"fence\.mbarrier_init",
        (),
        "fence.proxy.async of the same thread follows, before the barrier that tells the others",
    ),
    Known(
        "chunk_gradients_kernel",
        "stage",
        "release before the last read",
        r"mbarrier\.arrive",
        (5,),
        "only behind a chunk's last head, where copies wait for the release of q and k too, which follows these reads",
    ),
    Known(
        "chunk_gradients_kernel",
        "barrier",
        "removed",
        r"bar\.warp\.sync",
        (4,),
        "only behind a chunk's last head, where copies wait for the release of q and k too, which follows these reads",
    ),
    Known(
        "chunk_sweep_kernel<SweepConfig<64, 0|chunk_reverse_kernel",
        "fence",
        "removed",
        r"fence\.proxy\.async",
        (5,),
        "of a tile of fewer than 64 rows, which threads read and no copy",
    ),
    Known(
        "chunk_reverse_kernel",
        "wait",
        "removed|one more group may be left",
        r"cp\.async\.bulk\.wait_group\.read",
        (1, 2, 3),
        "the wait before the other of a chunk's two stores covers the group that this one leaves",
    ),
    Known(
        "chunk_sweep_kernel|chunk_reverse_kernel",
        "wait",
        "falls through",
        r"mbarrier\.try_wait",
        (3,),
        "the wait for the normalising warps follows, and they have waited for the same phase",
    ),
    Known(
        "chunk_reverse_kernel",
        "barrier",
        "removed",
        r"bar\.sync %r\d+",
        (7,),
        "wait and barrier of the other of a chunk's two stores come between this buffer's read and its next write",
    ),
)


# Of bugs that no run notices: why.
ESCAPES = (
    Known(
        r"single_tile_dynamic_conv_kernel<SingleTileConfig<\w+, 4, 4, 1",
        "barrier",
        "removed",
        r"bar\.sync",
        (),
        "the bias from one warp to the others of its warpgroup: what they did before a wgmma that they issue together "
        "is taken as ordered before its wait, which PTX does not say",
    ),
    Known(
        "chunk_plan_kernel",
        "barrier",
        "removed",
        r"bar\.sync",
        (),
        "it separates a pass of the loop over sequences from the next; a second pass needs more than 1024 sequences",
    ),
)


def reason(known: Sequence[Known], kernel: str, lines: Mapping[int, str], mutant: Mutant) -> str:
    """Of the first that this mutant of a kernel with these lines is; empty where there is none."""
    for one in known:
        if not re.search(one.kernel, kernel) or one.kind != mutant.kind or not re.fullmatch(one.what, mutant.what):
            continue
        places = [line for line, text in lines.items() if re.search(one.instruction, text)]
        if mutant.line in places and (not one.which or places.index(mutant.line) + 1 in one.which):
            return one.reason
    return ""
