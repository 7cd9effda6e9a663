"""The PTX of registered kernels: read, and replaced for a while."""

import contextlib
import re
from collections.abc import Mapping

from ._native import native

_edited: set[str] = set()


def _lines_of(text: str, kernel: str) -> dict[int, str]:
    """Lines from the entry's name to the brace that closes its body, by their numbers in the module."""
    entry = re.search(rf"\.entry\s+{re.escape(kernel)}\s*\(", text)
    begin = text.index("{", entry.end())
    depth = 0
    for brace in re.finditer(r"[{}]", text[begin:]):
        depth += 1 if brace[0] == "{" else -1
        if depth == 0:
            break
    first = text.count("\n", 0, entry.start()) + 1
    return dict(enumerate(text[: begin + brace.end()].split("\n")[first - 1 :], first))


def ptx_of(kernel: str) -> dict[int, str]:
    """Lines of the PTX of a registered kernel, by the numbers that reports give them.

    ``kernel``: its mangled name (`launches()` has it).
    """
    return _lines_of(native().module_text(kernel), kernel)


@contextlib.contextmanager
def edited(kernel: str, lines: Mapping[int, str | None]):
    """Launches in the block run the kernel with other PTX in these lines; None takes a line away.

    Other lines keep their numbers: line breaks within a new text become spaces. A text that does not parse raises its
    Fault here.
    """
    simulator = native()
    whole = simulator.module_text(kernel)
    own, module = _lines_of(whole, kernel), whole.split("\n")
    for number, text in lines.items():
        if number not in own:
            raise ValueError(f"line {number} is not one of {kernel}, which has lines {min(own)} to {max(own)}")
        module[number - 1] = (text or "").replace("\n", " ")
    if kernel in _edited:
        raise RuntimeError(f"{kernel} is edited already: give one block all lines")
    simulator.replace_kernel(kernel, "\n".join(module))
    _edited.add(kernel)
    try:
        yield
    finally:
        _edited.remove(kernel)
        simulator.restore_kernel(kernel)
