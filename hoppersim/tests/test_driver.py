"""The driver's functions, called as a program linked to libcuda calls them."""

import ctypes

import numpy as np
import pytest

import hoppersim

SUCCESS, INVALID_VALUE, INVALID_DEVICE, NOT_FOUND, LAUNCH_FAILURE, NOT_SUPPORTED = 0, 1, 101, 500, 719, 801
MODULE, BLOCKS = ctypes.c_void_p, 4

PTX = b"""
.version 8.0
.target sm_90a
.address_size 64
.visible .global .align 4 .u32 factor = 3;
.visible .entry scale(.param .u64 x, .param .u32 n)
{
  .reg .pred %p<2>; .reg .b32 %r<8>; .reg .b64 %rd<4>;
  ld.param.u64 %rd1, [x];
  ld.param.u32 %r1, [n];
  mov.u32 %r2, %ctaid.x;
  mov.u32 %r3, %ntid.x;
  mov.u32 %r4, %tid.x;
  mad.lo.u32 %r2, %r2, %r3, %r4;
  setp.ge.u32 %p1, %r2, %r1;
  @%p1 bra END;
  mad.wide.u32 %rd2, %r2, 4, %rd1;
  ld.global.u32 %r5, [%rd2];
  ld.global.u32 %r6, [factor];
  mul.lo.u32 %r5, %r5, %r6;
  st.global.u32 [%rd2], %r5;
END:
  ret;
}
"""


@pytest.fixture(scope="module")
def cuda():
    return ctypes.CDLL(str(hoppersim.library_folder() / "libhoppersim.so"))


@pytest.fixture
def module(cuda):
    handle = ctypes.c_void_p()
    assert cuda.cuModuleLoadData(ctypes.byref(handle), PTX) == SUCCESS
    yield handle
    assert cuda.cuModuleUnload(handle) == SUCCESS


def function_of(cuda, module, name: bytes) -> ctypes.c_void_p:
    function = ctypes.c_void_p()
    assert cuda.cuModuleGetFunction(ctypes.byref(function), module, name) == SUCCESS
    return function


def launch(cuda, function, address: int, count: int, *, as_buffer: bool = False) -> int:
    x, n = ctypes.c_uint64(address), ctypes.c_uint32(count)
    if as_buffer:
        buffer = ctypes.create_string_buffer(bytes(x) + bytes(n))
        size = ctypes.c_size_t(12)
        pointer = ctypes.c_void_p
        extra = (pointer * 5)(1, ctypes.addressof(buffer), 2, ctypes.addressof(size), 0)
        return cuda.cuLaunchKernel(function, BLOCKS, 1, 1, 32, 1, 1, 0, None, None, extra)
    arguments = (ctypes.c_void_p * 2)(ctypes.addressof(x), ctypes.addressof(n))
    return cuda.cuLaunchKernel(function, BLOCKS, 1, 1, 32, 1, 1, 0, None, arguments, None)


@pytest.mark.parametrize("as_buffer", [False, True])
def test_a_module_is_loaded_and_launched(cuda, module, as_buffer):
    x = np.arange(100, dtype=np.uint32)
    device = ctypes.c_uint64()
    assert cuda.cuMemAlloc_v2(ctypes.byref(device), ctypes.c_size_t(400)) == SUCCESS
    assert cuda.cuMemcpyHtoD_v2(device, ctypes.c_void_p(x.ctypes.data), ctypes.c_size_t(400)) == SUCCESS
    with hoppersim.simulate():
        function = function_of(cuda, module, b"scale")
        assert launch(cuda, function, device.value, 100, as_buffer=as_buffer) == SUCCESS
        (record,) = hoppersim.launches()
    assert record["kernel"] == "scale" and record["grid"] == [BLOCKS, 1, 1]
    assert cuda.cuMemcpyDtoH_v2(ctypes.c_void_p(x.ctypes.data), device, ctypes.c_size_t(400)) == SUCCESS
    np.testing.assert_array_equal(x, 3 * np.arange(100))
    assert cuda.cuMemFree_v2(device) == SUCCESS


