"""wmma.load, wmma.mma, wmma.store, through nvcc's mma.h and in PTX, against NumPy."""

import numpy as np
import pytest
from refusal import refusal

import hoppersim

SHAPES = [(16, 16), (8, 32), (32, 8)]
SOURCE = r"""
#include <mma.h>
#include <cuda_bf16.h>
#include <type_traits>
using namespace nvcuda;

struct Problem {
  const void *a, *b, *c;
  void* d;
  int lda, ldb, ldc;
  bool scale;
};

template <class T, class C, class D, int M, int N, class LA, class LB, wmma::layout_t LC>
__global__ void product(Problem p) {
  __shared__ alignas(32) T staged[32 * 40];
  const int lines = std::is_same_v<LB, wmma::row_major> ? 16 : N;
  for (int i = threadIdx.x; i < lines * p.ldb; i += 32) staged[i] = static_cast<const T*>(p.b)[i];
  __syncwarp();
  wmma::fragment<wmma::matrix_a, M, N, 16, T, LA> a;
  wmma::fragment<wmma::matrix_b, M, N, 16, T, LB> b;
  wmma::fragment<wmma::accumulator, M, N, 16, C> c;
  wmma::fragment<wmma::accumulator, M, N, 16, D> d;
  wmma::load_matrix_sync(a, static_cast<const T*>(p.a), p.lda);
  wmma::load_matrix_sync(b, staged, p.ldb);
  wmma::load_matrix_sync(c, static_cast<const C*>(p.c), p.ldc, LC);
  if (p.scale) {  // element by element, as mma.h allows
    for (int i = 0; i < a.num_elements; ++i) a.x[i] = a.x[i] * T(2.f);
    for (int i = 0; i < c.num_elements; ++i) c.x[i] = c.x[i] * C(-1.f);
  }
  wmma::mma_sync(d, a, b, c);
  if (p.scale)
    for (int i = 0; i < d.num_elements; ++i) d.x[i] = d.x[i] * D(0.5f);
  wmma::store_matrix_sync(static_cast<D*>(p.d), d, p.ldc, LC);
}

template <class T, class C, class D, int M, int N>
int launch(const Problem& p, int layouts) {
  using row = wmma::row_major;
  using col = wmma::col_major;
  constexpr auto R = wmma::mem_row_major, K = wmma::mem_col_major;
  switch (layouts) {
    case 0: product<T, C, D, M, N, row, row, R><<<1, 32>>>(p); break;
    case 1: product<T, C, D, M, N, row, col, K><<<1, 32>>>(p); break;
    case 2: product<T, C, D, M, N, col, row, K><<<1, 32>>>(p); break;
    default: product<T, C, D, M, N, col, col, R><<<1, 32>>>(p);
  }
  return cudaGetLastError();
}

template <class T, class C, class D>
int launch(const Problem& p, int m, int layouts) {
  return m == 16  ? launch<T, C, D, 16, 16>(p, layouts)
         : m == 8 ? launch<T, C, D, 8, 32>(p, layouts)
                  : launch<T, C, D, 32, 8>(p, layouts);
}

extern "C" int run(const void* a, const void* b, const void* c, void* d, const int64_t* sizes, int64_t types) {
  const Problem p{a, b, c, d, int(sizes[0]), int(sizes[1]), int(sizes[2]), sizes[3] != 0};
  const int m = int(sizes[4]), layouts = int(sizes[5]);
  switch (types) {
    case 0: return launch<half, float, float>(p, m, layouts);
    case 1: return launch<half, half, half>(p, m, layouts);
    case 2: return launch<half, half, float>(p, m, layouts);
    case 3: return launch<half, float, half>(p, m, layouts);
    default: return launch<__nv_bfloat16, float, float>(p, m, layouts);
  }
}

template <class T>
__global__ void identity(const T* from, T* to) {
  wmma::fragment<wmma::accumulator, 16, 16, 16, T> f;
  wmma::load_matrix_sync(f, from, 16, wmma::mem_row_major);
  wmma::store_matrix_sync(to, f, 16, wmma::mem_col_major);
}
extern "C" int transpose(const float* from, float* to) { return identity<<<1, 32>>>(from, to), cudaGetLastError(); }

// What programs do to write the sum in another type: the fragments of one shape hold the same elements.
__global__ void narrowed(const float* from, half* to) {
  wmma::fragment<wmma::accumulator, 16, 16, 16, float> f;
  wmma::fragment<wmma::accumulator, 16, 16, 16, half> h;
  wmma::load_matrix_sync(f, from, 16, wmma::mem_row_major);
  for (int i = 0; i < f.num_elements; ++i) h.x[i] = __float2half(f.x[i]);
  wmma::store_matrix_sync(to, h, 16, wmma::mem_row_major);
}
extern "C" int narrow(const float* from, half* to) { return narrowed<<<1, 32>>>(from, to), cudaGetLastError(); }
"""
TYPES = [
    (np.float16, np.float32, np.float32),
    (np.float16, np.float16, np.float16),
    (np.float16, np.float16, np.float32),
    (np.float16, np.float32, np.float16),
    ("bf16", np.float32, np.float32),
]


