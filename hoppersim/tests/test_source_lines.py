"""Lines of the CUDA source and demangled names in the Faults and launches that Python sees."""

from pathlib import Path

import numpy as np
import pytest

import hoppersim

SOURCE = Path(__file__).parent / "kernels" / "program.cu"
TEXT = """
__device__ __noinline__ void raise(float* x, int n) {
  for (int i = 0; i < n; ++i) x[i] += 1;  // line 3
}
namespace named {
template <class T, int N> __global__ void add(T* x) {
  raise(x + threadIdx.x, N + 1);  // line 7
}
}
extern "C" int run(float* x) {
  named::add<float, 1><<<1, 32>>>(x);
  return cudaGetLastError();
}
"""


@pytest.fixture(scope="module")
def with_lines():
    return hoppersim.compile_cuda(TEXT, flags=["-lineinfo"])


def test_launches_name_kernels_as_c_plus_plus_does(with_lines):
    x = np.ones(33, np.float32)
    with hoppersim.simulate():
        assert with_lines.call("run", x) == 0
        (record,) = hoppersim.launches()
    assert record["kernel"] == "named::add<float, 1>(float*)"
    assert record["mangled"] == "_ZN5named3addIfLi1EEEvPT_"
    assert record["occupancy"] == 32


def test_a_fault_tells_the_line_and_where_it_was_called(with_lines):
    with pytest.raises(hoppersim.Fault) as caught:
        with_lines.call("run", np.ones(32, np.float32))
    (report,) = caught.value.reports
    assert report["kind"] == "out-of-bounds global" and report["kernel"] == "named::add<float, 1>(float*)"
    assert report["mangled"] == "_ZN5named3addIfLi1EEEvPT_"
    path = with_lines.source
    assert report["source"] == f"{path}:3, inlined at {path}:7"
    where = f"kernel {report['kernel']}, {report['source']}, ptx line {report['line']}: {report['instruction']}"
    assert where in str(caught.value) and report["instruction"].startswith("ld.")


def test_without_lineinfo_there_is_no_source():
    library = hoppersim.compile_cuda(TEXT)
    with pytest.raises(hoppersim.Fault) as caught:
        library.call("run", np.ones(32, np.float32))
    assert caught.value.reports[0]["source"] is None and ", ptx line" in str(caught.value)


PTX = """
.version 8.0
.target sm_90a
.address_size 64
.visible .entry wait_for_ever()
{
	.shared .align 8 .b8 bar[8];
	.reg .pred %p<2>;
	.loc 1 10 3
	mbarrier.init.shared.b64 [bar], 1;
	.loc 2 5 1
	.loc 1 20 3, function_name info, inlined_at 2 5 1
	mbarrier.arrive.expect_tx.shared.b64 _, [bar], 64;
LOOP:
	.loc 1 30 3
	mbarrier.try_wait.parity.shared.b64 %p1, [bar], 0;
	@!%p1 bra LOOP;
	ret;
}
	.file	1 "/a//b.cu"
	.file	2 "kernel.cu", 1, 2
"""


@pytest.mark.parametrize("timing", ["early", "late"])
def test_bytes_that_never_come_are_told_at_their_expect_tx(timing):
    with hoppersim.simulate(timing=timing), pytest.raises(hoppersim.Fault) as caught:
        hoppersim.Module(PTX).launch("wait_for_ever", 1, 1)
    assert caught.value.kind == "expect_tx too large"
    (report,) = caught.value.reports
    assert report["source"] == "/a//b.cu:20, inlined at kernel.cu:5"
    assert report["instruction"].startswith("mbarrier.arrive.expect_tx")
    assert "at /a//b.cu:30, ptx line 16: mbarrier.try_wait" in str(caught.value)


def test_a_dead_lock_is_told_at_the_wait_for_an_mbarrier():
    text = PTX.replace("mbarrier.arrive.expect_tx.shared.b64 _, [bar], 64;", "")
    with pytest.raises(hoppersim.Fault) as caught:
        hoppersim.Module(text).launch("wait_for_ever", 1, 1)
    assert caught.value.kind == "dead-lock" and caught.value.reports[0]["source"] == "/a//b.cu:30"
