"""What a program of ours shows when it fails before its `main` runs: while the package, and torch, are imported."""

import os
import sys
from types import TracebackType

TRACEBACK = "JETKERNELS_TRACEBACK"


def fail_with_a_sentence() -> None:
    """Ends an import that fails, and an interrupt, in one line instead of a traceback.

    An import fails where no library was built, say, or JETKERNELS_BACKEND is wrong.
    """

    def hook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        if os.environ.get(TRACEBACK) or not issubclass(kind, (ImportError, OSError, KeyboardInterrupt)):
            sys.__excepthook__(kind, error, trace)
        else:
            said = "interrupted" if kind is KeyboardInterrupt else " ".join(str(error).split())
            print(f"jetkernels: {said}", file=sys.stderr)

    sys.excepthook = hook
