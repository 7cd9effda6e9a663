"""What is not modelled is an error of the launch or the call that needs it; everything else in the program works."""

import ctypes
import re
import subprocess
from pathlib import Path

import numpy as np
import pytest
from refusal import refusal

import hoppersim

SUCCESS, LAUNCH_FAILURE, NOT_SUPPORTED = 0, 719, 801

KERNELS = """
.version 8.0
.target sm_90a
.address_size 64
.visible .entry bad(.param .u64 y)
{
  .reg .pred %p<2>; .reg .b32 %r<4>; .reg .b64 %rd<2>;
  STATEMENT
  mov.u32 %r1, 1;
AFTER:
  setp.eq.u32 %p1, %r1, 0;
  @%p1 bra AFTER;
  ret;
}
.visible .entry good(.param .u64 y)
{
  .reg .b64 %rd<2>;
  ld.param.u64 %rd1, [y];
  st.global.u32 [%rd1], 7;
  ret;
}
"""


@pytest.mark.parametrize(
    "statement, kind",
    [
        ("frobnicate.u32 %r1, %r2;", "unsupported instruction"),
        ("@%p1 tcgen05.mma.cta_group::1.kind::f16 [%r1], %rd1, %rd1, %r2, %p1;", "unsupported instruction"),
        ("mov.u32 %r1, %no_such_register;", "unsupported instruction"),
        ("add.sideways.u32 %r1, %r2, %r3;", "unsupported instruction"),
        ("@%p1 bra;", "unsupported instruction"),
        ("bra NOWHERE;", "ptx syntax"),
        (".reg .v4 .f32 wide;", "unsupported instruction"),
        (".frob %r1, 4;", "unsupported instruction"),
        ("add.u32 %r1, %r2, 0xfffffffffffffffffffffff;", "ptx syntax"),
    ],
)
def test_an_unknown_statement_refuses_its_kernel_only(statement, kind):
    module = hoppersim.Module(KERNELS.replace("STATEMENT", statement))
    assert sorted(module.kernels) == ["bad", "good"]
    y = np.zeros(1, np.uint32)
    module.launch("good", 1, 1, (y,))
    assert y[0] == 7
    found = refusal(module, "bad")
    assert found.kind == kind and "kernel bad, line 8: " in str(found)
    module.launch("good", 1, 1, (y,))


def test_the_first_unknown_statement_is_named():
    found = refusal(KERNELS.replace("STATEMENT", "one.u32 %r1;\n  two.u32 %r1;"), "bad")
    assert "one.u32" in str(found) and "two.u32" not in str(found)


def test_text_that_is_no_ptx_is_refused_at_once():
    with pytest.raises(hoppersim.Fault) as caught:
        hoppersim.Module("int main() {}")
    assert caught.value.kind == "ptx syntax"


# ---- Host code

SOURCE = r"""
#include <cuda.h>
#include <cuda_runtime.h>
__global__ void bad(int* y) { asm volatile("vadd4.u32.u32.u32 %0, %0, %0, %0;" : "+r"(*y)); }
__global__ void good(int* y) { *y = 7; }
__device__ alignas(128) unsigned char wide[256];
__global__ void aligned(int* y) { *y = static_cast<int>(reinterpret_cast<unsigned long long>(wide) % 128); }
extern "C" {
int launch_bad(int* y) { return bad<<<1, 1>>>(y), cudaGetLastError(); }
int launch_good(int* y) { return good<<<1, 1>>>(y), cudaGetLastError(); }
int launch_aligned(int* y) { return aligned<<<1, 1>>>(y), cudaGetLastError(); }
int capture() {
  cudaStream_t stream;
  cudaStreamCreate(&stream);
  const int error = cudaStreamBeginCapture(stream, cudaStreamCaptureModeGlobal);
  return error == cudaGetLastError() ? error : -1;
}
int elapsed() {
  cudaEvent_t event;
  cudaEventCreate(&event);
  float time;
  return cudaEventElapsedTime(&time, event, event);
}
const char* text_of_graph() {
  cudaGraph_t graph;
  return cudaGetErrorString(cudaGraphCreate(&graph, 0));
}
int graph_of_the_driver() {
  void* function = nullptr;
  cudaDriverEntryPointQueryResult found;
  cudaGetDriverEntryPointByVersion("cuGraphCreate", &function, 12000, cudaEnableDefault, &found);
  CUgraph graph;
  return reinterpret_cast<CUresult (*)(CUgraph*, unsigned)>(function)(&graph, 0);
}
int graph_then_fault() {
  cudaGraph_t graph;
  cudaGraphCreate(&graph, 0);
  return launch_good(nullptr);
}
}
"""