@pytest.fixture(scope="module")
def library():
    return hoppersim.compile_cuda(SOURCE)


def aligned(matrix: np.ndarray, pad: int) -> tuple[np.ndarray, int]:
    """A copy whose lines are ``pad`` elements longer, at a multiple of 32 bytes; its stride in elements."""
    lines, length = matrix.shape
    memory = np.zeros(lines * (length + pad) * matrix.itemsize + 32, np.uint8)
    start = -memory.ctypes.data % 32
    copy = memory[start : start + memory.size - 32].view(matrix.dtype).reshape(lines, length + pad)
    copy[:, :length] = matrix
    return copy, length + pad


def stored(values: np.ndarray, dtype) -> np.ndarray:
    if dtype == "bf16":
        return (values.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)
    return values.astype(dtype)


@pytest.mark.parametrize("timing", ["early", "late"])
@pytest.mark.parametrize("scale", [False, True])
@pytest.mark.parametrize("layouts", range(4))
@pytest.mark.parametrize("m, n", SHAPES)
@pytest.mark.parametrize("types", range(len(TYPES)))
def test_products(library, types, m, n, layouts, scale, timing):
    rng = np.random.default_rng(types + m)
    of_ab, of_c, of_d = TYPES[types]
    # Small integers: exact in every type and order.
    a, b, c = (rng.integers(-4, 5, shape).astype(np.float32) for shape in ((m, 16), (16, n), (m, n)))
    a_column, b_column, c_column = layouts >= 2, layouts % 2 == 1, layouts in (1, 2)
    expected = (2 * (a @ b) - c) / 2 if scale else a @ b + c
    arrays = [(a, of_ab, a_column), (b, of_ab, b_column), (c, of_c, c_column)]
    (a, lda), (b, ldb), (c, ldc) = (aligned(stored(x.T if column else x, t), 8) for x, t, column in arrays)
    d, _ = aligned(np.zeros((n, m) if c_column else (m, n), of_d), 8)
    sizes = np.array([lda, ldb, ldc, scale, m, layouts], np.int64)
    with hoppersim.simulate(timing=timing):
        assert library.call("run", a, b, c, d, sizes, types) == 0
    got = d[:, : d.shape[1] - 8]
    np.testing.assert_array_equal((got.T if c_column else got).astype(np.float32), expected)
    counters = hoppersim.last_counters()
    assert counters["tensor_flop"] == 2 * m * n * 16
    assert counters["instructions"]["wmma"] == 5
    itemsize = np.dtype(of_c).itemsize
    assert counters["global_read_bytes"] == m * 16 * 2 + b.nbytes + m * n * itemsize
    assert counters["global_write_bytes"] == m * n * np.dtype(of_d).itemsize


def test_layouts_of_memory(library):
    x = aligned(np.arange(256, dtype=np.float32).reshape(16, 16), 0)[0]
    y = aligned(np.zeros((16, 16), np.float32), 0)[0]
    assert library.call("transpose", x, y) == 0
    np.testing.assert_array_equal(y, x.T)


def test_accumulators_of_both_types_hold_the_same_elements(library):
    x = aligned(np.arange(256, dtype=np.float32).reshape(16, 16), 0)[0]
    y = aligned(np.zeros((16, 16), np.float16), 0)[0]
    assert library.call("narrow", x, y) == 0
    np.testing.assert_array_equal(y.astype(np.float32), x)


# ---- Misuse and what is not modelled

