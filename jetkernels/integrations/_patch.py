"""What was replaced in another library, and how it is undone."""

from types import ModuleType, TracebackType
from typing import Any


class Patch:
    """Names of modules that hold functions of jetkernels; printed, it lists them.

    A context manager: at the end of the block the names hold what they held before.

    Attributes:
        functions: what is served, as dotted names.
    """

    def __init__(self, library: str):
        self.functions: list[str] = []
        self._library = library
        self._replaced: list[tuple[ModuleType, str, Any, Any]] = []

    def replace(self, module: ModuleType, name: str, replacement: Any) -> None:
        """Puts ``replacement`` under a name of ``module``, until :meth:`undo`."""
        self._replaced.append((module, name, getattr(module, name), replacement))
        setattr(module, name, replacement)
        self.functions.append(f"{module.__name__}.{name}")

    def undo(self) -> None:
        """Puts back what was there; a second call does nothing.

        A name that someone has given another value since keeps that.
        """
        for module, name, original, replacement in reversed(self._replaced):
            if getattr(module, name, None) is replacement:
                setattr(module, name, original)
        self._replaced.clear()
        self.functions.clear()

    def __enter__(self) -> "Patch":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.undo()

    def __repr__(self) -> str:
        if not self.functions:
            return f"jetkernels serves nothing of {self._library} (any more)"
        return "\n  ".join([f"jetkernels serves, of {self._library}:", *self.functions])
