"""What docs/integrations.md tells a user to type runs."""

import inspect
import re
import subprocess
import sys

import pytest
from support.paths import ROOT

import jetkernels.integrations
from jetkernels.ops._gated_arguments import Options

PAGE = (ROOT / "docs" / "integrations.md").read_text()
BLOCKS = re.findall(r"```(python(?: fla)?)\n(.*?)```", PAGE, re.DOTALL)


def run(code: str) -> subprocess.CompletedProcess:
    """In a process of its own: patches and registrations stay in it."""
    return subprocess.run(
        [sys.executable, "-W", "error::UserWarning:jetkernels", "-c", code], capture_output=True, text=True, cwd=ROOT
    )


def test_its_code_runs():
    pytest.importorskip("transformers", reason="needs the package transformers")
    code = [block for kind, block in BLOCKS if kind == "python"]
    assert len(code) == 4 and "```" not in "".join(code)
    done = run("\n".join(code))
    assert done.returncode == 0, done.stderr[-3000:]
    assert "qwen3_next.torch_chunk_gated_delta_rule" in done.stdout and "Backend(name=" in done.stdout


def test_its_code_for_flash_linear_attention_runs():
    pytest.importorskip("triton", reason="needs the package triton")
    pytest.importorskip("einops", reason="needs the package einops")
    if run("import fla.backends").returncode:
        pytest.skip("needs the packages flash-linear-attention 0.6 and fla-core")
    (code,) = [block for kind, block in BLOCKS if kind == "python fla"]
    done = run("import torch\n" + code)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "fla.ops.gated_delta_rule.chunk_gated_delta_rule" in done.stdout


def test_it_names_every_argument_and_function():
    quoted = {*re.findall(r"\w+", " ".join(re.findall(r"`([^`\n]+)`", PAGE)))}
    assert {*Options._fields} <= quoted
    assert {
        name for name in jetkernels.integrations.__all__ if inspect.isfunction(getattr(jetkernels.integrations, name))
    } <= quoted


def test_neither_library_is_imported_before_it_is_asked_for():
    done = run("import sys, jetkernels.integrations; print([m for m in ('transformers', 'fla') if m in sys.modules])")
    assert done.stdout.strip() == "[]", done.stdout + done.stderr
