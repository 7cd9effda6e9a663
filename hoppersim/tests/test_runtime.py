"""The simulated CUDA runtime: nvcc's host code, launches, limits, memory, faults, and the library's own build on it."""

import ctypes
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from refusal import refusal

import hoppersim

SOURCE = Path(__file__).parent / "kernels" / "runtime.cu"
SUCCESS, INVALID_VALUE, INVALID_CONFIGURATION, INVALID_DEVICE_FUNCTION = 0, 1, 9, 98
INVALID_DEVICE, LAUNCH_FAILURE, INVALID_CLUSTER_SIZE = 101, 719, 912
STATIC_SHARED = 4096  # of the kernel with_static_shared


@pytest.fixture(scope="module")
def library():
    made = hoppersim.compile_cuda(SOURCE)
    made.cdll.cudaGetLastError()  # of launches in other tests
    return made


@pytest.fixture
def fresh(library, tmp_path):
    """The library loaded once more: kernels whose attributes nobody has set."""
    copy = tmp_path / "fresh.so"
    shutil.copy(library.path, copy)
    return hoppersim.Library(copy, library.source, library.options)


# ---- Host code


@pytest.mark.parametrize("timing", ["early", "late"])
@pytest.mark.parametrize("seed", [0, 3])
def test_triple_chevron_launch(library, timing, seed):
    x = np.arange(1000, dtype=np.float32)
    lane = np.arange(1000) % 128 % 4
    expected = x * 3 * (lane + 1) + np.float32(7.25)
    before = library.call("read_touched")
    with hoppersim.simulate(timing=timing, seed=seed):
        assert library.call("run_scale", x, 1000, 0.25) == SUCCESS
        (record,) = hoppersim.launches()
    np.testing.assert_array_equal(x, expected)
    assert library.call("read_touched") == before + 1000
    assert record["grid"] == [8, 1, 1] and record["block"] == [128, 1, 1] and record["dynamic_shared"] == 512
    assert "scale" in record["kernel"]
    assert hoppersim.last_counters() == record["counters"]
    assert record["counters"]["global_read_bytes"] >= 4000 and record["counters"]["warp_instructions"] > 0


def test_variables_are_written_and_read(library):
    factors = np.array([4, 3, 2, 1], np.float32)
    x = np.ones(4, np.float32)
    try:
        assert library.call("write_variables", factors) == SUCCESS
        assert library.call("read_touched") == 0
        library.call("run_scale", x, 4, -7.0)
        np.testing.assert_array_equal(x, 3 * factors)
        assert library.call("read_touched") == 4
    finally:
        library.call("write_variables", np.array([1, 2, 3, 4], np.float32))


def test_struct_parameter(library):
    y = np.zeros(192, np.int32)
    assert library.call("run_unpack", y) == SUCCESS
    np.testing.assert_array_equal(y, np.arange(192) - 96 + 1000)


@pytest.mark.parametrize("grid", [2, 6])
def test_declared_cluster(library, grid):
    y = np.zeros(grid, np.int32)
    assert library.call("run_ranks", y, grid) == SUCCESS
    np.testing.assert_array_equal(y, np.arange(grid) % 2 * 100 + 2)


@pytest.mark.parametrize("cluster", [1, 3, 4, 8])
def test_cluster_by_launch_attribute(library, cluster):
    y = np.zeros(24, np.int32)
    assert library.call("run_ranks_by_launch", y, 24, cluster, 0) == SUCCESS
    np.testing.assert_array_equal(y, np.arange(24) % cluster * 100 + cluster)
    assert hoppersim.launches()[-1]["cluster"] == [cluster, 1, 1]


def test_memory_streams_and_events(library):
    # Exact with or without a fused multiply-add.
    x = np.random.default_rng(0).integers(-999, 999, 300).astype(np.float32)
    y = np.empty_like(x)
    assert library.call("round_trip", x, y, 300) == SUCCESS
    np.testing.assert_array_equal(y, x * 3 * (np.arange(300) % 128 % 4 + 1).astype(np.float32) + np.float32(0.5))


