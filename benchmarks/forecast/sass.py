"""Machine code with its control bits: instructions, basic blocks, loops, and the way through them that a warp takes."""

import os
import re
import subprocess
import sysconfig
from collections.abc import Iterable, Sequence
from functools import cache, cached_property
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parent.parent.parent


class Instruction(NamedTuple):
    address: int
    predicate: str  # "@P0", "@!P1" or ""
    opcode: str  # with its suffixes
    operands: str
    stall: int  # cycles until the warp's next instruction may issue
    writes: int  # scoreboard that is freed when the result is there; 7: none
    reads: int  # scoreboard that is freed when the operands have been read; 7: none
    waits: int  # mask of the six scoreboards that must be free before this one issues
    lanes: int = 32  # of a warp that execute it

    @property
    def name(self) -> str:
        return self.opcode.partition(".")[0]

    @property
    def text(self) -> str:
        return f"{self.opcode} {self.operands}"

    @property
    def target(self) -> int | None:
        found = re.search(r"(?:^|[ ,])(0x[0-9a-f]+)\s*$", self.operands)
        return int(found[1], 16) if found and self.name in ("BRA", "CALL", "BSSY") else None


# An instruction is two 64-bit words; the upper has the control bits from bit 41 on.
LINE = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(@!?U?P\w+ )?([^;]+);\s+/\* 0x[0-9a-f]{16} \*/\s+/\* 0x([0-9a-f]{16}) \*/")


def parse(text: str) -> dict[str, list[Instruction]]:
    """The instructions of each kernel in the output of ``cuobjdump -sass``, by mangled name."""
    kernels = {}
    for part in text.split("Function : ")[1:]:
        instructions = []
        for address, predicate, code, upper in LINE.findall(part):
            opcode, _, operands = code.strip().partition(" ")
            control = int(upper, 16) >> 41
            bits = control & 15, control >> 5 & 7, control >> 8 & 7, control >> 11 & 63
            instructions.append(Instruction(int(address, 16), predicate.strip(), opcode, operands.strip(), *bits))
        kernels[part.split()[0]] = instructions
    return kernels


def cuobjdump() -> Path | None:
    tool = Path(sysconfig.get_path("purelib")) / "nvidia" / "cu13" / "bin" / "cuobjdump"
    if not tool.exists():
        return None
    for program in (tool, tool.with_name("nvdisasm")):
        program.chmod(program.stat().st_mode | 0o111)  # the packages install them without the permission to run
    return tool


