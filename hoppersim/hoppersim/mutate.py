"""Planted bugs: PTX of a kernel with one thing deleted or altered, and legal alterations beside them.

    lines = hoppersim.ptx_of(kernel)
    for mutant in hoppersim.mutate.mutants(lines):
        with hoppersim.edited(kernel, mutant.lines), hoppersim.simulate():
            ...  # a Fault, or other results, if the simulator and the test are worth anything

`mutants` are wrong by the rules of PTX, unless what they take away was not needed; `legal` must neither be reported
nor change a result.
"""

import re
from collections.abc import Iterator, Mapping
from typing import NamedTuple

from ._ptx_text import PURE, Kernel, Statement, read, registers_in, written

CLASSES = (
    "fence",
    "wait",
    "count",
    "arrive",
    "parity",
    "swizzle",
    "barrier",
    "setmaxnreg",
    "stage",
    "commit",
)
_FENCES = ("fence", "membar", "wgmma.fence")
_COPIES = frozenset("mov selp xor and cvt not".split())
_ADDRESSES = frozenset("add sub mov shl or mad cvt xor lop3".split())
_MOST_REGISTERS = 256  # that setmaxnreg takes


class Mutant(NamedTuple):
    """One alteration of a kernel."""

    kind: str  # of CLASSES, or "legal"
    what: str
    line: int  # of the instruction, as reports number it
    instruction: str
    lines: dict[int, str | None]  # for `edited`
    reach: dict[int, str | None]  # the same place with a trap: whether a launch comes there


Lines = Mapping[int, str]


def mutants(lines: Lines) -> Iterator[Mutant]:
    """In the order of the text."""
    kernel = Kernel(lines)
    toggles = _toggles(kernel)
    swizzles = _swizzles(kernel)
    for s in kernel.instructions:
        for kind, what, new in (
            *_fence(s),
            *_wait(s),
            *_count(s),
            *_arrive(s),
            *_parity(s, toggles),
            *_swizzle(s, swizzles),
            *_barrier(s),
            *_setmaxnreg(s),
            *_commit(s),
        ):
            yield _mutant(kernel, kind, what, s, (s, new))
        for what, changes in (*_cluster_barrier(kernel, s), *_early_release(kernel, s)):
            yield _mutant(kernel, "barrier" if s.is_a("barrier.cluster.arrive") else "stage", what, s, *changes)


def _mutant(kernel: Kernel, kind: str, what: str, s: Statement, *changes: tuple[Statement, str]) -> Mutant:
    trap = f"@{'!' if s.guard[0] else ''}{s.guard[1]} trap;" if s.guard else "trap;"
    return Mutant(kind, what, s.line, s.text, kernel.edit(*changes), kernel.edit((s, f"{trap} {s.text};")))


# ---- one instruction changed: (class, what is done, the new text)


def _with_changed_operand(s: Statement, index: int, operation: str, value: int) -> str:
    """The instruction with another value of an operand: ``operation`` is "add.s32" or "xor.b64"."""
    operands = list(s.operands)
    width = operation.split(".")[1][1:]
    changed = f"mov.b{width} hs_value, {operands[index]}; {operation} hs_value, hs_value, {value};"
    operands[index] = "hs_value"
    return f"{{ .reg .b{width} hs_value; {changed} {s.with_operands(operands)}; }}"


def _fence(s: Statement):
    if s.is_a(*_FENCES) and not s.is_a("fence.proxy.tensormap"):
        yield "fence", "removed", ""


def _wait(s: Statement):
    if s.is_a("mbarrier.try_wait", "mbarrier.test_wait"):
        yield "wait", "falls through", f"setp.eq.u32 {s.operands[0]}, 0, 0;"
    if s.is_a("cp.async.wait_group", "cp.async.bulk.wait_group", "wgmma.wait_group"):
        yield "wait", "one more group may be left", f"{s.opcode} {int(s.operands[0]) + 1};"
        yield "wait", "removed", ""
    if s.is_a("cp.async.wait_all"):
        yield "wait", "removed", ""


def _count(s: Statement):
    if s.is_a("mbarrier.init"):
        for delta in (1, -1):
            yield "count", f"{delta:+} arrival", _with_changed_operand(s, 1, "add.s32", delta)
    if s.is_a("mbarrier.arrive.expect_tx", "mbarrier.expect_tx"):
        for delta in (16, -16):
            yield "count", f"{delta:+} bytes", _with_changed_operand(s, len(s.operands) - 1, "add.s32", delta)
    if s.is_a("bar", "barrier") and not s.is_a("bar.warp", "barrier.cluster") and len(s.operands) == 2:
        for delta in (32, -32):
            yield "count", f"{delta:+} threads", _with_changed_operand(s, 1, "add.s32", delta)


