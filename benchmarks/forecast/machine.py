"""A multiprocessor that issues streams of instructions.

It has schedulers, pipes, scoreboards, shared memory, tensor cores and barriers. What is assumed of the hardware is in
ASSUMPTIONS.
"""

import re
from collections import Counter, defaultdict, deque
from dataclasses import dataclass, field
from functools import cache
from typing import NamedTuple

from benchmarks.forecast.sass import Instruction


class Assumption(NamedTuple):
    value: float
    unit: str
    source: str


GUIDE = "CUDA C++ Programming Guide, throughput of native instructions, 9.0"
BENCH = "assumed, near Luo et al., arXiv 2402.13499"
ASSUMED = "assumed"
ASSUMPTIONS = {
    "multiprocessors": Assumption(132, "", "H100 SXM, H200"),
    "clock": Assumption(1755, "MHz", ASSUMED + ": between base and boost under tensor load"),
    "light clock": Assumption(1980, "MHz", "maximal boost of an H100 SXM; of kernels without tensor cores"),
    "bandwidth": Assumption(4.3e6, "B/us", "measured once on an H200 (benchmarks/floors.py)"),
    "bytes per multiprocessor": Assumption(64, "B a cycle", ASSUMED + ": between the L2 and a multiprocessor"),
    "launch": Assumption(1.0, "us", ASSUMED + ": a kernel's share of its graph that is not its own run"),
    "cta": Assumption(5.0, "us", ASSUMED + ": begin and end of a sweep CTA: state, pipeline"),
    "ALU": Assumption(2, "cycles a warp instruction", GUIDE + ": 64 lanes"),
    "FMA": Assumption(1, "cycles a warp instruction", GUIDE + ": 128 lanes"),
    "IMAD": Assumption(2, "cycles a warp instruction", GUIDE + ": 64 lanes"),
    "MUFU": Assumption(8, "cycles a warp instruction", GUIDE + ": 16 lanes"),
    "FP64": Assumption(2, "cycles a warp instruction", GUIDE + ": 64 lanes"),
    "uniform": Assumption(2, "cycles an instruction", ASSUMED),
    "LSU": Assumption(2, "cycles a warp instruction", ASSUMED),
    "shared bytes": Assumption(128, "B a cycle", "CUDA C++ Programming Guide: 32 banks of 4 bytes"),
    "queue": Assumption(64, "cycles of accesses to shared memory that may be under way", ASSUMED),
    "thread share": Assumption(0.5, "of shared memory's cycles that wgmma leaves to threads at least", ASSUMED),
    "LDS": Assumption(29, "cycles", BENCH + ": shared memory latency"),
    "LDSM": Assumption(33, "cycles", ASSUMED),
    "STS": Assumption(12, "cycles until the operands have been read", ASSUMED),
    "SHFL": Assumption(23, "cycles", ASSUMED),
    "MUFU latency": Assumption(20, "cycles", ASSUMED),
    "FP64 latency": Assumption(16, "cycles", ASSUMED),
    "HMMA": Assumption(33, "cycles", BENCH + ": mma.m16n8k16"),
    "constant": Assumption(22, "cycles of S2R, S2UR, LDC, R2UR to a scoreboard", ASSUMED),
    "barrier": Assumption(20, "cycles of BAR", ASSUMED),
    "mbarrier": Assumption(24, "cycles of SYNCS", ASSUMED),
    "wake": Assumption(14, "cycles from the last arrival to a waiting thread", ASSUMED),
    "next CTA": Assumption(300, "cycles from a CTA's end to the next one's start", ASSUMED),
    "fence": Assumption(20, "cycles of MEMBAR.CTA and the proxy fence", ASSUMED),
    "DRAM": Assumption(600, "cycles of a load from memory", BENCH + ", idle; more under load"),
    "copy": Assumption(1000, "cycles from a bulk copy to its mbarrier", ASSUMED),
    "store": Assumption(900, "cycles of a bulk store until it is done", ASSUMED),
    "tensor": Assumption(4096, "FLOP a cycle of 16-bit operands", "H100 white paper: 989 TFLOP/s"),
    "tensor tail": Assumption(28, "cycles from the last product to its wait", ASSUMED),
}
A = {name: a.value for name, a in ASSUMPTIONS.items()}