# ---- What the hardware refuses


@pytest.mark.parametrize(
    "grid, threads, shared, error",
    [
        ((1, 1), 128, 512, SUCCESS),
        ((0, 1), 128, 512, INVALID_CONFIGURATION),
        ((1, 65536), 128, 512, INVALID_CONFIGURATION),
        ((1, 1), 0, 512, INVALID_CONFIGURATION),
        ((1, 1), 1025, 512, INVALID_CONFIGURATION),
        ((1, 1), 129, 516, INVALID_VALUE),  # the kernel's launch bound is 128
        ((1, 1), 128, 48 * 1024, SUCCESS),
        ((1, 1), 128, 48 * 1024 + 1, INVALID_VALUE),  # without opting in
    ],
)
def test_launch_limits(fresh, grid, threads, shared, error):
    assert fresh.call("launch_shape", *grid, threads, shared) == error


def test_shared_memory_needs_opting_in_up_to_the_limit(fresh):
    most = 227 * 1024
    assert fresh.call("allow_shared", most + 1) == INVALID_VALUE
    assert fresh.call("allow_shared", 100_000) == SUCCESS
    assert fresh.call("launch_shape", 1, 1, 128, 100_001) == INVALID_VALUE
    assert fresh.call("launch_shape", 1, 1, 128, 100_000) == SUCCESS
    assert fresh.call("allow_shared", most) == SUCCESS
    assert fresh.call("launch_shape", 1, 1, 128, most) == SUCCESS
    assert fresh.call("allow_shared_beside_static", most) == INVALID_VALUE
    assert fresh.call("allow_shared_beside_static", most - STATIC_SHARED) == SUCCESS


@pytest.mark.parametrize(
    "grid, cluster, non_portable, error",
    [
        (24, 5, 0, INVALID_CONFIGURATION),
        (24, 12, 0, INVALID_CLUSTER_SIZE),
        (24, 12, 1, SUCCESS),
        (34, 17, 1, INVALID_CLUSTER_SIZE),
    ],
)
def test_cluster_limits(fresh, grid, cluster, non_portable, error):
    assert fresh.call("run_ranks_by_launch", np.zeros(34, np.int32), grid, cluster, non_portable) == error


def test_grid_must_be_a_multiple_of_the_declared_cluster(library):
    assert library.call("run_ranks", np.zeros(3, np.int32), 3) == INVALID_CONFIGURATION


def test_unknown_kernel(library):
    assert library.call("unknown_kernel") == INVALID_DEVICE_FUNCTION


# ---- Facts


def test_device_is_an_h200(library):
    values = np.zeros(6, np.int32)
    assert library.call("device", values) == INVALID_DEVICE  # there is no device 1
    assert values.tolist() == [1, 90, 132, 227 * 1024, 65536, 2048]


def test_versions(library):
    values = np.zeros(2, np.int32)
    assert library.call("versions", values) == SUCCESS
    runtime, driver = values.tolist()
    assert 12000 <= runtime <= driver and driver >= 13020, "CuTe has workarounds for older drivers"


def test_kernel_attributes(fresh):
    values = np.zeros(5, np.int32)
    assert fresh.call("attributes", values) == SUCCESS
    assert values.tolist() == [STATIC_SHARED, 1024, 48 * 1024 - STATIC_SHARED, 128, 2]


def test_occupancy(fresh):
    fresh.call("allow_shared", 227 * 1024)
    assert fresh.call("blocks_per_multiprocessor", 128, 227 * 1024) == 1
    assert fresh.call("blocks_per_multiprocessor", 128, 113 * 1024) == 2
    assert fresh.call("blocks_per_multiprocessor", 129, 0) == 0
    # Without the compiler's report the most registers that 128 threads allow (255) are assumed.
    assert fresh.call("blocks_per_multiprocessor", 128, 0) == 2
    fresh.use_compiler_report()
    assert fresh.call("blocks_per_multiprocessor", 128, 0) == 16