def run_cuobjdump(*arguments: object) -> str:
    tool = cuobjdump()
    environment = {**os.environ, "PATH": f"{tool.parent}{os.pathsep}{os.environ['PATH']}"}
    done = subprocess.run([tool, *arguments], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout


def objects(root: Path = ROOT, stem: str = "*") -> list[Path]:
    """The newest object file of each source; ``csrc/<folder>/<name>.cu`` has the ``stem`` ``csrc.<folder>.<name>``.

    Not those of sources that have gone, which a build folder keeps.
    """
    sources = {".".join(path.relative_to(root).parts) for path in root.glob("csrc/**/*.cu")}
    newest: dict[str, Path] = {}
    for path in sorted(root.glob(f"build/*/cuda/{stem}.cu.o"), key=lambda path: path.stat().st_mtime):
        if path.stem in sources:
            newest[path.name] = path
    return newest_first(newest.values())


def newest_first(files: Iterable[Path]) -> list[Path]:
    """By time, because folders that were named may hold objects of sources that have gone."""
    return sorted(files, key=lambda path: path.stat().st_mtime, reverse=True)


def find_kernel(pattern: str, files: list[Path]) -> tuple[Path, str]:
    """The first file with a kernel whose mangled name matches, and that name: that for bf16 where several match."""
    for file in files:
        names = {name.decode() for name in re.findall(rb"\.text\.(_Z\w+)", file.read_bytes())}
        found = [name for name in names if re.search(pattern, name)]
        if len(found) > 1:
            found = [name for name in found if "bf16" in name]
        if len(found) == 1:
            return file, found[0]
    raise LookupError(f"no kernel, or several, match {pattern}")


@cache
def code_of(file: Path, kernel: str) -> list[Instruction]:
    return parse(run_cuobjdump("-sass", "-fun", kernel, file))[kernel]


@cache
def registers_of(file: Path, kernel: str) -> int:
    return int(re.search(rf"Function {kernel}:\s+REG:(\d+)", run_cuobjdump("-res-usage", file))[1])


class Loop(NamedTuple):
    header: int
    blocks: frozenset[int]
    latches: tuple[int, ...]


class Graph:
    """Control flow of a kernel."""

    def __init__(self, instructions: list[Instruction]):
        self.instructions = instructions
        self.at = {x.address: i for i, x in enumerate(instructions)}
        leaders, labels = {0}, {}
        for i, x in enumerate(instructions):
            if x.target is not None and x.name != "CALL":
                leaders.add(self.at[x.target])
            if x.name == "CALL":
                leaders.add(self.at[x.target])
            if x.name in ("BRA", "EXIT", "BSYNC", "RET", "CALL"):
                leaders.add(i + 1)
        leaders.discard(len(instructions))
        self.starts = sorted(leaders)
        self.ends = [*self.starts[1:], len(instructions)]
        self.block_of = {start: b for b, start in enumerate(self.starts)}
        self.next: list[list[int]] = []
        for start, end in zip(self.starts, self.ends):
            for x in instructions[start:end]:
                if x.name == "BSSY":
                    labels[x.operands.split(",")[0]] = x.target
            self.next.append(self._successors(instructions[end - 1], end, labels))

    def _successors(self, last: Instruction, end: int, labels: dict[str, int]) -> list[int]:
        after = [self.block_of[end]] if end in self.block_of else []
        conditional = bool(last.predicate) or "P" in last.operands.partition("0x")[0]
        if last.name == "BRA":
            if ".DIV" in last.opcode or ".ANY" in last.opcode:  # threads that disagree, which do not exist here
                return after
            to = self.block_of[self.at[last.target]]
            return [to, *after] if conditional else [to]
        if last.name == "BSYNC" and not conditional:
            return [self.block_of[self.at[labels[last.operands]]]] if last.operands in labels else after
        if last.name in ("EXIT", "RET"):
            return after if conditional else []
        return after

    def block_at(self, address: int) -> int:
        return self.block_of[self.at[address]]

    def meeting(self, block: int) -> int | None:
        """The block that all ways from this one come to, unless they end or close a loop before."""
        position = {b: i for i, b in enumerate(self.order[0])}
        for meet in sorted(self._reachable(block) - {block}, key=position.get):
            if all(self._forward(b) for b in self._reachable(block, meet)):
                return meet
        return None

    def _forward(self, block: int) -> list[int]:
        return [to for to in self.next[block] if (block, to) not in self.order[1]]

    def _reachable(self, block: int, avoiding: int = -1) -> set[int]:
        found, stack = set(), [block]
        while stack:
            b = stack.pop()
            if b not in found and b != avoiding:
                found.add(b)
                stack += self._forward(b)
        return found

    def body(self, block: int) -> list[Instruction]:
        return self.instructions[self.starts[block] : self.ends[block]]

    @cached_property
    def order(self) -> tuple[list[int], set[tuple[int, int]]]:
        """Blocks in reverse postorder, and the edges that close loops."""
        seen, open_, order, back = set(), set(), [], set()
        for root in range(len(self.starts)):
            if root in seen:
                continue
            stack = [(root, iter(self.next[root]))]
            seen.add(root), open_.add(root)
            while stack:
                block, rest = stack[-1]
                for to in rest:
                    if to in open_:
                        back.add((block, to))
                    elif to not in seen:
                        seen.add(to), open_.add(to)
                        stack.append((to, iter(self.next[to])))
                        break
                else:
                    stack.pop(), open_.discard(block)
                    order.append(block)
        return order[::-1], back

    @cached_property
    def loops(self) -> dict[int, Loop]:
        """By header."""
        before: dict[int, list[int]] = {}
        for block, successors in enumerate(self.next):
            for to in successors:
                before.setdefault(to, []).append(block)
        found: dict[int, tuple[set, list]] = {}
        for latch, header in self.order[1]:
            blocks, latches = found.setdefault(header, ({header}, []))
            latches.append(latch)
            stack = [latch]
            while stack:
                block = stack.pop()
                if block not in blocks:
                    blocks.add(block)
                    stack += before.get(block, ())
        return {header: Loop(header, frozenset(blocks), tuple(latches)) for header, (blocks, latches) in found.items()}

    def find_loop(self, has: Sequence[str], lacks: str = "(?!)") -> Loop:
        """The largest loop that has instructions matching each of `has` and none that match `lacks`."""

        def fits(loop: Loop) -> bool:
            texts = [x.text for block in loop.blocks for x in self.body(block)]
            return all(any(re.search(h, t) for t in texts) for h in has) and not any(re.search(lacks, t) for t in texts)

        return max(filter(fits, self.loops.values()), key=lambda loop: len(loop.blocks))
