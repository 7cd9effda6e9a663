"""PTX of one kernel as statements that can be rewritten in place: what `mutate` works on."""

import re
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

_GAP = re.compile(r"(?:\s+|//[^\n]*|/\*.*?\*/)+", re.S)
_LABEL = re.compile(r"([\w$]+)\s*:(?!:)")
_TARGETS = re.compile(r"\s*\.(?:branchtargets|callprototype|calltargets)\b[^;]*;")
_TO_LINE_END = re.compile(r"\.(?:loc|file)\b[^\n]*")
_GUARD = re.compile(r"@(!?)([%\w$]+)\s*")
REGISTER = re.compile(r"(?<![\w$.])%?[A-Za-z_$][\w$]*")
# One result, no memory, no wait: may be computed anywhere and as often as wanted.
PURE = frozenset(
    "add sub mul mad mul24 mad24 neg abs min max and or xor not shl shr shf lop3 bfe bfi prmt mov cvt cvta selp setp "
    "set slct fma div rem popc clz brev sad bmsk ex2 lg2 rcp rsqrt sqrt tanh copysign testp".split()
)


@dataclass(frozen=True, eq=False)
class Statement:
    """``kind``: "instruction", "label", "open", "close" or "directive"; ``begin`` and ``end`` in the kernel's text."""

    kind: str
    text: str
    begin: int
    end: int
    line: int
    scope: int  # number of the innermost pair of braces

    @cached_property
    def guard(self) -> tuple[bool, str] | None:
        """Whether it is negated, and the predicate."""
        found = _GUARD.match(self.text)
        return (found[1] == "!", found[2]) if found else None

    @cached_property
    def bare(self) -> str:
        """Without guard."""
        return _GUARD.sub("", self.text, count=1) if self.text.startswith("@") else self.text

    @cached_property
    def opcode(self) -> str:
        """With modifiers: "mbarrier.try_wait.parity.shared::cta.b64"."""
        return self.bare.split(None, 1)[0].rstrip(";") if self.bare else ""

    @cached_property
    def operands(self) -> list[str]:
        """As written; those in braces and brackets stay together."""
        rest = self.bare[len(self.opcode) :].strip()
        found, depth, begin = [], 0, 0
        for i, c in enumerate(rest):
            depth += (c in "{[(") - (c in "}])")
            if c == "," and depth == 0:
                found.append(rest[begin:i].strip())
                begin = i + 1
        return [*found, rest[begin:].strip()] if rest else []

    def is_a(self, *opcodes: str) -> bool:
        """Whether the opcode is one of these, or begins with one and a dot."""
        return any(self.opcode == name or self.opcode.startswith(name + ".") for name in opcodes)

    def with_operands(self, operands: list[str], opcode: str | None = None) -> str:
        guard = self.text[: len(self.text) - len(self.bare)]
        return f"{guard}{opcode or self.opcode} {', '.join(operands)}"


class Kernel:
    """``lines``: as `ptx_of` gives them."""

    def __init__(self, lines: Mapping[int, str]):
        self.first = min(lines)
        self.text = "\n".join(lines[number] for number in sorted(lines))
        self._line_starts = [0, *(i + 1 for i, c in enumerate(self.text) if c == "\n")]
        self.statements = list(self._parse())
        self.instructions = [s for s in self.statements if s.kind == "instruction"]
        self.labels = {(s.text.rstrip(" :"), s.scope): s for s in self.statements if s.kind == "label"}
        self.definitions: dict[str, list[Statement]] = defaultdict(list)  # of registers outside of inner scopes too
        for s in self.instructions:
            for name in written(s):
                self.definitions[name].append(s)

    def _line(self, offset: int) -> int:
        return self.first + bisect_right(self._line_starts, offset) - 1

    def _parse(self):
        at = self.text.index("{", self.text.index(")")) + 1
        scopes, count = [0], 0
        while True:
            if gap := _GAP.match(self.text, at):
                at = gap.end()
            if at >= len(self.text):
                return
            begin, text = at, self.text
            if text[at] == "{":
                count += 1
                scopes.append(count)
                kind, at = "open", at + 1
            elif text[at] == "}":
                kind, at = "close", at + 1
            elif label := _LABEL.match(text, at):
                kind, at = "label", label.end()
            elif rest := _TO_LINE_END.match(text, at):
                kind, at = "directive", rest.end()
            else:
                kind, at = ("directive" if text[at] == "." else "instruction"), text.index(";", at)
            if kind == "label" and (targets := _TARGETS.match(text, at)):
                kind, at = "directive", targets.end()
            body = " ".join(text[begin:at].split())
            at += text.startswith(";", at) and kind in ("instruction", "directive")
            if body:
                yield Statement(kind, body, begin, at, self._line(begin), scopes[-1])
            if kind == "close":
                scopes.pop()
                if not scopes:
                    return

    def target(self, branch: Statement) -> Statement | None:
        """The label that it goes to; None for `brx` and where no such label is."""
        if not branch.is_a("bra"):
            return None
        name = branch.operands[0]
        return self.labels.get((name, branch.scope)) or self.labels.get((name, 0))

    def edit(self, *changes: tuple[Statement, str]) -> dict[int, str | None]:
        """The lines that change when each statement, with its semicolon, is replaced by a text."""
        begin = self.text.rfind("\n", 0, min(s.begin for s, _ in changes)) + 1
        last = max(s.end for s, _ in changes)
        end = self.text.find("\n", last) if "\n" in self.text[last:] else len(self.text)
        old = new = self.text[begin:end]
        for s, text in sorted(changes, key=lambda change: change[0].begin, reverse=True):
            breaks = "\n" * self.text.count("\n", s.begin, s.end)
            new = new[: s.begin - begin] + " ".join(text.split()) + breaks + new[s.end - begin :]
        return self._changed(old, new, self._line(begin))

    def changed_lines(self, text: str) -> dict[int, str | None]:
        """Of a text of the kernel with as many lines."""
        return self._changed(self.text, text, self.first)

    def _changed(self, old: str, new: str, first: int) -> dict[int, str | None]:
        pairs = zip(old.split("\n"), new.split("\n"), strict=True)
        return {first + i: b or None for i, (a, b) in enumerate(pairs) if a != b}

    def sources(self, registers: list[str], through: frozenset[str]) -> list[Statement]:
        """The instructions of kinds ``through`` that these registers' values come from, nearest first."""
        seen, queue, found = set(registers), list(registers), []
        while queue:
            for s in self.definitions.get(queue.pop(0), ()):
                if s.opcode.split(".")[0] not in through or s in found:
                    continue
                found.append(s)
                for name in read(s):
                    if name not in seen:
                        seen.add(name)
                        queue.append(name)
        return found


def registers_in(text: str) -> list[str]:
    return [name for name in REGISTER.findall(text) if not name.startswith("%") or name.rstrip("0123456789") != name]


def written(s: Statement) -> list[str]:
    """Registers that an instruction sets, for those that set their first operand."""
    head = s.opcode.split(".")[0]
    if not s.operands or head in ("st", "bar", "barrier", "bra", "ret", "exit", "fence", "membar", "red", "call", "cp"):
        return []
    first = s.operands[0]
    return [] if first.startswith("[") else registers_in(first.replace("|", ","))


def read(s: Statement) -> list[str]:
    """Registers that an instruction takes, its guard among them."""
    operands = s.operands[1:] if written(s) else s.operands
    guard = [s.guard[1]] if s.guard else []
    return [*guard, *registers_in(", ".join(operands))]
