// `prepare`: all that sweep needs of a chunk and does not depend on the state, the intra-chunk part. In the names of
// flash-linear-attention: chunk_local_cumsum, chunk_scaled_dot_kkt, solve_tril. docs/chunk_gated_delta_rule.md has the
// data sheet.
//
// A CTA of one warpgroup has one chunk of one key head, and walks over the value heads that read it:
//   K K^T, Q K^T                             wgmma, once per key head, of the rows as they are in memory
//   |k_i|^2 = (K K^T)_ii, |q_i|^2            while the products run
//   c = cumulative sum of g                  split in two fp32
//   A = tril(K K^T ∘ Γ_ij beta_j, -1)        = kk diag(beta), with l2norm over |k_i| |k_j|
//   T' = (I + A)^-1                          inverse.cuh
//   P' = tril(Q K^T / |q_i| ∘ Γ_ij beta_j)   with l2norm over |k_j|; for the backward P'' (image.h)
// Row i of a product depends on no other row of its left operand: rows behind the sequence's end are selected away, not
// cleared.
#pragma once

#include <type_traits>

#include "csrc/gated_delta_rule/chunk/inverse.cuh"
#include "csrc/gated_delta_rule/chunk/plan.cuh"
#include "csrc/hopper/device.h"
#include "csrc/hopper/launch.h"
#include "csrc/hopper/tensor_map.h"
#include "csrc/hopper/tma.h"
#include "csrc/hopper/warp_specialization.h"
#include "csrc/hopper/wgmma.h"