KERNEL = """
.version 8.0
.target sm_90a
.address_size 64
.visible .entry k(.param .u64 x)
{{
  .reg .pred %p<4>; .reg .b32 %r<32>; .reg .f32 %f<16>; .reg .f64 %fd<4>; .reg .b64 %rd<8>;
  .shared .align 32 .b8 s[1024];
  ld.param.u64 %rd1, [x];
  mov.u32 %r31, %laneid;
  mov.u32 %r30, 16;
  {}
  ret;
}}
"""
LOAD = "wmma.load.a.sync.aligned.row.m16n16k16.global.f16 {%r0, %r1, %r2, %r3, %r4, %r5, %r6, %r7}, [%rd1], %r30;"

STORE = "wmma.store.d.sync.aligned.row.m16n16k16.shared.f16 [%rd1], {%r0, %r1, %r2, %r3}, %r30;"


def kind(body: str, size: int = 512) -> str:
    x = np.zeros(size + 32, np.uint8)
    start = -x.ctypes.data % 32
    with pytest.raises(hoppersim.Fault) as caught:
        hoppersim.Module(KERNEL.format(body)).launch("k", 1, 32, (x[start : start + size],))
    return caught.value.kind


@pytest.mark.parametrize(
    "body, size, expected",
    [
        (LOAD, 511, "out-of-bounds global"),
        ("mov.u32 %r30, 17;\n" + LOAD, 1024, "misaligned"),
        ("mov.u32 %r30, 24;\n" + LOAD, 512, "out-of-bounds global"),
        ("mad.lo.u32 %r30, %r31, 8, 16;\n" + LOAD, 65536, "operands differ between lanes"),
        ("mul.wide.u32 %rd2, %r31, 32;\nadd.u64 %rd1, %rd1, %rd2;\n" + LOAD, 65536, "operands differ between lanes"),
        ("setp.lt.u32 %p1, %r31, 16;\n@%p1 " + LOAD, 512, "divergent aligned instruction"),
        (LOAD.replace("global", "shared").replace("%rd1", "s"), 512, "uninitialised shared memory"),
        (STORE.replace("%rd1", "s+768"), 512, "out-of-bounds shared"),
        ("mov.u32 %r30, 17;\n" + STORE.replace("%rd1", "s"), 512, "misaligned"),
    ],
)
def test_misuse(body, size, expected):
    assert kind(body, size) == expected


def test_without_a_stride_lines_follow_each_other():
    x = aligned(np.arange(256, dtype=np.float32).reshape(16, 16), 0)[0]
    registers = "{%f0, %f1, %f2, %f3, %f4, %f5, %f6, %f7}"
    body = (
        f"wmma.load.c.sync.aligned.row.m16n16k16.f32 {registers}, [%rd1];\n"
        f"wmma.store.d.sync.aligned.col.m16n16k16.f32 [%rd1], {registers};\n"
    )
    expected = x.T.copy()
    hoppersim.Module(KERNEL.format(body)).launch("k", 1, 32, (x,))
    np.testing.assert_array_equal(x, expected)


@pytest.mark.parametrize(
    "text",
    [
        "wmma.load.a.sync.aligned.row.m16n16k16.global.s8 {%r0, %r1}, [%rd1], %r30;",
        "wmma.load.a.sync.aligned.row.m16n16k8.global.tf32 {%r0, %r1, %r2, %r3}, [%rd1], %r30;",
        "wmma.load.a.sync.aligned.row.m8n8k4.global.f64 {%fd0}, [%rd1], %r30;",
        "wmma.load.a.sync.aligned.row.m8n8k128.global.b1 {%r0}, [%rd1], %r30;",
        "wmma.load.a.sync.aligned.row.m16n16k16.global.f16 {%r0, %r1, %r2, %r3}, [%rd1], %r30;",
        "wmma.load.c.sync.aligned.row.m16n16k16.global.s32 {%r0, %r1, %r2, %r3, %r4, %r5, %r6, %r7}, [%rd1], %r30;",
        (
            "wmma.mma.sync.aligned.row.col.m16n16k16.f16.f16.satfinite {%r0, %r1, %r2, %r3}, "
            "{%r0, %r1, %r2, %r3, %r4, %r5, %r6, %r7}, {%r0, %r1, %r2, %r3, %r4, %r5, %r6, %r7}, {%r0, %r1, %r2, %r3};"
        ),
    ],
)
def test_unsupported(text):
    found = refusal(KERNEL.format(text))
    assert found.kind == "unsupported instruction" and text.split()[0] in str(found)
