"""Every kernel once, each in a process of its own: right, wrong, or what it broke."""

from functools import cache

from benchmarks import ops
from benchmarks.gpu_run.supervisor import Job
from benchmarks.measure import ERROR_CEILING
from benchmarks.ops import Case
from benchmarks.shapes import SHAPES, Draw

JUDGES = True  # runs what is broken
WITH_TOKENS = 8192  # one long sequence: segments, and the join between them


@cache
def cases() -> dict[str, Case]:
    """By name: what is most wanted first."""
    b2, b4, wide = SHAPES
    found = [
        ops.chunk(b2, 1, WITH_TOKENS),
        ops.chunk(b4, 1, 130),
        *ops.small(b2),
        ops.chunk(wide, 1, 130),
        ops.recurrent(b4, 3, ops.FP32),
    ]
    return {case.name: case for case in found}


def describe() -> list[str]:
    return [f"{len(cases())} calls against plain PyTorch in fp64, each in a process of its own: {', '.join(cases())}"]


def jobs(settings: dict) -> list[Job]:
    return [Job(name, (name,)) for name in cases()]


def verdict(served: str, errors: dict[str, float]) -> dict[str, object]:
    worst = max(errors.values(), default=0.0)
    row: dict[str, object] = {"served_by": served, "rms_error": worst}
    if not all(error <= ERROR_CEILING for error in errors.values()):  # NaN never passes
        told = ", ".join(f"{name} {error:.1e}" for name, error in errors.items())
        return {"status": "wrong", **row, "failed": f"wrong: RMS errors {told}"}
    if served != "kernel":
        return {"status": "plain", **row, "failed": f"no kernel: {served}"}
    return {"status": "right", **row}


def work(name: str, context) -> dict[str, object]:
    from jetkernels import ops as _  # noqa: F401  (registers torch.ops.jet)

    case = cases()[name]
    served = ops.served_by(case.op, case.make(Draw(context.device, seed=1)))
    args = case.make(Draw(context.device, seed=1))
    expected = ops.plain_results(case.op, args)
    return verdict(served, ops.errors(ops.results(case.op, args), expected))
