"""Long random campaigns beside the fuzzer of the ops, each a program: `python -m tests.campaigns.<name>`."""

import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
sys.path[:0] = [path for path in (str(ROOT), str(ROOT / "tests")) if path not in sys.path]  # `jetkernels`, `support`
