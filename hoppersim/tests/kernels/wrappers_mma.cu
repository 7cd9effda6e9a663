// CUTLASS's tensor-core wrappers that are more than one asm statement, and a few of each kind of wgmma as nvcc compiles
// them. (test_cutlass_mma.py and test_cutlass_gmma.py run the asm of all the others.)
#include <cutlass/arch/barrier.h>
#include <cute/arch/mma_sm80.hpp>
#include <cute/arch/mma_sm90.hpp>
#include <cute/arch/mma_sm90_gmma.hpp>
#include <cute/arch/mma_sm90_gmma_sparse.hpp>

#include <type_traits>
#include <utility>

using namespace cute;
using Complex = cute::complex<double>;

// ---- Complex products: registers of a lane one after another in memory
template <class Array>
constexpr size_t count = std::extent_v<Array>;
template <class Array>
using Indices = std::make_index_sequence<count<Array>>;

template <class Op, class D, size_t... d, size_t... a, size_t... b>
__device__ void multiply(D* out, const Complex* x, const Complex* y, const D* z, std::index_sequence<d...>,
                         std::index_sequence<a...>, std::index_sequence<b...>) {
  Op::fma(out[d]..., x[a]..., y[b]..., z[d]...);
}

template <class Op>
__global__ void complex_product(const Complex* a, const Complex* b, const Complex* c, Complex* out) {
  using D = std::remove_extent_t<typename Op::DRegisters>;
  constexpr size_t nd = count<typename Op::DRegisters>, na = count<typename Op::ARegisters>,
                   nb = count<typename Op::BRegisters>;
  const int lane = threadIdx.x;
  Complex x[na], y[nb];
  D z[nd], d[nd];
  for (size_t i = 0; i < na; ++i) x[i] = a[lane * na + i];
  for (size_t i = 0; i < nb; ++i) y[i] = b[lane * nb + i];
  for (size_t i = 0; i < nd; ++i) {
    const Complex value = c[lane * nd + i];
    if constexpr (std::is_same_v<D, Complex>)
      z[i] = value;
    else
      z[i] = D{value.real(), 0, value.real() + value.imag()};  // t0 - t1, t2 - t0 - t1
  }
  multiply<Op>(d, x, y, z, Indices<typename Op::DRegisters>(), Indices<typename Op::ARegisters>(),
               Indices<typename Op::BRegisters>());
  for (size_t i = 0; i < nd; ++i) out[lane * nd + i] = static_cast<Complex>(d[i]);
}

// ---- wgmma: one instruction, 128 threads
template <class Op, bool sparse, size_t... d, size_t... a, class C, class A>
__device__ void call(C* c, const A* x, uint64_t desc_b, uint32_t metadata, std::index_sequence<d...>,
                     std::index_sequence<a...>) {
  using namespace SM90::GMMA;
  if constexpr (sparse)
    Op::fma(x[a]..., desc_b, c[d]..., metadata, ScaleOut::One);
  else
    Op::fma(x[a]..., desc_b, c[d]..., ScaleOut::One);
}

// `fragments`: the words of A (where A is in registers) and of the metadata, of each thread.
template <class Op, bool sparse>
__global__ void __launch_bounds__(128) wgmma_product(const uint4* image, int bytes, uint64_t desc_a, uint64_t desc_b,
                                                     uint32_t* accumulators, const uint32_t* fragments) {
  extern __shared__ __align__(1024) uint4 tiles[];
  using C = std::remove_extent_t<typename Op::CRegisters>;
  using A = std::remove_extent_t<typename Op::ARegisters>;
  constexpr size_t nc = count<typename Op::CRegisters>, na = count<typename Op::ARegisters>;
  constexpr bool in_registers = std::is_same_v<A, uint32_t>;
  constexpr int words = (in_registers ? na : 0) + sparse;
  for (int n = threadIdx.x; n < bytes / 16; n += 128) tiles[n] = image[n];
  cutlass::arch::fence_view_async_shared();
  __syncthreads();
  const uint64_t base = cast_smem_ptr_to_uint(tiles) >> 4;
  C c[nc];
  A a[na];
  for (size_t i = 0; i < nc; ++i) memcpy(&c[i], &accumulators[threadIdx.x * nc + i], 4);
  if constexpr (in_registers) {
    for (size_t i = 0; i < na; ++i) a[i] = fragments[threadIdx.x * words + i];
  } else {
    a[0] = desc_a + base;
  }
  const uint32_t metadata = sparse ? fragments[threadIdx.x * words + words - 1] : 0;
  for (C& value : c) warpgroup_fence_operand(value);
  warpgroup_arrive();
  call<Op, sparse>(c, a, desc_b + base, metadata, std::make_index_sequence<nc>(), std::make_index_sequence<na>());
  warpgroup_commit_batch();
  warpgroup_wait<0>();
  for (C& value : c) warpgroup_fence_operand(value);
  for (size_t i = 0; i < nc; ++i) memcpy(&accumulators[threadIdx.x * nc + i], &c[i], 4);
}

template <class Op>
static int run_complex(const Complex* a, const Complex* b, const Complex* c, Complex* out) {
  complex_product<Op><<<1, 32>>>(a, b, c, out);
  return cudaGetLastError();
}

template <class Op, bool sparse>
static int run_wgmma(const uint4* image, int64_t bytes, uint64_t desc_a, uint64_t desc_b, uint32_t* accumulators,
                     const uint32_t* fragments) {
  wgmma_product<Op, sparse><<<1, 128, bytes>>>(image, static_cast<int>(bytes), desc_a, desc_b, accumulators, fragments);
  return cudaGetLastError();
}

extern "C" int run_complex_product(int64_t which, const Complex* a, const Complex* b, const Complex* c, Complex* out) {
  int (*const products[])(const Complex*, const Complex*, const Complex*, Complex*) = {
      run_complex<SM80_8x8x4_C64C64C64C64_TN>, run_complex<SM80_8x8x4_GC64C64C64GC64_TN>,
      run_complex<SM90::MMA_16x8x4_C64C64C64C64_TN>, run_complex<SM90::MMA_16x8x8_C64C64C64C64_TN>,
      run_complex<SM90::MMA_16x8x16_C64C64C64C64_TN>};
  return products[which](a, b, c, out);
}

extern "C" int run_wgmma_product(int64_t which, const uint4* image, int64_t bytes, uint64_t desc_a, uint64_t desc_b,
                                 uint32_t* accumulators, const uint32_t* fragments) {
  namespace dense = SM90::GMMA;
  namespace sparse = SM90::GMMA::SPARSE;
  constexpr auto K = dense::Major::K;
  int (*const products[])(const uint4*, int64_t, uint64_t, uint64_t, uint32_t*, const uint32_t*) = {
      run_wgmma<dense::MMA_64x32x32_F32E4M3E5M2_SS_TN<>, false>,
      run_wgmma<dense::MMA_64x32x32_S32U8S8_RS_TN_SATURATE, false>,
      run_wgmma<sparse::GMMA_64x32x64_F32E5M2E4M3_SS_TN<>, true>,
      run_wgmma<sparse::GMMA_64x32x32_F32BF16BF16_RS<K, K>, true>};
  return products[which](image, bytes, desc_a, desc_b, accumulators, fragments);
}
