"""csrc/hopper holds what the kernels of the library use; what only the simulator's tests need is with these."""

import re
from collections import Counter

from support.paths import ROOT

FUNCTION = r"(?:__device__|JET_HOST_DEVICE|inline)\b[^;{}()]*?\b(\w+)\("
TYPE = r"\b(?:struct|class|enum class) (\w+)(?: : \w+)? \{"


def text_of(*folders: str) -> str:
    files = [path for folder in folders for path in sorted((ROOT / folder).rglob("*")) if path.is_file()]
    return re.sub(r"//.*", "", "\n".join(path.read_text() for path in files))


def test_every_wrapper_is_used_by_the_library():
    machine = text_of("csrc/hopper")
    defined = Counter(re.findall(FUNCTION, machine)) + Counter(re.findall(TYPE, machine))
    assert {"tma_load", "Mbarrier", "wgmma_fence", "swizzled"} <= set(defined)
    others = (folder for folder in (ROOT / "csrc").iterdir() if folder.name not in ("common", "cpu", "hopper"))
    users = text_of(*(str(folder.relative_to(ROOT)) for folder in others), "bindings")
    named = Counter(re.findall(r"\w+", machine + users))
    assert [name for name, times in defined.items() if named[name] <= times] == []