def _arrive(s: Statement):
    if s.is_a("mbarrier.arrive", "mbarrier.arrive_drop", "cp.async.mbarrier.arrive", "bar.arrive", "barrier.arrive"):
        yield "arrive", "removed", ""
        yield "arrive", "doubled", f"{s.text}; {s.text};"


def _parity(s: Statement, toggles: list[Statement]):
    if s.is_a("mbarrier.try_wait.parity", "mbarrier.test_wait.parity"):
        yield "parity", "flipped", _with_changed_operand(s, 2, "xor.b32", 1)
    if s in toggles:
        yield "parity", "toggle removed", f"mov.b32 {s.operands[0]}, {s.operands[1]};"


def _toggles(kernel: Kernel) -> list[Statement]:
    waits = [s for s in kernel.instructions if ".parity" in s.opcode]
    parities = [name for s in waits for name in registers_in(s.operands[2])]
    return [s for s in kernel.sources(parities, _COPIES) if s.is_a("xor")]


def _swizzle(s: Statement, swizzles: list[Statement]):
    if s.is_a("wgmma.mma_async"):
        for index in _descriptors(s):
            name = "AB"[index - 1]
            yield "swizzle", f"mode of descriptor {name}", _with_changed_operand(s, index, "xor.b64", 1 << 63)
            yield "swizzle", f"stride of descriptor {name}", _with_changed_operand(s, index, "xor.b64", 1 << 36)
    if s in swizzles and s.operands[0] == s.operands[1]:
        yield "stage", "buffers not taken in turn", f"mov.b32 {s.operands[0]}, {s.operands[1]};"
    elif s in swizzles:
        yield "swizzle", "xor of an address removed", f"mov.b32 {s.operands[0]}, {s.operands[1]};"
        if re.fullmatch(r"\d+", s.operands[2]):
            yield "swizzle", "xor of another bit", _with_changed_operand(s, 2, "xor.b32", 16)


def _descriptors(s: Statement) -> list[int]:
    """Positions of the matrix descriptors among the operands: A if it is one, and B."""
    return [i for i in (1, 2) if not s.operands[i].startswith("{")]


def _swizzles(kernel: Kernel) -> list[Statement]:
    addresses = []
    for s in kernel.instructions:
        if s.is_a("ldmatrix", "stmatrix", "st.shared", "ld.shared", "cp.async.ca", "cp.async.cg"):
            address = next(operand for operand in s.operands if operand.startswith("["))
            addresses += registers_in(address)
    return [s for s in kernel.sources(addresses, _ADDRESSES) if s.is_a("xor.b32")]


def _barrier(s: Statement):
    if s.is_a("bar.sync", "barrier.sync", "bar.warp.sync", "bar.red", "barrier.red") and not s.is_a("bar.red"):
        yield "barrier", "removed", ""


def _setmaxnreg(s: Statement):
    if not s.is_a("setmaxnreg"):
        return
    count = int(s.operands[0])
    if s.is_a("setmaxnreg.dec"):
        yield "setmaxnreg", "removed", ""
    changed = min(count + (64 if s.is_a("setmaxnreg.dec") else 24), _MOST_REGISTERS)
    if changed != count:
        yield "setmaxnreg", f"{count} made {changed}", f"{s.opcode} {changed};"


def _commit(s: Statement):
    if s.is_a("wgmma.commit_group", "cp.async.commit_group", "cp.async.bulk.commit_group"):
        yield "commit", "removed", ""


# ---- more than one instruction changed: (what is done, the changes)


def _cluster_barrier(kernel: Kernel, s: Statement):
    if not s.is_a("barrier.cluster.arrive"):
        return
    wait = next(o for o in kernel.instructions if o.begin > s.begin and o.is_a("barrier.cluster.wait"))
    yield "removed", ((s, ""), (wait, ""))


