"""The simulator's own test: bugs planted in the library's kernels by `hoppersim.mutate`, and how many are noticed.

    python -m tests.simulated.mutants --count 220 --json found.json --report hoppersim/docs/mutants.md
    python -m tests.simulated.mutants --kernels sweep --classes fence wait --count 20
    python -m tests.simulated.mutants --legal --count 60           # alterations that must not be noticed

Noticed: a Fault, or results that differ from those of the kernel as it is. The first run is early with seed 0; then
`--seeds` seeds in both timings until one notices.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent.parent
sys.path[:0] = [path for path in (str(ROOT), str(ROOT / "tests"), str(ROOT / "hoppersim")) if path not in sys.path]