def test_compiler_report(library):
    report = library.resources()
    name = next(name for name in report if "with_static_shared" in name)
    assert report[name]["static_shared"] == STATIC_SHARED
    assert 4 <= report[name]["registers"] <= 64 and report[name]["spill_bytes"] == 0


def test_tensor_map_entry_point(library):
    aligned = torch.zeros(16, 64).numpy()  # torch aligns to 64 bytes
    assert library.call("encode_tensor_map", aligned, 256) == SUCCESS
    assert library.call("encode_tensor_map", aligned, 252) == INVALID_VALUE  # strides are multiples of 16 bytes
    assert library.call("unknown_entry_point") == 1


# ---- Faults


def test_fault_is_raised_and_told(library):
    x = np.zeros(64, np.float32)
    with pytest.raises(hoppersim.Fault) as caught:
        library.call("run_past_the_end", x, 64)
    assert caught.value.kind == "out-of-bounds global"
    assert "past_the_end" in str(caught.value)

    with pytest.raises(hoppersim.Fault, match="out-of-bounds global"), hoppersim.registered(x), hoppersim.simulate():
        function = library.cdll.text_of_past_the_end
        function.restype, function.argtypes = ctypes.c_char_p, [ctypes.c_void_p, ctypes.c_int64]
        text = function(x.ctypes.data, 64).decode()
        assert text.startswith("hoppersim: out-of-bounds global"), text
    assert library.call("run_scale", x, 64, 0.0) == SUCCESS, "a fault must not stick"


def test_fault_comes_before_the_error_it_caused(library):
    x = np.zeros(64, np.float32)
    with pytest.raises(hoppersim.Fault) as caught, hoppersim.registered(x), hoppersim.simulate():
        library.cdll.run_past_the_end(ctypes.c_void_p(x.ctypes.data), ctypes.c_int64(64))
        raise ValueError("what a binding makes of the failed launch")
    assert isinstance(caught.value.__cause__, ValueError)


def test_unregistered_memory_is_out_of_bounds(library):
    x = np.zeros(64, np.float32)
    library.cdll.run_scale(ctypes.c_void_p(x.ctypes.data), ctypes.c_int64(64), ctypes.c_double(0))
    with pytest.raises(hoppersim.Fault, match="out-of-bounds global"):
        hoppersim._native().raise_fault()
    with hoppersim.simulate(check_global=False):
        library.cdll.run_scale(ctypes.c_void_p(x.ctypes.data), ctypes.c_int64(64), ctypes.c_double(0))


def test_read_only_arrays_are_not_written(library):
    x = np.zeros(64, np.float32)
    x.flags.writeable = False
    with pytest.raises(hoppersim.Fault, match="out-of-bounds global"):
        library.call("run_scale", x, 64, 0.0)


def test_use_after_free_and_double_free(library):
    with pytest.raises(hoppersim.Fault, match="out-of-bounds global"):
        library.call("use_after_free")
    assert library.call("double_free") == INVALID_VALUE


def test_library_without_ptx():
    flags = ["-gencode", "arch=compute_90a,code=sm_90a"]
    source = (
        'extern "C" __global__ void empty() {}\nextern "C" int go() { empty<<<1, 1>>>(); return cudaGetLastError(); }\n'
    )
    both = hoppersim.compile_cuda(source, flags=flags)
    assert both.call("go") == SUCCESS, "machine code beside the PTX is passed over"
    path = Path(both.path).with_name("machine_code_only.so")
    command = [
        hoppersim.nvcc(),
        *flags,
        "-cudart",
        "none",
        "-shared",
        "-Xcompiler",
        "-fPIC",
        "-x",
        "cu",
        "-",
        "-o",
        str(path),
        f"-L{hoppersim.library_folder()}",
        "-lhoppersim",
        "-Xlinker",
        f"-rpath={hoppersim.library_folder()}",
    ]
    subprocess.run(command, input=source, text=True, check=True)
    with pytest.raises(hoppersim.Fault) as caught:
        hoppersim.Library(path).call("go")
    assert caught.value.kind == "no ptx"


# ---- PTX text