def _early_release(kernel: Kernel, s: Statement):
    """An arrive made before the last read of what it releases: wgmma's wait, or a load from shared memory."""
    if not s.is_a("mbarrier.arrive") or "expect_tx" in s.opcode:
        return
    before = [o for o in kernel.instructions if o.begin < s.begin]
    reads = ("wgmma.wait_group", "ld.shared", "ldmatrix")
    place = next((o for o in reversed(before) if o.is_a(*reads)), None)
    if place is None:
        return
    for o in reversed(before):  # out of the loop that reads, and before what jumps over it
        target = kernel.target(o)
        if target and o.begin > place.begin > target.begin:
            place = target
        elif target and o.begin < place.begin < target.begin < s.begin:
            place = o
    if any(o.is_a("mbarrier.try_wait") for o in before if o.begin > place.begin):
        return
    condition, wanted = _condition(kernel, s), registers_in(", ".join(s.operands[1:]))
    slice_ = _slice(kernel, [*wanted, *([condition[1]] if condition else [])], place)
    if slice_ is None:
        return
    names = {name: f"hs_{i}" for i, name in enumerate(dict.fromkeys(n for o in slice_ for n in written(o)))}
    renamed = lambda text: re.sub(r"(?<![\w$.%])%?[A-Za-z_$][\w$]*", lambda found: names.get(found[0], found[0]), text)
    declared = " ".join(f".reg .{_type_of(kernel, name)} {new};" for name, new in names.items())
    computed = " ".join(f"{renamed(o.text)};" for o in slice_)
    guard = f"@{'!' if condition[0] else ''}{condition[1]} " if condition else ""
    arrive = renamed(f"{guard}{s.bare};")
    place_text = place.text if place.kind == "label" else f"{place.text};"
    yield "release before the last read", ((place, f"{{ {declared} {computed} {arrive} }} {place_text}"), (s, ""))


def _condition(kernel: Kernel, s: Statement) -> tuple[bool, str] | None:
    """When the instruction runs: its guard, or that of the nearest branch around it, turned."""
    if s.guard:
        return s.guard
    for o in reversed([o for o in kernel.instructions if o.begin < s.begin][-40:]):
        target = kernel.target(o)
        if target and o.guard and target.begin > s.begin:
            return (not o.guard[0], o.guard[1])
    return None


def _slice(kernel: Kernel, names: list[str], place: Statement) -> list[Statement] | None:
    """What computes these registers from those known at ``place``, in order; None if that cannot be done."""
    needed: list[Statement] = []
    for name in names:
        definitions = kernel.definitions.get(name, [])
        if not any(place.begin <= o.begin for o in definitions):
            continue  # known at the place, or of a loop
        if len(definitions) != 1 or definitions[0].guard or definitions[0].opcode.split(".")[0] not in PURE | {"mapa"}:
            return None
        inner = _slice(kernel, read(definitions[0]), place)
        if inner is None:
            return None
        needed += [o for o in (*inner, definitions[0]) if o not in needed]
    return needed


def _type_of(kernel: Kernel, name: str) -> str:
    prefix = name.rstrip("0123456789")
    for s in kernel.statements:
        found = re.match(r"\.reg\s+\.(\w+)\s+(.*)", s.text) if s.kind == "directive" else None
        if found and (f"{prefix}<" in found[2] or name in re.split(r"[,\s]+", found[2])):
            return found[1]
    raise ValueError(f"no declaration of {name}")


# ---- legal alterations


def legal(lines: Lines) -> Iterator[Mutant]:
    """Alterations of class "legal": one instruction after the other, then those of the whole kernel."""
    kernel = Kernel(lines)
    for s in kernel.instructions:
        for what, new in _legal_instruction(s):
            yield _mutant(kernel, "legal", what, s, (s, new))
    yield from _legal_everywhere(kernel)