SHARED = ("LDS", "LDSM", "STS", "STSM", "ATOMS")
PIPES = ("ALU", "FMA", "IMAD", "MUFU", "FP64", "uniform", "LSU", "none")
NAMES = {
    **dict.fromkeys("FMUL FFMA FADD HADD2 HFMA2 HMUL2".split(), "FMA"),
    **dict.fromkeys("DADD DMUL DFMA DSETP".split(), "FP64"),
    **dict.fromkeys("MUFU F2F FRND I2F F2I I2FP F2IP POPC FLO BREV".split(), "MUFU"),
    **dict.fromkeys("LDS STS LDSM STSM LDG STG LD ST LDGSTS SHFL ATOMS ATOMG RED REDG".split(), "LSU"),
    **dict.fromkeys(
        "BRA BAR SYNCS WARPGROUP HGMMA HMMA BSSY BSYNC NOP EXIT WARPSYNC DEPBAR".split()
        + "LDC S2R S2UR MEMBAR FENCE CALL RET".split(),
        "none",
    ),
}


@cache
def pipe(name: str) -> str:
    if name in NAMES:
        return NAMES[name]
    return "IMAD" if name == "IMAD" else "uniform" if name.startswith("U") else "ALU"


@cache
def wavefronts(opcode: str) -> int:
    """Wavefronts of a warp's access to shared memory without conflicts.

    A register of each lane a cycle, also where lanes read the same.
    """
    if opcode.startswith(("LDSM", "STSM")):
        return int(opcode.rpartition(".")[2]) if opcode[-1].isdigit() else 1
    return 4 if ".128" in opcode else 2 if ".64" in opcode else 1


@cache
def tensor_cycles(opcode: str) -> float:
    M, N, K = map(int, re.search(r"(\d+)x(\d+)x(\d+)", opcode).groups())
    return 2 * M * N * K / A["tensor"] * (2 if "TF32" in opcode else 1)


@cache
def tensor_bytes(opcode: str, from_registers: bool) -> float:
    """Read from shared memory by one wgmma instruction."""
    M, N, K = map(int, re.search(r"(\d+)x(\d+)x(\d+)", opcode).groups())
    return (N + (0 if from_registers else M)) * K * (4 if "TF32" in opcode else 2)


def access_bytes(x: Instruction) -> int:
    """Of a warp's access to global memory."""
    return x.lanes * (16 if ".128" in x.opcode else 8 if ".64" in x.opcode else 2 if "16" in x.opcode else 4)


@dataclass
class Role:
    """Warps that run the same stream again and again."""

    stream: list[Instruction]
    warps: list[int]  # numbers in the CTA
    group: int = 0  # which warpgroup's barriers and products are meant
    turns: int = 1
    copied: float = 0  # bytes of each of its bulk copies
    stored: float = 0  # and of each of its bulk stores
    free: dict[str, int] = field(default_factory=dict)  # events that a first wait finds happened, and how often

    def __post_init__(self):
        # An arrival that expects bytes happens when the last copy before the next barrier operation has come: copy ->
        # arrival.
        self.lands: dict[int, Instruction] = {}
        expected, last = None, -1
        for i, x in enumerate(self.stream):
            if x.name == "SYNCS":
                expected, last = (x if expects(x) else None), -1
            elif expected is not None and is_load(x):
                self.lands.pop(last, None)
                self.lands[i], last = expected, i


def expects(x: Instruction) -> bool:
    return "ARRIVE" in x.opcode and "A1T0" not in x.opcode


def is_load(x: Instruction) -> bool:
    return x.name == "UTMALDG" or x.opcode.startswith("UBLKCP.S")


class Warp:
    def __init__(self, number: int, role: Role, cta: int, start: float):
        self.scheduler, self.role, self.cta, self.time = number % 4, role, cta, start
        self.at, self.turn, self.last = 0, 0, -1.0
        self.boards = [0.0] * 6
        self.waits: Counter = Counter()
        self.inside = self.done = False
        self.products: list[int] = []
        self.stored = self.bulk_stored = 0.0
        self.ends: list[float] = []
        self.since: float | None = None  # when it came to the wait that it stands at
        self.waited = 0.0


