"""What CONTRIBUTING.md tells a newcomer to write works: its op is compiled and run, its token mixer is in a model."""

import __future__

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support.documents import Block, block_after, run_python
from support.model_cases import ATOL, small_config, tokens
from support.paths import ROOT

from jetkernels.model import JetNemotronForCausalLM, mixers

TORCH = Path(torch.__file__).parent
# What the op's two C++ files need of the library, whose symbols are hidden.
SOURCES = ("bindings/backend.cpp", "bindings/checks.cpp", "csrc/cpu/isa.cpp")
RUN_OP = """
import sys

import torch

import jetkernels

torch.ops.load_library(sys.argv[1])
from leaky_sum import leaky_sum

{checks}
y = x.detach()[:, :0].sum(1)
for x_t, y_t in zip(x.unbind(1), leaky_sum(x, 0.5).unbind(1)):
    y = 0.5 * y + x_t
    torch.testing.assert_close(y_t, y)
torch.testing.assert_close(torch.ops.jet_plain.leaky_sum(x.detach(), 0.5, 4), leaky_sum(x, 0.5).detach())
torch.testing.assert_close(torch.compile(leaky_sum, fullgraph=True, backend="aot_eager")(x, 0.5), leaky_sum(x, 0.5))
"""


def contributing(words: str) -> Block:
    """The code block behind these words of CONTRIBUTING.md."""
    return block_after("CONTRIBUTING.md", words)


def file_of(path: str) -> str:
    """The code block under the paragraph that begins with the file's name."""
    return contributing(f"**`{path}`**").code


def run(command, **options) -> None:
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, **options)
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-3000:]


@pytest.fixture(scope="module")
def op(tmp_path_factory) -> Path:
    """A folder with the op's Python file and a library of its C++ files."""
    folder = tmp_path_factory.mktemp("op")
    files = ("csrc/leaky_sum/leaky_sum.h", "csrc/leaky_sum/leaky_sum_cpu.cpp", "bindings/leaky_sum.cpp")
    for path in files:
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text(file_of(path))
    (folder / "leaky_sum.py").write_text(file_of("jetkernels/ops/leaky_sum.py"))
    command = [os.environ.get("CXX", "c++"), "-std=c++20", "-O0", "-fPIC", "-shared", "-fvisibility=hidden"]
    command += ["-Wall", "-Wextra", "-Werror", "-Wno-psabi", "-Wl,-Bsymbolic", f"-I{folder}", f"-I{ROOT}"]
    command += ["-isystem", TORCH / "include", "-DTORCH_TARGET_VERSION=0x020b000000000000"]
    command += ["-DJET_CPU_ISA=generic", "-DJET_CPU_GENERIC_ONLY=1", "-o", folder / "op.so"]
    sources = [folder / path for path in files[1:]] + [ROOT / path for path in SOURCES]
    run([*command, *sources, TORCH / "lib" / "libtorch_cpu.so"])
    return folder


def test_op_of_contributing_works(op):
    script = RUN_OP.format(checks=contributing("say most in two lines").code)
    run(
        [sys.executable, "-c", script, op / "op.so"],
        env={**os.environ, "PYTHONPATH": f"{op}{os.pathsep}{ROOT}"},
        cwd=op,
    )


@torch.no_grad()
def test_token_mixer_of_contributing_works(monkeypatch):
    """A model that has it decodes as it prefills."""
    names = dict(vars(mixers))
    flags = __future__.annotations.compiler_flag  # as in mixers.py
    run_python("CONTRIBUTING.md", [contributing("## Add a token mixer")], names, flags)
    monkeypatch.setitem(mixers.MIXERS, "sum", names["DecayedSum"])
    config = small_config(("sum", "attn"), efficient_attention_config={"sum": {"decay": 0.9}})
    model, ids = JetNemotronForCausalLM.random(config, seed=1).eval(), tokens(2, 9)
    cache = model.new_cache(2, 9)
    parts = [model(ids[:, a:b], cache=cache).logits for a, b in ((0, 5), (5, 6), (6, 9))]
    torch.testing.assert_close(torch.cat(parts, 1), model(ids).logits, rtol=0, atol=ATOL)