namespace jet::hopper {

struct PrepareArguments {
  ChunkPlan plan;
  Dtype dtype;
  int64_t H, Hk;
  float scale;
  bool l2norm;
  const float *g, *beta;
  TokenStrides g_strides, beta_strides;
  char* images;  // [chunks, H] of PrepareConfig::image_bytes
};

// (K, Hk, T, B), boxes of 64 tokens and a panel of SweepConfig<K>::Rows
struct PrepareMaps {
  CUtensorMap q, k;
};

template <int K_, class Element_, bool backward_>
struct PrepareConfig {
  static constexpr int K = K_;
  using Element = Element_;
  static constexpr bool backward = backward_;  // the image is the backward's
  static constexpr int image_bytes = backward ? kBackwardImageBytes : kImageBytes;
  using Products = std::conditional_t<backward, Element, f16>;  // of P'
  // Per multiprocessor, to hide each other's latencies: what fits, for the backward of registers.
  static constexpr int ctas = K <= 192 && !backward ? 4 : 3;
  static constexpr Swizzle swizzle = K % 64 == 0 ? Swizzle::b128 : Swizzle::b64;  // 96 is three panels of 32 elements
  using Rows = OperandTile<Element, swizzle, Major::k, C, K>;
  using RowsOperand = MatrixDescriptor<Rows>;
  using Mma = Wgmma<Element, C>;
  using Accumulator = typename Mma::Accumulator;
};

// c in base 2 as a sum of two fp32: a multiple of 2^-10 below 2^14, and the rest. Differences are then exact where they
// matter.
struct SplitSum {
  float coarse, fine;
  __device__ SplitSum operator+(const SplitSum& other) const { return {coarse + other.coarse, fine + other.fine}; }
};
__device__ inline SplitSum shuffled_up(const SplitSum& c, int distance) {
  return {__shfl_up_sync(0xffffffffu, c.coarse, distance), __shfl_up_sync(0xffffffffu, c.fine, distance)};
}

// 2^x; what is below 2^-126 becomes zero.
__device__ inline float exp2_approximately(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
__device__ inline float decay_between(const SplitSum& to, const SplitSum& from) {
  return exp2_approximately((to.coarse - from.coarse) + (to.fine - from.fine));
}

// g in base 2: the nearest multiple of 2^-10, by an addition that leaves no bits below it, and what is left of g
// log2(e) to 2^-36.
__device__ inline SplitSum split_gate(float g) {
  constexpr float log2_e = 1.44269504f, log2_e_rest = 1.9259630e-8f, round = 3 << 12;
  g = g < float(kMinLogDecay) ? float(kMinLogDecay) : g;  // keeps NaN, which fmaxf would drop
  const float product = __fmul_rn(g, log2_e), coarse = __fadd_rn(__fadd_rn(product, round), -round);
  return {coarse, (product - coarse) + (fmaf(g, log2_e, -product) + g * log2_e_rest)};
}

template <class Config>
struct PrepareShared {
  union {
    struct {
      alignas(kTileAlign) char k[Config::Rows::bytes];
      char q[Config::Rows::bytes];
    } rows;  // until the products are there
    struct {
      InverseShared inverse;
      alignas(128) char image[Config::image_bytes];
    };
  };
  SplitSum c[C];
  float beta[C];
  float norm[2][C];          // of a row of q, k, as a factor: 1 with l2norm
  float inverse_norm[2][C];  // of the row in memory
  float key_factor[C];       // of a row of k in memory: 1 or with l2norm its inverse norm
  float key_squares[C];
  Mbarrier loaded;  // rows
  __device__ float* vector(int v) { return reinterpret_cast<float*>(image + kVectorsAt + v * kVectorBytes); }
};
enum { kQuery, kKey };  // of norms

// Where the chunk's tokens are.
struct PreparePlace {
  int64_t chunk, row, token;  // token: the first
  int count, hk;
};

// g and beta of a value head, two tokens per lane of one warp.
struct Gates {
  float g[2], beta[2];
};
__device__ inline Gates load_gates(const PrepareArguments& p, const PreparePlace& at, int64_t h, int thread) {
  Gates gates = {};
  const int i = 2 * (thread % 32);
  const float* g = p.g + at.row * p.g_strides.b + (at.token + i) * p.g_strides.t + h * p.g_strides.h;
  const float* beta = p.beta + at.row * p.beta_strides.b + (at.token + i) * p.beta_strides.t + h * p.beta_strides.h;
#pragma unroll
  for (int e = 0; e < 2; ++e)
    if (i + e < at.count) gates.g[e] = g[e * p.g_strides.t], gates.beta[e] = beta[e * p.beta_strides.t];
  return gates;
}

// c and beta into shared memory.
__device__ inline void sum_gates(const Gates& gates, SplitSum* c, float* beta) {
  const int lane = threadIdx.x % 32;
  const SplitSum first = split_gate(gates.g[0]), second = split_gate(gates.g[1]);
  SplitSum sum = first + second;
#pragma unroll
  for (int distance = 1; distance < 32; distance *= 2) {
    const SplitSum other = shuffled_up(sum, distance);
    if (lane >= distance) sum = sum + other;
  }
  SplitSum before = shuffled_up(sum, 1);
  if (lane == 0) before = {0, 0};
  const SplitSum at = before + first;
  st_shared_v4(&c[2 * lane].coarse, at.coarse, at.fine, sum.coarse, sum.fine);
  *reinterpret_cast<float2*>(beta + 2 * lane) = make_float2(gates.beta[0], gates.beta[1]);
}

// |q_i|^2 of row i = threadIdx.x / 2, in both of its threads.
template <class Config>
__device__ float query_squares(const char* q) {
  constexpr int kUnit = 8, half = Config::Rows::panel_width / kUnit / 2,
                units = Config::K / kUnit / 2;  // a thread's units of 16 bytes
  const int row = threadIdx.x / 2,
            first = threadIdx.x % 2 * half;  // half a panel, then half of the next: no bank conflicts
  float squares = 0;
#pragma unroll
  for (int u = 0; u < units; ++u) {
    const uint4 raw = *reinterpret_cast<const uint4*>(
        q + Config::Rows::offset(row, (u / half * 2 * half + first + u % half) * kUnit));
    const uint32_t words[4] = {raw.x, raw.y, raw.z, raw.w};
#pragma unroll
    for (int w = 0; w < 4; ++w) {
      const float2 x = unpack<typename Config::Element>(words[w]);
      squares += x.x * x.x, squares += x.y * x.y;
    }
  }
  return squares + __shfl_xor_sync(0xffffffffu, squares, 1);
}

// The diagonal of K K^T, 16 rows of each warp.
template <class Accumulator>
__device__ void put_key_squares(float* squares, const Accumulator& kk) {
  const int thread = threadIdx.x, i = accumulator_row(thread, 0);
  if (i % 8 / 2 != thread % 4) return;  // the four threads of a row have two columns of eight each
#pragma unroll
  for (int block = 0; block < kBlocks; ++block)
    if (block == thread / 32) {
      squares[i] = i % 2 ? kk[8 * block + 1] : kk[8 * block];
      squares[i + 8] = i % 2 ? kk[8 * block + 7] : kk[8 * block + 6];
    }
}

// K K^T and Q K^T of the rows in shared memory, and the norms.
template <class Config>
__device__ void multiply_rows(const PrepareArguments& p, const PreparePlace& at, PrepareShared<Config>& shared,
                              typename Config::Accumulator& kk, typename Config::Accumulator& qk) {
  using Mma = typename Config::Mma;
  const typename Config::RowsOperand k(shared.rows.k), q(shared.rows.q);
  wgmma_fence();
#pragma unroll
  for (int s = 0; s < Config::K / Mma::K; ++s)
    Mma::ss(kk, k.at(0, s * Mma::K), k.at(0, s * Mma::K), s > 0);  // K Kᵀ   [C, C]
#pragma unroll
  for (int s = 0; s < Config::K / Mma::K; ++s)
    Mma::ss(qk, q.at(0, s * Mma::K), k.at(0, s * Mma::K), s > 0);  // Q Kᵀ   [C, C]
  wgmma_commit_group();
  float squares = query_squares<Config>(shared.rows.q);
  wgmma_wait_group<0>();
  wgmma_fence_operand(kk), wgmma_fence_operand(qk);
  put_key_squares(shared.key_squares, kk);
  __syncwarp();
  const int row = threadIdx.x / 2, of = threadIdx.x % 2;  // a thread per row of q and of k
  if (of == kKey) squares = shared.key_squares[row];
  if (row >= at.count) squares = 0;
  if (p.l2norm) squares += float(kL2NormEps);
  const float inverse = squares == 0 ? 0 : rsqrtf(squares);  // a zero row without l2norm
  shared.inverse_norm[of][row] = inverse;
  shared.norm[of][row] = p.l2norm ? 1 : inverse == 0 ? squares : squares * inverse;
  if (of == kKey) shared.key_factor[row] = p.l2norm ? inverse : 1;
}

// What apply_gates knows of a thread's two rows.
struct GatedRows {
  SplitSum c[2];
  float of_a[2], of_p[2];  // factors
  bool inside[2];          // the sequence
  int at[2];               // in a block, of the first row and the columns of each half
};
static_assert(in_block(8, 0) == 8 * SquareTile::row_bytes, "the second row lies as the first");

// Block `block` of the warp's row of blocks: of P' to the image, of A to shared memory.
template <bool diagonal, int block, class Config>
__device__ void apply_to_block(PrepareShared<Config>& shared, const GatedRows& rows, int thread,
                               const typename Config::Accumulator& kk, const typename Config::Accumulator& qk) {
  compiler_fence();  // loads of later blocks would fill the registers
  const int block_row = thread / 32, lane = thread % 32;
  char* const p_block = shared.image + kTriangleBytes + image_offset(block_row * kBlock, block * kBlock);
  char* const a_block = shared.inverse.blocks + SquareTile::offset(block_row * kBlock, block * kBlock);
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int j = accumulator_column(lane, 4 * half), at = block * kBlock + j;
    const float4 c = *reinterpret_cast<const float4*>(&shared.c[at]);
    const float2 beta = *reinterpret_cast<const float2*>(&shared.beta[at]),
                 key = *reinterpret_cast<const float2*>(&shared.key_factor[at]);
    const SplitSum c_of[2] = {{c.x, c.y}, {c.z, c.w}};
    const float of_column[2] = {key.x * beta.x, key.y * beta.y};
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const int i = accumulator_row(lane, 2 * e), r = 8 * block + 4 * half + 2 * e,
                to = rows.at[half] + 8 * e * SquareTile::row_bytes;
      float a[2], pp[2];
#pragma unroll
      for (int f = 0; f < 2; ++f) {
        const float factor = decay_between(rows.c[e], c_of[f]) * of_column[f];
        a[f] = kk[r + f] * rows.of_a[e] * factor, pp[f] = qk[r + f] * rows.of_p[e] * factor;
        // Above the diagonal the decay may be infinite: selected away, never multiplied by zero.
        if (diagonal && (j + f >= i || !rows.inside[e])) a[f] = 0;
        if (diagonal && j + f > i) pp[f] = 0;
      }
      *reinterpret_cast<uint32_t*>(p_block + to) = rows.inside[e] ? pack<typename Config::Products>(pp[0], pp[1]) : 0;
      if (diagonal)
        shared.inverse.put_diagonal(block_row, i, j, a[0], a[1]);
      else
        *reinterpret_cast<uint32_t*>(a_block + to) = rows.inside[e] ? pack<f16>(a[0], a[1]) : 0;
    }
  }
}

