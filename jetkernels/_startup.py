"""What a program of ours shows when it fails before its `main` runs: while the package, and torch, are imported."""

import os
import sys

TRACEBACK = "JETKERNELS_TRACEBACK"


def fail_with_a_sentence() -> None:
    """An import that fails (no library built, a wrong JETKERNELS_BACKEND) ends in one line, an interrupt in none of
    Python's.
    """

    def hook(kind, error, trace) -> None:
        if os.environ.get(TRACEBACK) or not issubclass(kind, (ImportError, OSError, KeyboardInterrupt)):
            sys.__excepthook__(kind, error, trace)
        else:
            print(
                f"jetkernels: {'interrupted' if kind is KeyboardInterrupt else ' '.join(str(error).split())}",
                file=sys.stderr,
            )

    sys.excepthook = hook
