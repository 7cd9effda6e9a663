"""Waits that may say false, and the order of the phases of an mbarrier. Each planted bug is found at every schedule."""

import pytest
from async_ptx import INIT
from test_races import check, outcomes

# ---- A wait says false while its phase may be incomplete

LOAD = (
    INIT
    + """
@%p0 bra ISSUED;
mbarrier.arrive.expect_tx.shared::cta.b64 _, [%bar], 512;
cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%buffer], [%a0], 512, [%bar];
ISSUED:
"""
)
READ = "shl.b32 %r1, %tid, 2;\nadd.u32 %r1, %r1, %buffer;\nld.shared.u32 %r2, [%r1];\n"
ASK = "mbarrier.{}.parity.shared::cta.b64 %p5, [%bar], 0;\n"
IN_FLIGHT = "read while a copy is in flight", "uninitialised shared memory"


def tries(wait: str, most: int) -> str:
    """At most so many, then on."""
    return f"""
    mov.u32 %r3, 0;
    AGAIN: {ASK.format(wait)}
    @%p5 bra COMPLETE;
    add.u32 %r3, %r3, 1;
    setp.lt.u32 %p6, %r3, {most};
    @%p6 bra AGAIN;
    COMPLETE:
    """


@pytest.mark.parametrize("wait", ["try_wait", "test_wait"])
@pytest.mark.parametrize("most", [1, 4])
def test_the_result_of_a_wait_matters(wait, most):
    legal = tries(wait, 1_000_000) + "@!%p5 trap;\n"
    check(LOAD + tries(wait, most) + READ, LOAD + legal + READ, *IN_FLIGHT)


def test_one_thread_waits_once_for_all():
    once = "@!%p0 " + ASK.format("try_wait") + "bar.sync 0;\n"
    check(LOAD + once + READ, LOAD + "@%p0 bra WAITED;\nWAIT(%bar,0)\nWAITED:\nbar.sync 0;\n" + READ, *IN_FLIGHT)


def test_a_wait_for_what_is_known_to_be_complete_says_true():
    """The second wait comes after another warp's, or its phase precedes the first."""
    again = ASK.format("try_wait") + "@!%p5 trap;\n" + ASK.format("test_wait") + "@!%p5 trap;\n"
    after = "@%p0 bra WAITED;\nWAIT(%bar,0)\nWAITED:\nbar.sync 0;\n"
    check(LOAD + again, LOAD + after + again + READ, "trap")
    assert outcomes(INIT + again.replace(", 0;", ", 1;")) == {None}
