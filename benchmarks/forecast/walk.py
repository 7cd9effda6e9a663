"""The way that a warp takes through machine code.

Integers that follow from the thread's number and from constants are computed, for some lanes of the warp; branches that
hang on them are taken as the hardware would, both ways where lanes disagree. Where a branch hangs on something else
(arguments, memory), a `Way` says what matters.
"""

import re
import struct
from collections import Counter
from collections.abc import Callable, Sequence
from typing import NamedTuple

from benchmarks.forecast.sass import Graph, Instruction, Loop

LANES = (0, 1, 2, 4, 8, 16, 31)
UP_TO_NEXT = (1, 1, 2, 4, 8, 15, 1)  # lanes that each of these stands for
ACCESSES = "LDS STS LDSM STSM LDG STG LD ST".split()
WORD = 0xFFFFFFFF
Value = tuple[int | None, ...]  # of each lane
UNKNOWN: Value = (None,) * len(LANES)


class Work(NamedTuple):
    """How often a loop whose condition is unknown turns.

    Until a warp has executed ``total`` instructions that match ``marker``.
    """

    marker: str
    total: float


class Way(NamedTuple):
    """Where a condition is unknown: through as many instructions that match `through` as possible, none of `around`."""

    through: str = "(?!)"
    around: str = "(?!)"
    loops: Sequence[Work] = ()
    constants: dict[int, int] = {}  # of constant bank 0, by offset: arguments of the kernel
    turns: dict[int, int] = {}  # of loops, by header, where no marker is met


def _signed(x: int) -> int:
    return x - (1 << 32) if x >> 31 else x


def _logic(table: int, a: int, b: int, c: int) -> int:
    out = 0
    for bits in range(8):
        if table >> bits & 1:
            out |= (a if bits & 4 else ~a) & (b if bits & 2 else ~b) & (c if bits & 1 else ~c)
    return out & WORD


COMPARE = {
    "LT": lambda a, b: a < b,
    "LE": lambda a, b: a <= b,
    "GT": lambda a, b: a > b,
    "GE": lambda a, b: a >= b,
    "EQ": lambda a, b: a == b,
    "NE": lambda a, b: a != b,
}