// A and P' from the products of the rows in memory.
template <class Config, int block = 0>
__device__ void apply_gates(PrepareShared<Config>& shared, const GatedRows& rows, int thread,
                            const typename Config::Accumulator& kk, const typename Config::Accumulator& qk) {
  if (thread / 32 == block) return apply_to_block<true, block>(shared, rows, thread, kk, qk);
  if constexpr (block + 1 < kBlocks) {
    apply_to_block<false, block>(shared, rows, thread, kk, qk);
    apply_gates<Config, block + 1>(shared, rows, thread, kk, qk);
  }
}

template <class Config>
__device__ GatedRows gated_rows(const PrepareArguments& p, const PrepareShared<Config>& shared, int count, int thread) {
  GatedRows rows;
#pragma unroll
  for (int e = 0; e < 2; ++e) {
    const int i = accumulator_row(thread, 2 * e);
    rows.at[e] = in_block(accumulator_row(thread % 32, 0), accumulator_column(thread, 4 * e));
    rows.c[e] = shared.c[i], rows.of_a[e] = shared.key_factor[i], rows.of_p[e] = shared.inverse_norm[kQuery][i],
    rows.inside[e] = i < count;
    if constexpr (Config::backward) rows.of_p[e] = p.scale * (p.l2norm ? rows.of_p[e] : 1);
  }
  return rows;
}

