"""The CPU ops compute the bits that they are known to compute (``cpu_bits.py``)."""

import json
from pathlib import Path

import cpu_bits
import pytest

from jetkernels import _library

RECORDED = json.loads(cpu_bits.FILE.read_text())


def multiplies_bf16() -> bool:
    facts = Path("/proc/cpuinfo")
    return facts.exists() and "avx512_bf16" in facts.read_text()


@pytest.mark.parametrize("isa", RECORDED["digests"])
def test_same_bits(isa):
    facts = _library.build_info()
    if facts["compiler"] != RECORDED["compiler"]:
        pytest.skip(f"recorded with {RECORDED['compiler']}, this library was compiled by {facts['compiler']}")
    if isa not in facts["cpu_isas"][: facts["cpu_isas"].index(facts["cpu_isa"]) + 1]:
        pytest.skip(f"this machine or build cannot run {isa}")
    if isa == "avx512" and not multiplies_bf16():
        pytest.skip("recorded where the CPU multiplies bf16 itself (AVX512-BF16), which this one does not")
    got = cpu_bits.digests_on(isa)
    assert got == RECORDED["digests"][isa]