class Lanes:
    """Registers and predicates of a warp, as far as they are known."""

    def __init__(self, warp: int, constants: dict[int, int]):
        self.warp, self.constants = warp, constants
        self.values: dict[str, Value] = {}
        self.mask = (True,) * len(LANES)

    def operand(self, name: str) -> Value:
        name = name.replace(".reuse", "").strip()
        if name.startswith("-"):
            # Its carry is the hardware's.
            return tuple(None if v is None else (1 << 32) - v for v in self.operand(name[1:]))
        if name.startswith("~"):
            return tuple(None if v is None else ~v & WORD for v in self.operand(name[1:]))
        if name.startswith("!"):
            return tuple(None if v is None else 1 - v for v in self.operand(name[1:]))
        if name in ("RZ", "URZ"):
            return (0,) * len(LANES)
        if name in ("PT", "UPT"):
            return (1,) * len(LANES)
        if re.fullmatch(r"-?0x[0-9a-f]+", name):
            return (int(name, 16) & WORD,) * len(LANES)
        if found := re.fullmatch(r"c\[0x0\]\[(0x[0-9a-f]+|RZ)\]", name):
            known = self.constants.get(0 if found[1] == "RZ" else int(found[1], 16))
            return (known,) * len(LANES)
        return self.values.get(name, UNKNOWN)

    def predicate(self, text: str) -> Value:
        return self.operand(text.removeprefix("@")) if text else (1,) * len(LANES)

    def _put(self, name: str, value: Value, under: Value) -> None:
        if name in ("RZ", "URZ", "PT", "UPT"):
            return
        old = self.values.get(name, UNKNOWN)
        keep = [not m or u == 0 for m, u in zip(self.mask, under)]
        self.values[name] = tuple(o if k else None if u is None else v for o, v, k, u in zip(old, value, keep, under))

    def _map(self, f: Callable, *names: str) -> Value:
        """f of the operands, lane by lane, where all are known."""
        columns = zip(*map(self.operand, names))
        return tuple(None if None in column else f(*column) for column in columns)

    def _result(self, x: Instruction, a: list[str]) -> Value:
        op, name = x.opcode, x.name.removeprefix("U")
        if name in ("S2R", "S2UR"):
            if a[1] == "SR_TID.X":
                return tuple(32 * self.warp + lane for lane in LANES)
            zero = a[1].startswith(("SR_TID", "SR_CTAID", "SR_CgaCtaId"))
            return LANES if a[1] == "SR_LANEID" else (0,) * len(LANES) if zero else UNKNOWN
        if op.startswith("CS2R") and a[1] == "SRZ":
            return (0,) * len(LANES)
        if name in ("MOV", "R2UR", "LDC") or op == "ULDC":
            return self._map(lambda v: v, a[-1])
        if name == "HFMA2" and a[1] == "-RZ" and a[2] == "RZ":  # two halves, written as floating-point numbers
            return (int.from_bytes(struct.pack("<2e", float(a[4]), float(a[3])), "little"),) * len(LANES)
        if name == "SHFL" and ".IDX" in op:
            return (self.operand(a[1])[0],) * len(LANES) if a[2] == "RZ" else UNKNOWN
        if name == "IMAD":
            if ".WIDE" in op or ".HI" in op:
                return self._product(op, a)[".HI" in op]
            if ".X" in op:
                return self._map(lambda p, q, r, carry: (p * q + r + carry) & WORD, *a[1:5])
            return self._map(lambda p, q, r: (p * q + r) & WORD, *a[1:4])
        if name == "IADD3" and ".64" not in op:
            return self._map(lambda *v: sum(v) & WORD, *self._summands(a))
        if name == "VIADD":
            return self._map(lambda p, q: (p + q) & WORD, *a[1:3])
        if name == "IABS":
            return self._map(lambda p: abs(_signed(p)), a[1])
        if name == "LOP3":
            first = 2 if re.fullmatch(r"U?P\w", a[0]) else 1
            table = int(a[first + 3], 16)
            return self._map(lambda p, q, r: _logic(table, p, q, r), *a[first : first + 3])
        if name == "SHF":
            return self._shift(op, a)
        if name == "LEA" and ".HI" in op:
            carry = a[-1] if "X" in op.split(".") else "RZ"
            if ".SX32" in op:
                return self._map(lambda p, q, s, carry: ((_signed(p) << s >> 32) + q + carry) & WORD, *a[1:4], carry)
            return self._map(
                lambda p, q, high, s, carry: (((high << 32 | p) << s >> 32) + q + carry) & WORD, *a[1:5], carry
            )
        if name == "LEA":
            return self._map(lambda p, q, s: ((p << s) + q) & WORD, *[s for s in a[1:] if "P" not in s][:3])
        if name == "SEL":
            return self._map(lambda p, q, c: p if c else q, *a[1:4])
        if name in ("VIMNMX", "VIADDMNMX"):
            read = int if ".U32" in op else _signed
            first = (lambda p: p) if name == "VIMNMX" else (lambda p, q: p + q & WORD)
            return self._map(lambda *v: (min if v[-1] else max)(first(*v[:-2]), v[-2], key=read), *a[1:])
        return UNKNOWN

    def _product(self, op: str, a: list[str]) -> tuple[Value, Value]:
        """Of 32 x 32 + 64 bits, the lower and the upper half."""
        read = (lambda v: v) if ".U32" in op else _signed
        pair = re.fullmatch(r"(U?R)(\d+)", a[3].replace(".reuse", ""))
        upper = f"{pair[1]}{int(pair[2]) + 1}" if pair else a[3]
        both = self._map(lambda p, q, low, high: read(p) * read(q) + low + (high << 32), *a[1:4], upper)
        return tuple(None if v is None else v & WORD for v in both), tuple(
            None if v is None else v >> 32 & WORD for v in both
        )

    def _summands(self, a: list[str]) -> list[str]:
        """Of an IADD3: registers, and the carries that come in behind them."""
        rest = [s for s in a[1:3] if not re.fullmatch(r"U?P\w", s)] + a[3:]
        return [s for s in rest if s not in ("!PT", "!UPT")]

    def _shift(self, op: str, a: list[str]) -> Value:
        if ".L" in op and ".HI" not in op:
            return self._map(lambda p, s: (p << s) & WORD if s < 32 else 0, a[1], a[2])
        if ".R" in op and ".HI" in op:
            return self._map(lambda s, p: ((_signed(p) if ".S32" in op else p) >> s) & WORD, a[2], a[3])
        return UNKNOWN

    def _compare(self, x: Instruction, a: list[str]) -> Value:
        parts = x.opcode.split(".")
        read = (lambda v: v) if "U32" in parts else _signed
        both = self._map(lambda p, q: int(COMPARE[parts[1]](read(p), read(q))), a[2], a[3])
        if "EX" in parts:  # the upper halves of 64 bits; the lower ones decide where these are equal
            equal = self._map(lambda p, q: p == q, a[2], a[3])
            both = tuple(low if e else high for e, low, high in zip(equal, self.operand(a[5]), both))
        also = self.operand(a[4])
        if "AND" in parts:
            return tuple(0 if 0 in (p, q) else None if None in (p, q) else 1 for p, q in zip(both, also))
        return tuple(1 if 1 in (p, q) else None if None in (p, q) else 0 for p, q in zip(both, also))

    def execute(self, x: Instruction) -> None:
        a = [part.strip() for part in x.operands.split(",")]
        under = self.predicate(x.predicate)
        if x.name == "SHFL":
            self._put(a.pop(0), UNKNOWN, under)
        if x.name in ("ISETP", "UISETP") and x.opcode.split(".")[1] in COMPARE:
            value = self._compare(x, a) if len(a) > 4 else UNKNOWN
            self._put(a[1], UNKNOWN, under)
            self._put(a[0], value, under)
        elif x.name in ("PLOP3", "UPLOP3"):
            table = int(a[5], 16)
            self._put(a[0], self._map(lambda p, q, r: _logic(table, -p & 1, -q & 1, -r & 1) & 1, *a[2:5]), under)
            self._put(a[1], UNKNOWN, under)
        elif x.name in ("LOP3", "ULOP3") and re.fullmatch(r"U?P\w", a[0]):
            value = self._result(x, a)
            self._put(a[1], value, under)
            self._put(a[0], tuple(None if v is None else int(v != 0) for v in value), under)
        elif x.name == "ELECT":
            self._put(next(s for s in a if re.fullmatch(r"U?P\d", s)), (1, *[0] * (len(LANES) - 1)), under)
        else:
            values = [self._result(x, a) if re.match(r"U?R", a[0]) else UNKNOWN, UNKNOWN, UNKNOWN, UNKNOWN]
            if ".WIDE" in x.opcode and ".X" not in x.opcode:
                values[1] = self._product(x.opcode, a)[1]
            if x.opcode in ("LDC.64", "ULDC.64") and (found := re.search(r"c\[0x0\]\[(0x[0-9a-f]+)\]", a[1])):
                values[1] = self.operand(f"c[0x0][{int(found[1], 16) + 4:#x}]")
            if x.name in ("LEA", "ULEA") and ".HI" not in x.opcode and re.fullmatch(r"U?P\d", a[1]):
                carry = self._map(lambda p, q, s: ((p << s & WORD) + q) >> 32 & 1, *a[2:5])
                self._put(a[0], values[0], under), self._put(a[1], carry, under)
                return
            if x.name in ("IADD3", "UIADD3") and ".64" not in x.opcode and re.fullmatch(r"U?P\d", a[1]):
                carry = self._map(lambda *v: sum(v) >> 32 & 1, *self._summands(a))
                self._put(a[0], values[0], under), self._put(a[1], carry, under)
                return
            for name in self._written(x, a):
                first = re.fullmatch(r"(U?R)(\d+)", a[0])
                position = int(name.lstrip("UR")) - int(first[2]) if first and name.startswith(first[1]) else 3
                self._put(name, values[min(position, 3)], under)

    def forget(self, x: Instruction) -> None:
        for name in self._written(x, [part.strip() for part in x.operands.split(",")]):
            self.values.pop(name, None)

    def _written(self, x: Instruction, a: list[str]) -> list[str]:
        if x.name in ("STS", "STG", "ST", "BRA", "BAR", "RED", "STSM") or not a[0]:
            return []
        predicates = [name for name in a[:3] if re.fullmatch(r"U?P\d", name)]
        found = next((re.fullmatch(r"(U?R)(\d+)", name) for name in a[:2] if re.fullmatch(r"(U?R)(\d+)", name)), None)
        if not found:
            return predicates
        op, count = x.opcode, 1
        if x.name == "HGMMA":
            count = int(re.search(r"x(\d+)x", op)[1]) // 2
        elif x.name in ("HMMA",) or ".128" in op or op.endswith(".4"):
            count = 4
        elif ".64" in op or "WIDE" in op or op.startswith("CS2R") or x.name[0] == "D" or op.endswith(".2"):
            count = 2
        return predicates + [f"{found[1]}{int(found[2]) + i}" for i in range(count)]


