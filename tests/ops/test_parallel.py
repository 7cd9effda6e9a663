"""Parallel regions of the CPU kernels: how many a call opens, and that the results do not depend on who computes
them.
"""

import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from support.parallel_cases import TOKENS, calls, run
from support.paths import ROOT, TESTS

from jetkernels.ops._register import defined

BLOCKS = -(-3 * (TOKENS // 2) // 528)  # of dynamic_conv_backward

# One region each, but for the convolution: its operands are packed before they are multiplied; and for a JetBlock's
# step, whose delta rule follows the convolution.
REGIONS = dict.fromkeys(defined, 1) | {
    "dynamic_conv": 2,
    "dynamic_conv_backward": 1 + 2 * BLOCKS,
    "jet_block_step": 2,
}


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=["fp32", "bf16", "fp64"])
@pytest.mark.parametrize("size", ["tiny", "ordinary"])
@pytest.mark.parametrize("op", defined)
def test_one_thread_and_several_compute_the_same_bits(op, size, dtype, threads):
    """Below the threshold of csrc/cpu/tasks.h a call runs as with one thread, above it with all."""
    arguments = calls(size, dtype)[op]
    threads(1)
    alone = run(op, arguments)
    for count in (2, 3):
        threads(count)
        together = run(op, arguments)
        assert all(map(same_bits, alone, together)), f"{count} threads"


@pytest.fixture(scope="module")
def regions(tmp_path_factory):
    """Regions of each op and size, counted in a process whose OpenMP calls are watched."""
    shim = tmp_path_factory.mktemp("regions") / "count_regions.so"
    compiler = os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc") or shutil.which("c++")
    subprocess.run(
        [compiler, "-x", "c", "-shared", "-fPIC", "-O1", "-o", shim, TESTS / "support" / "count_regions.c", "-ldl"],
        check=True,
    )
    environment = {**os.environ, "LD_PRELOAD": str(shim), "PYTHONPATH": f"{ROOT}{os.pathsep}{TESTS}"}
    done = subprocess.run(
        [sys.executable, TESTS / "support" / "parallel_cases.py"], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_tiny_work_opens_no_parallel_region(regions):
    assert regions["tiny"] == dict.fromkeys(defined, 0)


def test_a_call_opens_few_parallel_regions(regions):
    assert regions["ordinary"] == REGIONS
