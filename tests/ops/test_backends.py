"""Every backend that can serve a CPU tensor, not only the one this machine would choose."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from jetkernels import _library

OPS = Path(__file__).parent
FILES = (
    "sequence_ops",
    "chunk_gated_delta_rule",
    "prefill_gated_delta_rule",
    "recurrent_gated_delta_rule",
    "recurrent_gated_delta_rule_verify",
    "dynamic_conv_step",
    "jet_block_step",
    "attention_step",
    "swiglu",
    "delta_gates",
    "pool_ops",
)
PROPERTIES = (
    "equals_the_reference equals_the_definition rows_in_order gradients_equal any_rows any_number any_shape "
    "every_element many_heads"
)
CHOSEN = f"ops] and ({' or '.join(PROPERTIES.split())})"  # "ops]": an id ends with the name of its backend


def python(script: str, environment: dict[str, str]) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True)


def run_op_tests(environment: dict[str, str]) -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-k", CHOSEN]
    command += [f"{OPS}/test_{name}.py" for name in FILES]
    environment = {"HYPOTHESIS_PROFILE": "few", **environment}
    run = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=OPS)
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-2000:]


@pytest.mark.slow
@pytest.mark.parametrize(
    "isa", [isa for isa in _library.build_info()["cpu_isas"] if isa != _library.build_info()["cpu_isa"]]
)
def test_instruction_set_variant(isa):
    environment = {**os.environ, "JETKERNELS_CPU_ISA": isa}
    used = python("from jetkernels import _library; print(_library.build_info()['cpu_isa'])", environment)
    if used.stdout.strip() != isa:
        pytest.skip(f"this machine cannot run {isa}")
    run_op_tests(environment)


@pytest.mark.slow
def test_plain_path_through_the_dispatcher():
    """The way that a CUDA tensor takes until a kernel serves it: binding, checks, dispatcher, plain PyTorch."""
    run_op_tests({**os.environ, "JETKERNELS_BACKEND": "plain"})


def test_plain_path_is_announced_once_with_its_reason():
    script = """if True:
        import warnings, torch, jetkernels
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for _ in range(3):
                jetkernels.apply_dynamic_conv(torch.randn(1, 4, 2), torch.randn(1, 4, 2, 3))
        print(*[str(w.message) for w in caught if "jetkernels" in str(w.message)], sep="\\n")
    """
    said = python(script, {**os.environ, "JETKERNELS_BACKEND": "plain"}).stdout
    assert said == "jetkernels: apply_dynamic_conv runs as plain PyTorch: JETKERNELS_BACKEND=plain asks for it\n"
    assert python(script, {k: v for k, v in os.environ.items() if k != "JETKERNELS_BACKEND"}).stdout == "\n"


def test_a_plain_path_that_fails_says_why():
    """Also where warnings are errors, and its own announcement is what fails."""
    script = """if True:
        import torch, jetkernels
        for _ in range(2):
            try:
                jetkernels.apply_dynamic_conv(torch.randn(1, 4, 2), torch.randn(1, 4, 2, 3))
            except UserWarning as warning:
                print(warning)
    """
    environment = {**os.environ, "JETKERNELS_BACKEND": "plain", "PYTHONWARNINGS": "error::UserWarning"}
    announced = "jetkernels: apply_dynamic_conv runs as plain PyTorch: JETKERNELS_BACKEND=plain asks for it\n"
    assert python(script, environment).stdout == 2 * announced
