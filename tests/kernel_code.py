"""What the compiler made of a CUDA source of the product: ptxas's report, and the machine code."""

import os
import re
import subprocess
import sysconfig
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest


ROOT = Path(__file__).parent.parent


class Facts(NamedTuple):
    registers: int
    spill_bytes: int
    stack_bytes: int


def _object(stem: str) -> Path:
    """The object file of ``csrc/<op>/<name>.cu``, ``stem`` being ``csrc.<op>.<name>``, from the newest build."""
    objects = sorted(ROOT.glob(f"build/*/cuda/{stem}.cu.o"), key=lambda path: path.stat().st_mtime)
    if not objects:
        pytest.skip("the CUDA objects are not here: the library was built without nvcc or elsewhere")
    return objects[-1]


@cache
def report(stem: str) -> dict[str, Facts]:
    """Of each kernel of ``csrc.<op>.<name>``, by mangled name."""
    text = Path(f"{_object(stem)}.ptxas").read_text()
    kernels = {}
    for part in text.split("Compiling entry function '")[1:]:
        stack, stores, loads = map(int, re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", part).groups())
        kernels[part.split("'")[0]] = Facts(int(re.search(r"Used (\d+) registers", part)[1]), stores + loads, stack)
    assert kernels, f"{stem} has no kernels"
    return kernels


class Code(NamedTuple):
    instructions: tuple[str, ...]  # opcode and operands

    def count(self, opcode: str) -> int:
        return sum(line.startswith(opcode) for line in self.instructions)

    def uses(self, *opcodes: str) -> bool:
        return any(self.count(opcode) for opcode in opcodes)


def _cuobjdump() -> str:
    tool = Path(sysconfig.get_path("purelib")) / "nvidia" / "cu13" / "bin" / "cuobjdump"
    if not tool.exists():
        pytest.skip("needs cuobjdump and nvdisasm: pip install nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm")
    for program in (tool, tool.with_name("nvdisasm")):
        program.chmod(program.stat().st_mode | 0o111)  # the packages install them without the permission to run
    return str(tool)


@cache
def disassembly(stem: str) -> dict[str, Code]:
    tool = _cuobjdump()
    environment = {**os.environ, "PATH": f"{Path(tool).parent}{os.pathsep}{os.environ['PATH']}"}
    command = [tool, "-sass", str(_object(stem))]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    kernels = {}
    for part in done.stdout.split("Function : ")[1:]:
        lines = re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?([^;]+);", part, re.MULTILINE)
        kernels[part.split()[0]] = Code(tuple(lines))
    assert kernels, f"{stem} has no machine code"
    return kernels