@pytest.fixture(scope="module")
def library():
    return hoppersim.compile_cuda(SOURCE)


def test_kernel_of_a_program(library):
    y = np.zeros(1, np.int32)
    with pytest.raises(hoppersim.Fault, match="vadd4.u32.u32.u32") as caught:
        library.call("launch_bad", y)
    assert caught.value.kind == "unsupported instruction"
    assert library.call("launch_good", y) == SUCCESS
    assert y[0] == 7
    with hoppersim.registered(y), pytest.raises(hoppersim.Fault, match="vadd4"), hoppersim.simulate():
        assert library.cdll.launch_bad(ctypes.c_void_p(y.ctypes.data)) == LAUNCH_FAILURE


def test_variable_with_wide_alignment(library):
    y = np.ones(1, np.int32)
    assert library.call("launch_aligned", y) == SUCCESS
    assert y[0] == 0


@pytest.mark.parametrize(
    "function, name",
    [
        ("capture", "cudaStreamBeginCapture"),
        ("elapsed", "cudaEventElapsedTime"),
        ("graph_of_the_driver", "cuGraphCreate"),
    ],
)
def test_call_that_is_not_modelled(library, function, name):
    with pytest.raises(hoppersim.Fault, match=rf"\b{name}\w* is not modelled") as caught:
        library.call(function)
    assert caught.value.kind == "unsupported runtime call"
    assert library.call("launch_good", np.zeros(1, np.int32)) == SUCCESS, "it must not stick"
    with pytest.raises(hoppersim.Fault, match=name), hoppersim.simulate():
        assert library.cdll[function]() == NOT_SUPPORTED


def test_text_of_the_error_names_the_call(library):
    function = library.cdll.text_of_graph
    function.restype = ctypes.c_char_p
    with pytest.raises(hoppersim.Fault, match="cudaGraphCreate"), hoppersim.simulate():
        assert function().decode().startswith("hoppersim: unsupported runtime call: cudaGraphCreate")


def test_a_finding_is_told_before_a_call_that_is_not_modelled(library):
    with pytest.raises(hoppersim.Fault) as caught:
        library.call("graph_then_fault")
    assert caught.value.kind == "out-of-bounds global"
    assert "before it: unsupported runtime call: cudaGraphCreate" in str(caught.value)


# ---- Names


@pytest.fixture(scope="module")
def simulator():
    return ctypes.CDLL(str(hoppersim.library_folder() / "libhoppersim.so"))


def declared(header: str, pattern: str) -> set[str]:
    include = Path(hoppersim.nvcc()).resolve().parent.parent / "include"
    names = set()
    for option in ([], ["-DCUDA_API_PER_THREAD_DEFAULT_STREAM"]):
        command = ["g++", "-E", "-P", "-x", "c++", "-I", str(include), *option, str(include / header)]
        text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        names |= set(re.findall(pattern, text))
    return names


@pytest.mark.parametrize(
    "header, pattern, least",
    [
        ("cuda_runtime_api.h", r"\bextern[^;(]*\b(cuda[A-Z]\w*)\s*\(", 300),
        ("cuda.h", r"\bCUresult\s+(cu[A-Z]\w*)\s*\(", 400),
    ],
)
def test_every_function_of_the_toolkit_exists(simulator, header, pattern, least):
    names = declared(header, pattern)
    assert len(names) >= least
    missing = sorted(name for name in names if not hasattr(simulator, name))
    assert not missing


@pytest.mark.parametrize("name", ["cudaBindNothing", "cuNoSuchThing"])
def test_other_names_do_not_exist(simulator, name):
    assert not hasattr(simulator, name)