template <class Config>
__device__ void write_vectors(const PrepareArguments& p, PrepareShared<Config>& shared, int j) {
  const SplitSum zero{0, 0};
  const float k = shared.norm[kKey][j], read = decay_between(shared.c[j], zero);
  shared.vector(kReadK)[j] = read * k;
  shared.vector(kWrite)[j] = shared.beta[j] * decay_between(shared.c[C - 1], shared.c[j]) * k;
  shared.vector(kReadQ)[j] = read;
  shared.vector(kOutput)[j] = p.scale * shared.norm[kQuery][j];
  shared.vector(kInverseK)[j] = shared.inverse_norm[kKey][j];
  shared.vector(kInverseQ)[j] = shared.inverse_norm[kQuery][j];
  if constexpr (Config::backward) {
    float* const gates = reinterpret_cast<float*>(shared.image + kGatesAt);
    gates[kSumCoarse * C + j] = shared.c[j].coarse, gates[kSumFine * C + j] = shared.c[j].fine;
    gates[kBeta * C + j] = shared.beta[j];
  }
}

constexpr int kGateWarp = kBlocks - 1;  // it has nothing to do in invert_column

// Value head h, whose c and beta are in shared memory; leaves those of the next one there.
template <class Config>
__device__ void prepare_head(const PrepareArguments& p, const PreparePlace& at, PrepareShared<Config>& shared,
                             int64_t h, bool last, const typename Config::Accumulator& kk,
                             const typename Config::Accumulator& qk) {
  unsigned any = threadIdx.x;
  asm volatile(""
               : "+r"(any));  // what follows from it is computed for each head anew: kept, it would fill the registers
  const int thread = static_cast<int>(any % kWarpgroup), warp = warp_index();
  Gates next = {};
  if (warp == kGateWarp && !last) next = load_gates(p, at, h + 1, thread);
  apply_gates<Config>(shared, gated_rows(p, shared, at.count, thread), thread, kk, qk);
  __syncthreads();
  if (warp < kBlocks / 2)
    invert_diagonal(shared.inverse, shared.image, thread);
  else
    write_vectors<Config>(p, shared, thread - C);
  __syncthreads();
  invert_column(shared.inverse, shared.image, thread);
  if (warp == kGateWarp && !last) sum_gates(next, shared.c, shared.beta);
  fence_proxy_async();
  __syncthreads();
  if (thread == 0) {
    cp_async_bulk_store(p.images + (at.chunk * p.H + h) * Config::image_bytes, shared.image, Config::image_bytes);
    cp_async_bulk_commit_group();
    cp_async_bulk_wait_group_read<0>();
  }
  if (!last) __syncthreads();  // the image is free
}