def test_variable_of_a_module(cuda, module):
    address, size = ctypes.c_uint64(), ctypes.c_size_t()
    assert cuda.cuModuleGetGlobal_v2(ctypes.byref(address), ctypes.byref(size), module, b"factor") == SUCCESS
    assert size.value == 4 and ctypes.c_uint32.from_address(address.value).value == 3
    assert cuda.cuModuleGetGlobal_v2(ctypes.byref(address), ctypes.byref(size), module, b"nothing") == NOT_FOUND


def test_unknown_function(cuda, module):
    function = ctypes.c_void_p()
    assert cuda.cuModuleGetFunction(ctypes.byref(function), module, b"nothing") == NOT_FOUND


def test_a_fault_is_raised(cuda, module):
    x = np.zeros(64, np.uint32)
    with pytest.raises(hoppersim.Fault) as caught, hoppersim.registered(x), hoppersim.simulate():
        assert launch(cuda, function_of(cuda, module, b"scale"), x.ctypes.data, 65) == LAUNCH_FAILURE
    assert caught.value.kind == "out-of-bounds global"


def test_device_and_context(cuda):
    device, value = ctypes.c_int(-1), ctypes.c_int()
    assert cuda.cuInit(0) == SUCCESS
    assert cuda.cuDeviceGet(ctypes.byref(device), 0) == SUCCESS and device.value == 0
    assert cuda.cuDeviceGet(ctypes.byref(device), 1) == INVALID_DEVICE
    assert cuda.cuDeviceGetAttribute(ctypes.byref(value), 75, 0) == SUCCESS  # compute capability, major
    assert value.value == 9
    name = ctypes.create_string_buffer(64)
    assert cuda.cuDeviceGetName(name, 64, 0) == SUCCESS and b"H200" in name.value
    made, current = ctypes.c_void_p(), ctypes.c_void_p()
    assert cuda.cuDevicePrimaryCtxRetain(ctypes.byref(made), 0) == SUCCESS
    assert cuda.cuCtxSetCurrent(made) == SUCCESS
    assert cuda.cuCtxGetCurrent(ctypes.byref(current)) == SUCCESS
    assert made.value and made.value == current.value


def test_functions_by_name(cuda):
    function, status = ctypes.c_void_p(), ctypes.c_int()
    look_up = cuda.cuGetProcAddress_v2
    for name, found in (
        (b"cuMemAlloc", True),
        (b"cuGraphCreate", True),
        (b"cuNoSuchThing", False),
        (b"cudaMalloc", False),
    ):
        error = look_up(name, ctypes.byref(function), 12000, ctypes.c_uint64(0), ctypes.byref(status))
        assert error == (SUCCESS if found else NOT_FOUND) and bool(function.value) == found
    assert look_up(b"cuMemAlloc", ctypes.byref(function), 12000, ctypes.c_uint64(0), ctypes.byref(status)) == SUCCESS
    assert function.value == ctypes.cast(cuda.cuMemAlloc_v2, ctypes.c_void_p).value


def test_what_is_not_modelled_is_named(cuda):
    with pytest.raises(hoppersim.Fault, match="cuGraphCreate") as caught, hoppersim.simulate():
        assert cuda.cuGraphCreate(None, 0) == NOT_SUPPORTED
    assert caught.value.kind == "unsupported runtime call"


def test_unmodelled_layout_of_a_tensor_map_is_named(cuda):
    data, storage = np.zeros((8, 64), np.float32), ctypes.create_string_buffer(192)
    aligned = -(-ctypes.addressof(storage) // 64) * 64
    u64, u32 = ctypes.c_uint64 * 2, ctypes.c_uint32 * 2
    interleave_16b = 1
    arguments = (7, 2, ctypes.c_void_p(data.ctypes.data), u64(64, 8), u64(256), u32(8, 8), u32(1, 1))
    encode = cuda.cuTensorMapEncodeTiled
    with pytest.raises(hoppersim.Fault, match="cuTensorMapEncodeTiled .interleaved"), hoppersim.simulate():
        assert encode(ctypes.c_void_p(aligned), *arguments, interleave_16b, 0, 0, 0) == NOT_SUPPORTED
