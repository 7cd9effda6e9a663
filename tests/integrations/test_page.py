"""What docs/integrations.md tells a user to type runs."""

import inspect
import re
import subprocess
import sys

import pytest
import torch
from support.documents import blocks, run_python
from support.paths import ROOT

import jetkernels.integrations
from jetkernels.integrations import _calls
from jetkernels.ops._gated_arguments import Options

PAGE = "docs/integrations.md"
FLA = "register_fla_backend"  # is in the blocks that need flash-linear-attention


# No call of the page stays with the other library.
pytestmark = pytest.mark.filterwarnings("error:jetkernels", "ignore:Triton is not supported")


def test_its_code_runs(monkeypatch, capsys):
    pytest.importorskip("transformers", reason="needs the package transformers")
    patch, made = jetkernels.integrations.patch_transformers, []
    monkeypatch.setattr(jetkernels.integrations, "patch_transformers", lambda: made.append(patch()) or made[-1])
    monkeypatch.setattr(_calls, "_announced", set())
    try:
        run_python(PAGE, [block for block in blocks(PAGE, "python") if FLA not in block.code], {})
    finally:
        for one in made:
            one.undo()
    out = capsys.readouterr().out
    assert len(made) == 2 and "qwen3_next.torch_chunk_gated_delta_rule" in out and "Backend(name=" in out


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
    code = "import sys, jetkernels.integrations; print([m for m in ('transformers', 'fla') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.strip() == "[]", done.stdout + done.stderr