def event_of(x: Instruction) -> str:
    """Events of the same offset in shared memory are stages of one."""
    found = re.search(r"\[[^\]]*?(0x[0-9a-f]+)?\]", x.operands)
    return found[1] or "0x0"


class Multiprocessor:
    def __init__(self, clock: str = "clock", share: float = 1.0):
        """`share`: of the memory's bandwidth, as a multiple of an equal part."""
        self.now = 0.0
        self.warps: list[Warp] = []
        self.pipes = [dict.fromkeys(PIPES, 0.0) for _ in range(4)]
        self.shared_free = self.tensor_free = self.memory_free = 0.0
        self.coming: deque = deque()  # bulk copies: when they begin, wavefronts
        self.landing = 0.0  # wavefronts of those that have begun
        self.tensor_share = 0.0  # of shared memory that the running product takes
        self.bytes_per_cycle = A["bandwidth"] / A[clock] / A["multiprocessors"] * share
        self.busy = Counter()  # cycles
        self.arrivals: Counter = Counter()
        self.needed: dict = {}
        self.happened: dict = defaultdict(list)  # times, by (cta, event)
        self.barriers: dict = defaultdict(list)
        self.issued: dict = defaultdict(int)
        self.ready: dict = {}

    def add(self, roles: list[Role], cta: int = 0, start: float = 0.0) -> None:
        arrivals: Counter = Counter()
        waits: dict[str, int] = {}
        for role in roles:
            for x in role.stream:
                if x.name == "SYNCS" and "ARRIVE" in x.opcode:
                    arrivals[event_of(x)] += len(role.warps)
            waited = Counter(event_of(x) for x in role.stream if x.name == "SYNCS" and "TRYWAIT" in x.opcode)
            waits |= {event: max(n, waits.get(event, 0)) for event, n in waited.items()}
            self.warps += [Warp(number, role, cta, start) for number in role.warps]
        for event, n in arrivals.items():
            self.needed[cta, event] = max(n // waits.get(event, 1), 1)

    # Shared resources

    def _shared(self, fronts: float, at: float) -> float:
        """The end of a warp's access.

        Bulk copies take turns with the threads; what threads leave they use as fast as the L2 is.
        """
        begin, mark, speed = (
            max(self.shared_free, at),
            self.shared_free,
            A["bytes per multiprocessor"] / A["shared bytes"],
        )
        while self.coming and self.coming[0][0] <= begin:
            time, size = self.coming.popleft()
            self.landing = max(self.landing - speed * max(time - mark, 0), 0) + size
            mark = max(mark, time)
        self.landing = max(self.landing - speed * (begin - mark), 0)
        behind = min(self.landing, fronts)
        self.landing -= behind
        rate = 1 - (min(self.tensor_share, A["thread share"]) if self.tensor_free > begin else 0)
        self.shared_free = begin + (fronts + behind) / rate
        self.busy["shared"] += fronts
        return self.shared_free

    def _bulk(self, size: float, at: float) -> None:
        """A bulk copy writes or reads shared memory from then on."""
        self.coming.append((at, size / A["shared bytes"]))
        self.busy["shared"] += size / A["shared bytes"]

    def _memory(self, size: float) -> float:
        self.memory_free = max(self.memory_free, self.now) + size / self.bytes_per_cycle
        self.busy["memory"] += size / self.bytes_per_cycle
        return max(self.now, self.memory_free - size / self.bytes_per_cycle) + A["DRAM"]

    # What must have happened before an instruction can issue: the time, or None while it is not known.

    def _condition(self, warp: Warp, x: Instruction) -> float | None:
        if x.name == "BAR":
            return self._barrier(warp, x)
        if x.name == "DEPBAR":
            return warp.bulk_stored
        if x.name == "WARPGROUP" and "DEPBAR" in x.opcode:
            left = int(x.operands.rpartition(",")[2], 16)
            need = warp.products[: len(warp.products) - left]
            times = [self.ready.get((warp.cta, warp.role.group, job)) for job in need]
            if None in times:
                return None
            warp.products = warp.products[len(need) :]
            return max(times, default=0)
        if x.name == "SYNCS" and "TRYWAIT" in x.opcode:
            event = event_of(x)
            if (warp.cta, event) not in self.needed:  # something that is not modelled
                return 0
            turn = warp.waits[event] - warp.role.free.get(event, 0)
            times = self.happened[warp.cta, event]
            if turn >= len(times):
                return None
            warp.waits[event] += 1
            return times[turn] + A["wake"] if turn >= 0 else 0
        return 0

    def _barrier(self, warp: Warp, x: Instruction) -> float | None:
        parts = x.operands.replace(" ", "").split(",")
        own = parts[0].startswith(("R", "UR"))
        key = (warp.cta, parts[0], warp.role.group if own else -1)
        everyone = [
            w for w in self.warps if w.cta == warp.cta and not w.done and (not own or w.role.group == warp.role.group)
        ]
        count = int(parts[1], 16) // 32 if len(parts) > 1 and parts[1].startswith("0x") else len(everyone)
        if not warp.inside:
            warp.inside = True
            self.barriers[key].append(warp)
        waiting = self.barriers[key]
        if warp not in waiting:  # the last one has let all go
            warp.inside = False
            return 0
        if len(waiting) < min(count, len(everyone)):
            return None
        for w in waiting:
            w.time = self.now + A["barrier"]
        self.barriers[key] = []
        warp.inside = False
        return self.now + A["barrier"]

    # Issue

    def _effects(self, warp: Warp, x: Instruction) -> tuple[float, float]:
        """When the result is there and when the operands have been read."""
        T, name = self.now, x.name
        if name in SHARED:
            end = self._shared(max(wavefronts(x.opcode) * x.lanes / 32, 1), T + 6)
            if name in ("STS", "STSM"):
                warp.stored = end + A["STS"] - 6
                return warp.stored, warp.stored
            return end + A[name if name in A else "LDS"] - 6, end
        if name in ("LDG", "LD"):
            there = self._memory(access_bytes(x))
            return there if ".128" in x.opcode else T + A["DRAM"], T + 20  # what is small does not queue
        if name in ("STG", "ST"):
            self._memory(access_bytes(x))
            return T + 20, T + 20
        if name == "SYNCS":
            if "ARRIVE" in x.opcode and not any(e is x for e in warp.role.lands.values()):
                self._arrive(warp, x, self.now)
            return T + A["mbarrier"], T + 12
        if name == "HGMMA":
            self._product(warp, x)
        if is_load(x):
            self._copy(warp)
        if name == "UTMASTG" or x.opcode.startswith("UBLKCP.G.S"):
            self._bulk(warp.role.stored, T)
            self._memory(warp.role.stored)
            warp.bulk_stored = T + A["store"]
        if name == "MEMBAR":
            end = max(T + A["fence"], warp.stored)
            return end, end
        latency = {"MUFU": A["MUFU latency"], "FP64": A["FP64 latency"]}.get(pipe(name))
        latency = latency or {
            "SHFL": A["SHFL"],
            "HMMA": A["HMMA"],
            "S2R": A["constant"],
            "S2UR": A["constant"],
            "LDC": A["constant"],
        }.get(name, 12)
        return T + latency, T + 12

    def _copy(self, warp: Warp) -> None:
        """A bulk copy into shared memory."""
        comes = self._memory(warp.role.copied)
        self._bulk(warp.role.copied, comes)
        here = comes - A["DRAM"] + A["copy"]
        if warp.at in warp.role.lands:
            self._arrive(warp, warp.role.lands[warp.at], here)

    def _arrive(self, warp: Warp, x: Instruction, time: float) -> None:
        event = event_of(x)
        key = (warp.cta, event)
        self.arrivals[key] += 1
        if self.arrivals[key] < self.needed[key]:
            return
        self.arrivals[key] = 0
        self._happens(key, time)

    def _happens(self, key: tuple, time: float) -> None:
        self.happened[key].append(time)
        for w in self.warps:
            if w.cta == key[0] and w.time == float("inf"):
                w.time = self.now

    def _product(self, warp: Warp, x: Instruction) -> None:
        """Runs when the four warps have issued it, behind the products before it."""
        group = (warp.cta, warp.role.group)
        number = self.issued[warp] = self.issued[warp] + 1
        self.issued[group, number] += 1
        last = "gsb0" in x.operands
        if last:
            warp.products.append(number)
        if self.issued[group, number] == 4:
            cycles = tensor_cycles(x.opcode)
            share = (
                tensor_bytes(x.opcode, x.operands.split(",")[1].strip().startswith("R")) / cycles / A["shared bytes"]
            )
            self.tensor_share = share
            self.tensor_free = max(self.tensor_free, self.now + 4) + cycles * max(share, 1)
            self.busy["tensor"] += cycles
            self.busy["shared"] += cycles * share
            if last:
                self.ready[*group, number] = self.tensor_free + A["tensor tail"]
                for w in self.warps:
                    if w.time == float("inf"):
                        w.time = self.now

    def _try(self, warp: Warp, pipes: dict[str, float]) -> bool:
        x = warp.role.stream[warp.at]
        if not warp.inside:
            ready = max((warp.boards[b] for b in range(6) if x.waits >> b & 1), default=0)
            kind = pipe(x.name)
            if kind != "none":
                ready = max(ready, pipes[kind], pipes["FMA"] if kind == "IMAD" else 0)
            if kind == "LSU" and x.name in SHARED:
                ready = max(ready, self.shared_free - A["queue"])
            if ready > self.now:
                warp.time = ready
                return False
        condition = self._condition(warp, x)
        if condition is None:
            warp.since = self.now if warp.since is None else warp.since
            warp.time = float("inf")
            return False
        warp.waited += max(condition, self.now) - (self.now if warp.since is None else warp.since)
        warp.since = None
        kind = pipe(x.name)
        if kind != "none":
            pipes[kind] = self.now + A[kind]
        self.busy["issue"] += 0.25
        self.busy[kind] += A.get(kind, 0) / 4
        warp.last = self.now
        written, read = self._effects(warp, x)
        if x.writes < 6:
            warp.boards[x.writes] = max(warp.boards[x.writes], written)
        if x.reads < 6:
            warp.boards[x.reads] = max(warp.boards[x.reads], read)
        warp.time = max(self.now + max(x.stall, 1), condition)
        warp.at += 1
        if warp.at == len(warp.role.stream):
            warp.at, warp.turn = 0, warp.turn + 1
            warp.ends.append(self.now)
            warp.done = warp.turn == warp.role.turns
        return True

    def run_many(self, roles: list[Role], count: int, resident: int) -> float:
        """Cycles for a CTA when `count` of them follow one another, `resident` at a time; all of them if no more."""
        started, ends, between = 0, [], A["next CTA"]
        for _ in range(min(resident, count)):
            self.add(roles, started, 0)
            started += 1
        while any(not w.done for w in self.warps):
            self.step()
            for cta in {w.cta for w in self.warps}:
                mine = [w for w in self.warps if w.cta == cta]
                if all(w.done for w in mine):
                    ends.append(max(w.time for w in mine))
                    self.warps = [w for w in self.warps if w.cta != cta]
                    if started < count:
                        self.add(roles, started, ends[-1] + between)
                        started += 1
        ends.sort()
        skip = len(ends) // 3
        return (ends[-1] - ends[skip]) / (len(ends) - 1 - skip) if len(ends) > resident else ends[-1]

    def step(self) -> None:
        alive = [w for w in self.warps if not w.done]
        for s, pipes in enumerate(self.pipes):
            ready = [w for w in alive if w.scheduler == s and w.time <= self.now]
            # The one that issued last, then the one that waits longest.
            ready.sort(key=lambda w: (w.last != self.now - 1, w.last))
            any(self._try(w, pipes) for w in ready)
        soonest = min((w.time for w in alive if not w.done), default=self.now)
        assert soonest < float("inf"), "dead-lock: " + "; ".join(sorted({w.role.stream[w.at].text for w in alive}))
        self.now = max(self.now + 1, float(int(soonest)))

    def run(self) -> None:
        """Until all warps are done."""
        while any(not w.done for w in self.warps):
            self.step()
