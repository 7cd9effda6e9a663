"""The CPU ops compute the bits that they are known to compute (``cpu_bits.py``)."""

import json

import cpu_bits
import pytest

from jetkernels import _library

RECORDED = json.loads(cpu_bits.FILE.read_text())


@pytest.mark.parametrize("isa", RECORDED["digests"])
def test_same_bits(isa):
    facts = _library.build_info()
    if facts["compiler"] != RECORDED["compiler"]:
        pytest.skip(f"recorded with {RECORDED['compiler']}, this library was compiled by {facts['compiler']}")
    if isa not in facts["cpu_isas"][: facts["cpu_isas"].index(facts["cpu_isa"]) + 1]:
        pytest.skip(f"this machine or build cannot run {isa}")
    got = cpu_bits.digests_on(isa)
    assert got == RECORDED["digests"][isa]