class Walker:
    """A warp's walk from block to block."""

    def __init__(self, graph: Graph, way: Way, warp: int):
        self.graph, self.way = graph, way
        self.lanes = Lanes(warp, way.constants)
        self.out: list[Instruction] = []
        self.labels: list[int] = []  # where lanes that part now will meet, innermost last
        self.done: Counter = Counter()  # instructions that match the marker of a `Work`
        self.visits: Counter = Counter()  # of blocks
        self.at_header: Counter = Counter()  # of `done`, when the block was last entered
        self.steps = 0
        self.home = -1
        self.within = frozenset(range(len(graph.starts)))
        self.to_go: dict[int, float] = {}

    def _cost(self, block: int) -> float:
        body = self.graph.body(block)
        good = sum(bool(re.search(self.way.through, x.text)) for x in body)
        bad = sum(bool(re.search(self.way.around, x.text)) or x.name == "CALL" for x in body)
        for work in self.way.loops:
            if self.done[work.marker] >= work.total:
                bad += 2 * sum(bool(re.search(work.marker, x.text)) for x in body)
        return len(body) + 1e3 * (bad - good)

    def _costs_to(self, goals: frozenset[int]) -> dict[int, float]:
        """The cheapest way from each block to one of the goals, without closing a loop."""
        order, back = self.graph.order
        best: dict[int, float] = {}
        for block in reversed(order):
            after = [best[to] for to in self.graph.next[block] if (block, to) not in back and to in best]
            if block in self.within and (after or block in goals):
                best[block] = self._cost(block) + (0 if block in goals else min(after))
        return best

    def to(self, start: int, goals: frozenset[int]) -> None:
        """Walks up to the first of the goals, which stays ahead."""
        self.goals, self.to_go = goals, self._costs_to(goals)
        assert self._walk(start, goals) in goals, (
            f"no way to {[hex(self.graph.body(goal)[0].address) for goal in goals]}"
        )

    def to_exit(self, start: int = 0) -> None:
        self.goals = frozenset(
            b for b, to in enumerate(self.graph.next) if not to and self.graph.body(b)[-1].name == "EXIT"
        )
        self.to_go = self._costs_to(self.goals)
        self._walk(start, frozenset())

    def turn(self, loop: Loop) -> list[Instruction]:
        """One turn of the loop that stands ahead, neither the first nor the last."""
        for block in loop.blocks:
            for x in self.graph.body(block):
                self.lanes.forget(x)
        before, self.home, self.within = len(self.out), loop.header, loop.blocks
        self.goals = frozenset(loop.latches)
        self.to_go = self._costs_to(self.goals)
        self._walk(loop.header, frozenset())
        return self.out[before:]

    def _inner(self, block: int) -> list[Loop]:
        """Loops around the block within the home loop, innermost first."""
        found = [
            loop
            for loop in self.graph.loops.values()
            if block in loop.blocks and loop.header != self.home and loop.blocks <= self.within
        ]
        return sorted(found, key=lambda loop: len(loop.blocks))

    def _stays(self, loop: Loop, block: int) -> bool:
        for work in self.way.loops:
            per_turn = self.done[work.marker] - self.at_header[loop.header, work.marker]
            if block not in loop.latches:  # the turn is still ahead
                per_turn = sum(bool(re.search(work.marker, x.text)) for b in loop.blocks for x in self.graph.body(b))
            if per_turn:
                return self.done[work.marker] + per_turn <= work.total
        return self.visits[loop.header] < self.way.turns.get(loop.header, 0)

    def _choose(self, block: int, successors: list[int]) -> int:
        """Where the condition is unknown."""
        if self.home in successors:
            return self.home
        for loop in self._inner(block):
            inside = [s for s in successors if s in loop.blocks]
            if len(inside) == 1:
                outside = next(s for s in successors if s not in loop.blocks)
                return inside[0] if self._stays(loop, block) or outside not in self.to_go else outside
        return min(successors, key=lambda s: self.to_go.get(s, 1e9))

    def _emit(self, block: int) -> None:
        self.visits[block] += 1
        for work in self.way.loops:
            self.at_header[block, work.marker] = self.done[work.marker]
        for x in self.graph.body(block):
            self.out.append(self._as_executed(x))
            for work in self.way.loops:
                if re.search(work.marker, x.text):
                    self.done[work.marker] += 1
                    if self.done[work.marker] == work.total:
                        self.to_go = self._costs_to(self.goals)
            if x.name == "BSSY":
                self.labels.append(self.graph.block_at(x.target))
            self.lanes.execute(x)

    def _as_executed(self, x: Instruction) -> Instruction:
        """An access to memory by the lanes that do it.

        By none, it is an instruction that only issues. A load of one place is one by half of the lanes, as hardware
        packs two registers then.
        """
        if x.name not in ACCESSES:
            return x
        does = [m and u != 0 for m, u in zip(self.lanes.mask, self.lanes.predicate(x.predicate))]
        lanes = sum(n for n, d in zip(UP_TO_NEXT, does) if d)
        if lanes and x.name == "LDS":
            registers = re.findall(r"U?R\w+", x.operands.partition("[")[2])
            places = [{v for v, d in zip(self.lanes.operand(name), does) if d} for name in registers]
            lanes = (lanes + 1) // 2 if all(len(p) == 1 and None not in p for p in places) else lanes
        return x._replace(lanes=lanes) if lanes else x._replace(opcode="NOP", operands="", writes=7, reads=7)

    def _takes(self, x: Instruction) -> tuple[int | None, ...]:
        """Of each lane, whether a branch is taken."""
        names = [x.predicate.removeprefix("@")] if x.predicate else []
        names += [n.strip() for n in x.operands.split(",")[:-1] if re.fullmatch(r"!?U?P\w", n.strip())]
        values = [self.lanes.predicate(name) for name in names]
        return tuple(0 if 0 in column else None if None in column else 1 for column in zip(*values))

    def _walk(self, block: int | None, until: frozenset[int]) -> int | None:
        """Up to one of `until`, which it returns, to the home loop's header or to the end."""
        while block is not None and block not in until:
            self.steps += 1
            if block in self.labels:
                del self.labels[self.labels.index(block) :]
            assert self.steps < 20000, "the way does not end"
            self._emit(block)
            block = self._next(block)
            if block == self.home:
                return None
        return block

    def _next(self, block: int) -> int | None:
        last, successors = self.graph.body(block)[-1], [s for s in self.graph.next[block] if s in self.within]
        if last.name == "EXIT" and len(successors) == 1:
            leaves = self._takes(last)
            active = [t for t, m in zip(leaves, self.lanes.mask) if m]
            if all(t == 1 for t in active):
                return None
            if None not in active:
                self.lanes.mask = tuple(m and t != 1 for m, t in zip(self.lanes.mask, leaves))
            return successors[0]
        if len(successors) < 2:
            return successors[0] if successors else None
        waits = [x for x in self.graph.body(block) if "TRYWAIT" in x.opcode]
        if waits and last.predicate.strip("@!") == waits[-1].operands.partition(",")[0]:
            return successors[1] if "!" in last.predicate else successors[0]  # it has happened
        takes = self._takes(last)
        active = {t for t, m in zip(takes, self.lanes.mask) if m}
        if None in active:
            return self._choose(block, successors)
        if len(active) == 1:
            return successors[0] if active == {1} else successors[1]
        return self._diverge(block, successors, takes)

    def _diverge(self, block: int, successors: list[int], takes: tuple) -> int | None:
        """Both ways one after the other, up to where the lanes meet."""
        loop = next((loop for loop in self._inner(block) if sum(s in loop.blocks for s in successors) == 1), None)
        if loop:  # goes on as long as any lane does
            return next(s for s in successors if s in loop.blocks)
        mask, meet = self.lanes.mask, self.labels[-1] if self.labels else self.graph.meeting(block)
        for to, way in ((successors[1], 0), (successors[0], 1)):
            self.lanes.mask = tuple(m and t == way for m, t in zip(mask, takes))
            end = self._walk(to, frozenset() if meet is None else frozenset([meet]))
            if meet is None:
                return end
        self.lanes.mask = mask
        return meet