template <class Config>
__device__ void load_chunk_rows(const PrepareMaps& maps, const PreparePlace& at, PrepareShared<Config>& shared) {
  shared.loaded.arrive_expect_tx(2 * Config::Rows::bytes);
  for (int panel = 0; panel < Config::Rows::panels; ++panel) {
    const int column = panel * Config::Rows::panel_width, to = panel * Config::Rows::panel_bytes;
    tma_load(shared.rows.k + to, maps.k, shared.loaded, CacheHint::evict_normal, column, at.hk,
             static_cast<int>(at.token), static_cast<int>(at.row));
    tma_load(shared.rows.q + to, maps.q, shared.loaded, CacheHint::evict_normal, column, at.hk,
             static_cast<int>(at.token), static_cast<int>(at.row));
  }
}

template <class Config>
__global__ void __launch_bounds__(kWarpgroup, Config::ctas)
    chunk_prepare_kernel(const __grid_constant__ PrepareArguments p, const __grid_constant__ PrepareMaps maps) {
  extern __shared__ __align__(kTileAlign) char memory[];
  auto& shared = *reinterpret_cast<PrepareShared<Config>*>(memory);
  griddepcontrol_launch_dependents();
  if (threadIdx.x == 0) {
    prefetch_tensormap(maps.q), prefetch_tensormap(maps.k);
    shared.loaded.init(1);
    fence_mbarrier_init();
  }
  __syncthreads();
  griddepcontrol_wait();
  const uint32_t key_heads = static_cast<uint32_t>(p.Hk), chunk = blockIdx.x / key_heads;
  const int64_t n = sequence_of_chunk(p.plan, chunk);
  if (n < 0) return;
  const Sequence sequence = sequence_of(p.plan, n);
  const int64_t first = (chunk - sequence.first_chunk) * C;
  const PreparePlace at{.chunk = chunk,
                        .row = sequence.row,
                        .token = sequence.begin + first,
                        .count = static_cast<int>(min(sequence.length - first, int64_t{C})),
                        .hk = static_cast<int>(blockIdx.x % key_heads)};
  if (threadIdx.x == 0) load_chunk_rows<Config>(maps, at, shared);
  const int heads = static_cast<int>(p.H) / static_cast<int>(p.Hk);
  const int64_t h = int64_t{at.hk} * heads;
  if (warp_index() == kGateWarp) sum_gates(load_gates(p, at, h, threadIdx.x), shared.c, shared.beta);
  typename Config::Accumulator kk, qk;
  shared.loaded.wait(PhaseParity::first());
  multiply_rows<Config>(p, at, shared, kk, qk);
  __syncthreads();  // norms and gates are there, the rows have been read
#pragma unroll 1
  for (int i = 0; i < heads; ++i) prepare_head<Config>(p, at, shared, h + i, i == heads - 1, kk, qk);
}

template <int K, bool backward = false>
void launch_prepare(const PrepareArguments& p, const PrepareMaps& maps, cudaStream_t stream) {
  const int64_t ctas = p.plan.most_chunks * p.Hk;
  require(ctas < (int64_t{1} << 31), kChunkOp, "chunks * Hk", "below 2^31", ctas);
  const auto launch_kernel = [&](auto element) {
    using Config = PrepareConfig<K, typename decltype(element)::type, backward>;
    static_assert(ctas_fit(sizeof(PrepareShared<Config>), Config::ctas));
    launch(kChunkOp,
           {.grid = dim3(static_cast<unsigned>(ctas)),
            .threads = kWarpgroup,
            .shared_bytes = static_cast<int>(sizeof(PrepareShared<Config>)),
            .programmatic = true},
           stream, chunk_prepare_kernel<Config>, p, maps);
  };
  if (p.dtype == Dtype::bf16) return launch_kernel(std::type_identity<bf16>());
  launch_kernel(std::type_identity<f16>());
}

}  // namespace jet::hopper
