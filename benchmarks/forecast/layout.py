"""Where the members of a kernel's argument lie in constant bank 0, from the struct's text in csrc/."""

import re
from functools import cache
from pathlib import Path

FIRST = 0x210  # of the arguments in bank 0, sm_90
SIZES = {
    "int": 4,
    "int32_t": 4,
    "uint32_t": 4,
    "float": 4,
    "bool": 1,
    "int8_t": 1,
    "int64_t": 8,
    "uint64_t": 8,
    "Dtype": 4,
    "IndexType": 4,
}


@cache
def _texts(csrc: Path) -> str:
    return "\n".join(re.sub(r"//.*", "", path.read_text()) for path in sorted(csrc.rglob("*.*h")))


@cache
def _members(csrc: Path, name: str) -> tuple[tuple[str, str], ...]:
    """(type, member) of a struct; type "*" for pointers. A name may stand for a template with one type."""
    if alias := re.search(rf"\busing {name} = (\w+)<(\w+)>;", _texts(csrc)):
        template = re.search(rf"template <class (\w+)>\s*struct {alias[1]} \{{", _texts(csrc))
        assert template, f"template {alias[1]}"
        return tuple((alias[2] if kind == template[1] else kind, member) for kind, member in _members(csrc, alias[1]))
    opens = rf"\bstruct (?:alignas\(\d+\) )?{name} \{{"
    found = re.search(opens + r"([^{}\n]*)\};", _texts(csrc)) or re.search(
        opens + r"(.*?)\n\};", _texts(csrc), re.DOTALL
    )
    assert found, f"struct {name}"
    body = re.sub(r"#\w+.*", "", found[1])
    while (without := re.sub(r"[^;{}]*\([^;{}]*\)[^;{}]*(\{[^{}]*\};?|;)|\{[^{}]*\}", "", body)) != body:  # functions
        body = without
    members = []
    for line in body.split(";"):
        line = re.sub(r"\bconst\b|=[^,]*", "", line).strip()
        if not line or "static" in line:
            continue
        kind, _, names = line.partition(" ")
        for member in names.split(","):
            members.append(("*" if "*" in kind + member else kind, member.strip(" *")))
    return tuple(members)


def _place(csrc: Path, name: str, at: int, prefix: str, out: dict[str, tuple[int, int]]) -> tuple[int, int]:
    """Puts a struct at `at`, or the next address that is aligned; returns its end and its alignment."""
    widest, begin = 1, len(out)
    for kind, member in _members(csrc, name):
        if kind == "*" or kind in SIZES:
            size = align = 8 if kind == "*" else SIZES[kind]
            at = -(-at // align) * align
            out[prefix + member] = (at, size)
            at += size
        else:
            _, align = _place(csrc, kind, 0, "", {})
            at, _ = _place(csrc, kind, -(-at // align) * align, f"{prefix}{member}.", out)
        widest = max(widest, align)
    assert len(out) > begin, f"struct {name} is empty"
    return -(-at // widest) * widest, widest


def constants(csrc: Path, struct: str, values: dict[str, int], first: int = FIRST) -> dict[int, int]:
    """Words of bank 0 when the first argument is a `struct` with these values."""
    places: dict[str, tuple[int, int]] = {}
    _place(csrc, struct, first, "", places)
    words = {}
    for member, value in values.items():
        if member in places:  # one that has gone is no longer asked for
            at, size = places[member]
            words[at] = value & 0xFFFFFFFF
            if size == 8:
                words[at + 4] = value >> 32 & 0xFFFFFFFF
    return words