ADD = """
.version 8.0
.target sm_90a
.address_size 64
.global .align 4 .u32 launches = 40;
.visible .entry add(.param .u64 x, .param .u8 small, .param .f32 scale, .param .f64 offset,
                    .param .align 8 .b8 pair[16])
{
  .reg .b32 %r<8>; .reg .b64 %rd<8>; .reg .f32 %f<8>; .reg .f64 %fd<8>;
  ld.param.u64 %rd1, [x];
  ld.param.u8 %r1, [small];
  ld.param.f32 %f1, [scale];
  ld.param.f64 %fd1, [offset];
  ld.param.u32 %r2, [pair+12];
  mov.u32 %r3, %tid.x;
  mul.wide.u32 %rd2, %r3, 4;
  add.s64 %rd3, %rd1, %rd2;
  ld.global.f32 %f2, [%rd3];
  cvt.rn.f32.f64 %f3, %fd1;
  fma.rn.f32 %f4, %f2, %f1, %f3;
  add.u32 %r4, %r1, %r2;
  cvt.rn.f32.u32 %f5, %r4;
  add.f32 %f6, %f4, %f5;
  st.global.f32 [%rd3], %f6;
  setp_free:
  mov.u64 %rd4, launches;
  atom.global.add.u32 %r5, [%rd4], 1;
  ret;
}
"""


@pytest.mark.parametrize(
    "make", [lambda: np.arange(32, dtype=np.float32), lambda: torch.arange(32, dtype=torch.float32)]
)
def test_module_arguments(make):
    module = hoppersim.Module(ADD)
    assert module.kernels == ["add"]
    x = make()
    expected = np.arange(32, dtype=np.float32) * np.float32(1.5) + np.float32(0.25) + 210
    counters = module.launch("add", 1, 32, (x, 200, 1.5, 0.25, bytes(12) + (10).to_bytes(4, "little")))
    np.testing.assert_array_equal(np.asarray(x), expected)
    assert counters["global_write_bytes"] >= 128
    assert int.from_bytes(module.global_bytes("launches"), "little") == 72


def test_module_argument_mistakes():
    module = hoppersim.Module(ADD)
    x = np.zeros(32, np.float32)
    with pytest.raises(ValueError, match="takes 5 arguments"):
        module.launch("add", 1, 32, (x,))
    with pytest.raises(ValueError, match="16"):
        module.launch("add", 1, 32, (x, 0, 1.0, 1.0, bytes(12)))
    with pytest.raises(hoppersim.Fault, match="unknown kernel"):
        module.launch("sub", 1, 32, ())
    with pytest.raises(hoppersim.Fault, match="launch refused"):
        module.launch("add", 1, 2048, (x, 0, 1.0, 1.0, bytes(16)))
    with pytest.raises(hoppersim.Fault, match="out-of-bounds global"):
        module.launch("add", 1, 33, (x, 0, 1.0, 1.0, bytes(16)))


def test_views_bound_what_a_kernel_may_touch():
    module = hoppersim.Module(ADD)
    whole = torch.from_numpy(np.zeros(64, np.float32))  # not torch's own memory, which an allocator may have registered
    with pytest.raises(hoppersim.Fault, match="out-of-bounds global"):
        module.launch("add", 1, 32, (whole[16:40], 0, 1.0, 1.0, bytes(16)))


def test_unsupported_instruction_is_named():
    found = refusal(ADD.replace("setp_free:", "frobnicate.u32 %r6, %r5;"))
    assert found.kind == "unsupported instruction" and "frobnicate.u32 %r6, %r5" in str(found)


def test_options_are_restored():
    native = hoppersim._native()
    before = native.options()
    with pytest.raises(ZeroDivisionError), hoppersim.simulate(timing="late", seed=7, check_global=False):
        assert native.options() | {"timing": "late", "seed": 7, "check_global": False} == native.options()
        raise ZeroDivisionError
    assert native.options() == before
    with pytest.raises(ValueError, match="timing must be"), hoppersim.simulate(timing="never"):
        pass
