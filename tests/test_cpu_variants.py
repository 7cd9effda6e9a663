"""Every instruction-set variant of the C++ ops that this machine can run, not only the one it would choose."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from jetkernels import _library

TESTS = Path(__file__).parent
FILES = (
    "chunk_gated_delta_rule", "recurrent_gated_delta_rule", "dynamic_conv", "dynamic_conv_step", "apply_dynamic_conv",
)  # fmt: skip
CHOSEN = "ops and (equals_the_reference or gradients_equal or any_rows or any_number or any_shape or every_element or many_heads)"


@pytest.mark.parametrize("isa", [isa for isa in _library.build_info()["cpu_isas"] if isa != _library.build_info()["cpu_isa"]])
def test_variant(isa):
    environment = {**os.environ, "JETKERNELS_CPU_ISA": isa}
    script = "from jetkernels import _library; print(_library.build_info()['cpu_isa'])"
    used = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True)
    if used.stdout.strip() != isa:
        pytest.skip(f"this machine cannot run {isa}")
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-k", CHOSEN]
    command += [f"{TESTS}/test_{name}.py" for name in FILES]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=TESTS.parent)
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-2000:]