def _legal_instruction(s: Statement):
    if s.is_a(*_FENCES):
        yield "fence doubled", f"{s.text}; {s.text};"
    if s.is_a("fence.proxy.async.shared::cta"):
        yield "fence of all spaces", "fence.proxy.async;"
    if s.is_a("bar.warp.sync") and not s.guard:
        yield "bar.warp.sync doubled", f"{s.text}; {s.text};"
    if s.is_a("bar.sync") and not s.guard:
        yield "bar.warp.sync after a barrier", f"{s.text}; bar.warp.sync -1; membar.cta;"
    if s.is_a("mbarrier.arrive", "mbarrier.try_wait", "bar.sync", "wgmma.commit_group", "wgmma.wait_group"):
        yield "nanosleep before", f"nanosleep.u32 200; {s.text};"
    if s.is_a("wgmma.wait_group", "cp.async.wait_group", "cp.async.bulk.wait_group"):
        yield "wait doubled", f"{s.text}; {s.text};"
        if s.operands[0] != "0":
            yield "no group may be left", f"{s.opcode} 0;"
    if s.is_a("mbarrier.try_wait.parity"):
        operands = s.operands[:3]
        yield "test_wait in place of try_wait", f"{s.with_operands(operands, s.opcode.replace('try', 'test', 1))};"
        yield "without a time limit", f"{s.with_operands(operands)};"
    if s.is_a("mbarrier.arrive.expect_tx") and not s.guard:
        yield from _legal_expectations(s)
    if s.is_a("mbarrier.arrive") and "expect_tx" not in s.opcode and len(s.operands) == 2:
        yield "arrival count written out", f"{s.with_operands([*s.operands, '1'])};"
    if s.is_a("setmaxnreg.inc"):
        yield "setmaxnreg.inc removed", ""
    if s.is_a("mbarrier.init"):
        yield "fence after an init", f"{s.text}; fence.mbarrier_init.release.cluster; fence.proxy.async;"


def _legal_expectations(s: Statement):
    sink, barrier, size = s.operands
    space = "shared::cta" if "shared::cta" in s.opcode else "shared::cluster"
    expect = f"mbarrier.expect_tx.relaxed.{'cta' if space.endswith('cta') else 'cluster'}.{space}.b64 {barrier}"
    rest = s.with_operands([sink, barrier, "hs_rest"])
    yield "expect_tx in two", f"{{ .reg .b32 hs_rest; sub.s32 hs_rest, {size}, 16; {expect}, 16; {rest}; }}"
    arrive = s.with_operands([sink, barrier], s.opcode.replace(".expect_tx", ""))
    yield "expect_tx before the arrive", f"{expect}, {size}; {arrive};"


def _legal_everywhere(kernel: Kernel) -> Iterator[Mutant]:
    first = kernel.instructions[0]
    for start in (0, 1):
        changes = _swaps(kernel, start)
        if changes:
            what = f"{len(changes) // 2} pairs of independent instructions swapped"
            yield _mutant(kernel, "legal", what, changes[0][0], *changes)
    renamed = re.sub(r"%(r|rd|p|f|rs|b|h)(?=[\d<])", r"%hs_\1", kernel.text)
    same = _mutant(kernel, "legal", "registers renamed", first, (first, f"{first.text};"))
    yield same._replace(lines=kernel.changed_lines(renamed))
    barriers = [s for s in kernel.instructions if s.is_a("bar.sync")]
    if barriers and barriers[0].operands == ["0"]:  # later ones may be the halves of one barrier
        doubled = (barriers[0], f"{barriers[0].text}; {barriers[0].text};")
        yield _mutant(kernel, "legal", "bar.sync doubled", barriers[0], doubled)
    setmaxnreg = [(s, "") for s in kernel.instructions if s.is_a("setmaxnreg")]
    if setmaxnreg:
        yield _mutant(kernel, "legal", "every setmaxnreg removed", setmaxnreg[0][0], *setmaxnreg)
    commits = [(s, f"{s.text}; {s.text};") for s in kernel.instructions if s.is_a("wgmma.commit_group")]
    waits = [s for s in kernel.instructions if s.is_a("wgmma.wait_group")]
    if commits and all(s.operands == ["0"] for s in waits):
        yield _mutant(kernel, "legal", "empty groups committed", commits[0][0], *commits)
    sleeps = [(s, f"nanosleep.u32 100; {s.text};") for s in kernel.instructions[::50] if s.scope == 0]
    yield _mutant(kernel, "legal", "nanosleep at every 50th instruction", sleeps[0][0], *sleeps)


def _swaps(kernel: Kernel, start: int) -> list[tuple[Statement, str]]:
    changes, statements, i = [], kernel.statements, start
    while i + 1 < len(statements):
        a, b = statements[i], statements[i + 1]
        if _free(a) and _free(b) and a.scope == b.scope and not _depend(a, b):
            changes += [(a, f"{b.text};"), (b, f"{a.text};")]
            i += 2
        else:
            i += 1
    return changes


def _free(s: Statement) -> bool:
    return s.kind == "instruction" and s.opcode.split(".")[0] in PURE


def _depend(a: Statement, b: Statement) -> bool:
    wa, wb = set(written(a)), set(written(b))
    return bool(wa & wb or wa & set(read(b)) or wb & set(read(a)))
