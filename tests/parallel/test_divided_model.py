"""A model over 2 and 4 gloo ranks against the same on one device; `checks` has what the ranks do."""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support.model_cases import small_config, small_model
from support.paths import ROOT

from jetkernels.__main__ import main
from jetkernels.parallel import HeadParallel, tensor_parallel_plan

PROGRAM = Path(__file__).with_name("checks.py")
SECTIONS = {"jet": {"num_heads": 2, "head_dim": 8, "expand_v": 1.5}, "swa": {"window_size": 5}}
CHECKS = [
    node.name
    for node in ast.parse(PROGRAM.read_text()).body
    if isinstance(node, ast.FunctionDef) and node.name.startswith("check_")
]


def torchrun(ranks: int, *words: str, folder: Path | None = None) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks), *words]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")]), "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600, cwd=folder)


@pytest.fixture(scope="module", params=[2, 4])
def failed(request, tmp_path_factory) -> dict[str, str]:
    """{check: what failed in it, on which rank}."""
    output = tmp_path_factory.mktemp("ranks") / "failed.json"
    done = torchrun(request.param, str(PROGRAM), str(output))
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(output.read_text())


@pytest.mark.parametrize("check", CHECKS)
def test_ranks(failed, check):
    assert not failed[check], failed[check]


def test_the_page_runs(tmp_path):
    (tmp_path / "program.py").write_text(
        "from support.documents import blocks, run_python\n"
        'run_python("docs/scaling.md", blocks("docs/scaling.md", "python"), {"__name__": "__main__"})\n'
        "import os\n"
        "os._exit(0)\n"  # as `leave` of the checks
    )
    done = torchrun(2, "program.py", folder=tmp_path)
    assert done.returncode == 0, done.stderr[-4000:]
    assert (tmp_path / "whole" / "model.safetensors").is_file()


def test_the_command_line_divides_a_model(tmp_path, capsys):
    config = tmp_path / "config.json"
    config.write_text(json.dumps(small_config(efficient_attention_config=SECTIONS).to_dict()))
    words = ["generate", "--config", str(config), "--random-weights", "--dtype", "fp32", "--max-new-tokens", "9"]
    words += ["--prompt-ids", "1,2,3,4,5,6,7"]
    assert main(words) == 0
    expected = capsys.readouterr().out
    done = torchrun(2, "-m", "jetkernels", *words, "--tensor-parallel")
    assert done.returncode == 0 and done.stdout == expected, done.stderr[-4000:]
    assert main([*words, "--tensor-parallel"]) == 2
    assert "--tensor-parallel needs several processes, got one: torchrun" in capsys.readouterr().err
    assert main([*words[:-2], "--tensor-parallel"]) == 2
    assert "--tensor-parallel needs --prompt, --prompt-ids or --prompt-file" in capsys.readouterr().err
    assert main([*words, "--tensor-parallel", "--quantize", "int8"]) == 2
    assert "--tensor-parallel divides weights that are not quantised" in capsys.readouterr().err


def test_the_plan_names_every_mixer_and_mlp():
    plan = tensor_parallel_plan(small_model())
    assert set(plan) == {f"model.layers.{i}.{part}" for i in range(4) for part in ("self_attn", "mlp")}
    assert all(isinstance(style, HeadParallel) for style in plan.values())


def test_other_modules_are_refused():
    with pytest.raises(ValueError, match="the module must be one of JetBlock, Attention, MLP, got Linear"):
        HeadParallel()._apply(torch.nn.Linear(2, 2), None)
