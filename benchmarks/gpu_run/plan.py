"""The parts of a run in order of value: what is right before what is fast, and first what decides."""

from benchmarks.gpu_run.supervisor import Part

HERE = "benchmarks.gpu_run"
SECONDS = 540
# At most 8 files come back from some machines: four of rows, results.json, summary.md, broken.json, run.log.
LIBRARY = Part("library", f"{HERE}.library", "smoke", share=60, most=240, start=60, silence=240)
FAILURES = Part("failures", f"{HERE}.failures", "smoke", share=42, most=42, workers=6, silence=42, watchdog=True)
WARM = Part("warm", f"{HERE}.warm", "rest", share=0)
PARTS = (
    Part(
        "smoke",
        f"{HERE}.smoke",
        "smoke",
        share=45,
        most=45,
        workers=6,
        ahead=2,
        start=30,
        silence=20,
        culprits=1,
        watchdog=True,
    ),
    Part("key", f"{HERE}.key", "key", share=110, most=110, ahead=1, start=30, silence=25, quiet=True),
    Part(
        "tests",
        f"{HERE}.op_tests",
        "tests",
        share=110,
        most=110,
        workers=11,
        silence=30,
        culprits=6,
        watchdog=True,
        environment={"HYPOTHESIS_PROFILE": "gpu", "OMP_NUM_THREADS": "1"},
    ),
    Part("sizes", f"{HERE}.sizes", "rest", share=60, ahead=1, start=30, quiet=True),
    Part("peers", f"{HERE}.versus", "rest", share=80, ahead=1, start=30, silence=40, quiet=True),
    Part("model", f"{HERE}.model", "rest", share=60, most=75, silence=40, culprits=1, quiet=True),
    Part("simulator", f"{HERE}.simulator", "rest", share=20, most=30, culprits=2),
    Part("sanitizer", f"{HERE}.sanitizer", "rest", share=45, most=90, workers=3, silence=90, culprits=1),
)


def chosen(names: str) -> list[Part]:
    """Parts in the order in which they were named."""
    known = {part.name: part for part in PARTS}
    wanted = [name.strip() for name in names.split(",") if name.strip()]
    if unknown := [name for name in wanted if name not in known]:
        raise ValueError(f"unknown part {', '.join(unknown)}; there are {', '.join(known)}")
    return [known[name] for name in dict.fromkeys(wanted)]
