"""Random calls of the delta rules and the convolutions, on every backend and dtype, forward and backward, against
the fp64 definitions.

    python -m tests.fuzz --seconds 60                          # everything that this machine can run
    python -m tests.fuzz --op dynamic_conv --backend plain --cases 1000
    python -m tests.fuzz --case 17 --op dynamic_conv --backend plain   # one case again, as a failure prints it
    python -m tests.fuzz --sanitize address --cases 20000      # ASan and UBSan over the CPU library, bindings included
    python -m tests.fuzz --sanitize thread --cases 20000

`draw` makes a case from its number; `check` says what must be true of it; `campaign` runs cases in processes of their
own and counts; `sanitize` builds and runs a library that a sanitizer watches.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
sys.path[:0] = [path for path in (str(ROOT), str(ROOT / "tests")) if path not in sys.path]  # `reference`, `cases`
