"""Options of launches, and what is known of those that ran."""

import contextlib

from ._native import native


@contextlib.contextmanager
def simulate(
    *,
    timing: str = "early",
    seed: int = 0,
    host_threads: int = 2,
    max_instructions: int = 20_000_000_000,
    check_global: bool = True,
):
    """Options of the launches in the block; raises at its end the Fault that the CUDA runtime only reported.

    That is the first finding, or the first call that is not modelled ("unsupported runtime call").

    ``timing``: asynchronous effects at once ("early") or as late as allowed ("late"). ``seed``: order of warps and
    CTAs, 0 in order.
    """
    simulator = native()
    before = simulator.options()
    simulator.raise_fault()
    simulator.clear_launches()
    simulator.set_options(timing, seed, host_threads, max_instructions, check_global)
    try:
        yield
    except Exception as error:
        try:
            simulator.raise_fault()
        except simulator.Fault as fault:
            raise fault from error
        raise
    finally:
        simulator.set_options(**before)
    simulator.raise_fault()


def launches() -> list[dict]:
    """Launches since the last ``simulate`` block began: kernel, grid, block, cluster, shared bytes, counters."""
    return native().launches()


def last_counters() -> dict:
    """Counters of the last launch."""
    records = launches()
    if not records:
        raise RuntimeError("nothing was launched since the last simulate() began")
    return records[-1]["counters"]
