"""What docs/integrations.md tells a user to type runs."""

import inspect
import os
import re
import subprocess
import sys

import pytest
import torch
from support.documents import blocks, run_python
from support.paths import ROOT, TESTS

import jetkernels.integrations
from jetkernels.ops._gated_arguments import Options

PAGE = "docs/integrations.md"
FLA = "register_fla_backend"  # is in the blocks that need flash-linear-attention


def run(code: str) -> subprocess.CompletedProcess:
    """In a process of its own: a patch stays in it."""
    path = os.pathsep.join([str(TESTS), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-W", "error::UserWarning:jetkernels", "-c", code]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env={**os.environ, "PYTHONPATH": path})


def test_its_code_runs():
    pytest.importorskip("transformers", reason="needs the package transformers")
    done = run(
        "from support.documents import blocks, run_python\n"
        f"found = [block for block in blocks({PAGE!r}, 'python') if {FLA!r} not in block.code]\n"
        f"run_python({PAGE!r}, found, {{}})"
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "qwen3_next.torch_chunk_gated_delta_rule" in done.stdout and "Backend(name=" in done.stdout


@pytest.mark.filterwarnings("ignore:Triton is not supported")
def test_its_code_for_flash_linear_attention_runs(capsys):
    """It undoes what it has registered."""
    for module in ("triton", "einops", "fla.backends"):
        pytest.importorskip(module, reason="needs the packages flash-linear-attention 0.6, fla-core, triton and einops")
    found = [block for block in blocks(PAGE, "python") if FLA in block.code]
    run_python(PAGE, found, {"torch": torch})
    assert len(found) == 1 and "fla.ops.gated_delta_rule.chunk_gated_delta_rule" in capsys.readouterr().out


def test_it_names_every_argument_and_function():
    quoted = {*re.findall(r"\w+", " ".join(re.findall(r"`([^`\n]+)`", (ROOT / PAGE).read_text())))}
    assert {*Options._fields} <= quoted
    assert {
        name for name in jetkernels.integrations.__all__ if inspect.isfunction(getattr(jetkernels.integrations, name))
    } <= quoted


def test_neither_library_is_imported_before_it_is_asked_for():
    done = run("import sys, jetkernels.integrations; print([m for m in ('transformers', 'fla') if m in sys.modules])")
    assert done.stdout.strip() == "[]", done.stdout + done.stderr
