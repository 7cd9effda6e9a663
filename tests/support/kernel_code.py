"""What the compiler made of a CUDA source of the product: ptxas's report, and the machine code."""

import re
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest

from benchmarks.forecast import sass


class Facts(NamedTuple):
    registers: int
    spill_bytes: int
    stack_bytes: int


def _object(stem: str) -> Path:
    found = sass.objects(stem=stem)
    if not found:
        pytest.skip("the CUDA objects are not here: the library was built without nvcc or elsewhere")
    return found[0]


@cache
def report(stem: str) -> dict[str, Facts]:
    """Of each kernel of ``csrc.<op>.<name>``, by mangled name."""
    text = Path(f"{_object(stem)}.ptxas").read_text()
    kernels = {}
    for part in text.split("Compiling entry function '")[1:]:
        stack, stores, loads = map(
            int, re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", part).groups()
        )
        kernels[part.split("'")[0]] = Facts(int(re.search(r"Used (\d+) registers", part)[1]), stores + loads, stack)
    assert kernels, f"{stem} has no kernels"
    return kernels


class Code(NamedTuple):
    instructions: tuple[str, ...]  # opcode and operands

    def count(self, opcode: str) -> int:
        return sum(line.startswith(opcode) for line in self.instructions)

    def uses(self, *opcodes: str) -> bool:
        return any(self.count(opcode) for opcode in opcodes)


@cache
def disassembly(stem: str) -> dict[str, Code]:
    file = _object(stem)
    if sass.cuobjdump() is None:
        pytest.skip("needs cuobjdump and nvdisasm: pip install nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm")
    code = sass.parse(sass.run_cuobjdump("-sass", file))
    assert code, f"{stem} has no machine code"
    return {kernel: Code(tuple(x.text for x in instructions)) for kernel, instructions in code.items()}
