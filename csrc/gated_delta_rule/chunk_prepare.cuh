// `prepare`: all that sweep needs of a chunk and does not depend on the state. docs/chunk_gated_delta_rule.md has the data sheet.
//
// A CTA of one warpgroup has one chunk of one key head, and walks over the value heads that read it:
//   Kn, Qn = rows of K, Q over their norms                    fp16 in shared memory, zero behind the sequence's end
//   Kn Kn^T, Qn Kn^T                                           wgmma, once per key head
//   c = cumulative sum of g                                    fp64, then split in two fp32
//   A = tril(Kn Kn^T ∘ |k_i| |k_j| Γ_ij beta_j, -1)            = kk diag(beta)
//   T' = (I + A)^-1                                            chunk_inverse.cuh
//   P' = tril(Qn Kn^T ∘ |k_j| Γ_ij beta_j)
#pragma once

#include "csrc/gated_delta_rule/chunk_inverse.cuh"
#include "csrc/gated_delta_rule/chunk_plan.cuh"
#include "csrc/hopper/cluster.h"
#include "csrc/hopper/launch.h"
#include "csrc/hopper/tensor_map.h"
#include "csrc/hopper/wgmma.h"

namespace jet::hopper {

struct PrepareArguments {
  ChunkPlan plan;
  Dtype dtype;
  int64_t H, Hk;
  float scale;
  bool l2norm;
  const void *q, *k;
  const float *g, *beta;
  TokenStrides q_strides, k_strides, g_strides, beta_strides;
  char* images;  // [chunks, H] of kImageBytes
};

template <int K_>
struct PrepareConfig {
  static constexpr int K = K_;
  static constexpr Swizzle swizzle = K % 64 == 0 ? Swizzle::b128 : Swizzle::b64;  // 96 is three panels of 32 elements
  using Rows = OperandTile<f16, swizzle, Major::k, C, K>;
  using RowsOperand = Operand<f16, swizzle, Major::k, C, K>;
  using Mma = Wgmma<f16, C>;
};

// c in base 2 as a sum of two fp32: a multiple of 2^-10 below 2^14, and the rest. Differences are then exact where they matter.
struct SplitSum {
  float coarse, fine;
};
__device__ inline float decay_between(const SplitSum& to, const SplitSum& from) {
  return exp2f((to.coarse - from.coarse) + (to.fine - from.fine));
}

template <class Config>
struct PrepareShared {
  alignas(kTileAlign) char k[Config::Rows::bytes];
  alignas(kTileAlign) char q[Config::Rows::bytes];
  InverseShared inverse;
  alignas(128) char image[kImageBytes];
  SplitSum c[C];
  float beta[C];
  float norm[2][C];  // |k|, |q| as factors; 1 with l2norm
  __device__ float* vector(int v) { return reinterpret_cast<float*>(image + kVectorsAt + v * kVectorBytes); }
};
static_assert(sizeof(PrepareShared<PrepareConfig<256>>) <= 227 * 1024 / 2 && sizeof(PrepareShared<PrepareConfig<128>>) <= 227 * 1024 / 3,
              "two or three CTAs per multiprocessor");

// Where the chunk's tokens are.
struct PreparePlace {
  int64_t chunk, row, token;  // token: the first
  int count, hk;
};

// Rows of q or k into shared memory as fp16 of norm 1; a quarter warp per row. `inverse`: 1 / norm.
template <class Config>
__device__ void load_rows(const PrepareArguments& p, const PreparePlace& at, const void* data, const TokenStrides& strides, char* tile,
                          float* norm, float* inverse) {
  constexpr int kUnit = 8, units = Config::K / kUnit / 4;  // 16-byte units of a thread
  constexpr bool even = units % 2 == 0;  // then odd rows begin in the other half of a 128-byte line: fewer bank conflicts
  const int lane = threadIdx.x % 4;
#pragma unroll 1
  for (int i = threadIdx.x / 4; i < C; i += kWarpgroup / 4) {
    uint4 raw[units] = {};
    if (i < at.count) {
      const uint16_t* from = static_cast<const uint16_t*>(data) + at.row * strides.b + (at.token + i) * strides.t + at.hk * strides.h;
#pragma unroll
      for (int u = 0; u < units; ++u) raw[u] = __ldg(reinterpret_cast<const uint4*>(from) + lane + 4 * (u ^ (even ? i & 1 : 0)));
    }
    float squares = 0;
    float2 x[units][4];
#pragma unroll
    for (int u = 0; u < units; ++u) {
      const uint32_t words[4] = {raw[u].x, raw[u].y, raw[u].z, raw[u].w};
#pragma unroll
      for (int w = 0; w < 4; ++w) {
        x[u][w] = p.dtype == Dtype::bf16 ? unpack<bf16>(words[w]) : unpack<f16>(words[w]);
        squares += x[u][w].x * x[u][w].x + x[u][w].y * x[u][w].y;
      }
    }
    squares += __shfl_xor_sync(0xffffffffu, squares, 1);
    squares += __shfl_xor_sync(0xffffffffu, squares, 2);
    const float length = sqrtf(p.l2norm ? squares + float(kL2NormEps) : squares);
    const float factor = length == 0 ? 0 : 1 / length;  // a zero row without l2norm
    if (lane == 0) norm[i] = p.l2norm ? 1 : length, inverse[i] = factor;
#pragma unroll
    for (int u = 0; u < units; ++u) {
      uint32_t words[4];
#pragma unroll
      for (int w = 0; w < 4; ++w) words[w] = pack<f16>(x[u][w].x * factor, x[u][w].y * factor);
      *reinterpret_cast<uint4*>(tile + Config::Rows::offset(i, (lane + 4 * (u ^ (even ? i & 1 : 0))) * kUnit)) =
           make_uint4(words[0], words[1], words[2], words[3]);
    }
  }
}

// c and beta of a value head into shared memory; one warp, two tokens per lane.
__device__ inline void load_gates(const PrepareArguments& p, const PreparePlace& at, int64_t h, SplitSum* c, float* beta) {
  const int lane = threadIdx.x % 32;
  double sum[2];
#pragma unroll
  for (int e = 0; e < 2; ++e) {
    const int i = 2 * lane + e;
    float g = 0, b = 0;
    if (i < at.count) {
      g = p.g[at.row * p.g_strides.b + (at.token + i) * p.g_strides.t + h * p.g_strides.h];
      b = p.beta[at.row * p.beta_strides.b + (at.token + i) * p.beta_strides.t + h * p.beta_strides.h];
    }
    g = g < float(kMinLogDecay) ? float(kMinLogDecay) : g;  // keeps NaN, which fmaxf would drop
    sum[e] = (e == 0 ? 0 : sum[0]) + g * 1.4426950408889634;
    beta[i] = b;
  }
  double before = sum[1];
#pragma unroll
  for (int distance = 1; distance < 32; distance *= 2) {
    const double other = __shfl_up_sync(0xffffffffu, before, distance);
    if (lane >= distance) before += other;
  }
  before -= sum[1];
#pragma unroll
  for (int e = 0; e < 2; ++e) {
    const double c2 = before + sum[e];
    const float coarse = rintf(static_cast<float>(c2) * 1024) / 1024;
    c[2 * lane + e] = {coarse, static_cast<float>(c2 - coarse)};
  }
}

template <class Config>
__device__ void write_vectors(const PrepareArguments& p, PrepareShared<Config>& shared) {
  const int j = threadIdx.x;
  if (j >= C) return;
  const SplitSum zero{0, 0};
  const float k = shared.norm[0][j], read = decay_between(shared.c[j], zero);
  shared.vector(kReadK)[j] = read * k;
  shared.vector(kWrite)[j] = shared.beta[j] * decay_between(shared.c[C - 1], shared.c[j]) * k;
  shared.vector(kReadQ)[j] = read;
  shared.vector(kOutput)[j] = p.scale * shared.norm[1][j];
}

// A to shared memory and P' to the image. `kk`, `qk`: the products of the normalised rows, as accumulators.
template <class Config>
__device__ void apply_gates(PrepareShared<Config>& shared, int thread, const float (&kk)[Config::Mma::registers], const float (&qk)[Config::Mma::registers]) {
  const int block_row = thread / 32;
#pragma unroll
  for (int r = 0; r < Config::Mma::registers; r += 2) {
    const int i = accumulator_row(thread, r), j = accumulator_column(thread, r), block_column = r / 8;
    if (block_column > block_row) continue;
    float a[2], pp[2];
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const float decay = decay_between(shared.c[i], shared.c[j + e]) * shared.norm[0][j + e] * shared.beta[j + e];
      // Above the diagonal the decay may be infinite: selected away, never multiplied by zero.
      a[e] = j + e < i ? kk[r + e] * decay * shared.norm[0][i] : 0;
      pp[e] = j + e <= i ? qk[r + e] * decay : 0;
    }
    *reinterpret_cast<uint32_t*>(shared.image + kTriangleBytes + image_offset(i, j)) = pack<f16>(pp[0], pp[1]);
    if (block_column == block_row)
      shared.inverse.put_diagonal(block_row, i % kBlock, j % kBlock, a[0], a[1]);
    else
      *reinterpret_cast<uint32_t*>(shared.inverse.blocks + SquareTile::offset(i, j)) = pack<f16>(a[0], a[1]);
  }
}

template <class Config>
__device__ void prepare_head(const PrepareArguments& p, const PreparePlace& at, PrepareShared<Config>& shared, int64_t h,
                             const float (&kk)[Config::Mma::registers], const float (&qk)[Config::Mma::registers]) {
  int thread = threadIdx.x;
  asm volatile("" : "+r"(thread));  // what follows from it is computed for each head anew: kept, it would fill the registers
  if (thread == 0) wait_stores_read<0>();  // the image of the head before this one
  if (warp_index() == 0) load_gates(p, at, h, shared.c, shared.beta);
  __syncthreads();
  apply_gates<Config>(shared, thread, kk, qk);
  write_vectors<Config>(p, shared);
  __syncwarp();
  invert_diagonal(shared.inverse, shared.image, thread);
  __syncthreads();
  invert_column(shared.inverse, shared.image, thread);
  publish_writes_to_async_proxy();
  __syncthreads();
  if (threadIdx.x == 0) {
    bulk_store(p.images + (at.chunk * p.H + h) * kImageBytes, shared.image, kImageBytes);
    commit_stores();
  }
}

template <class Config>
__global__ void __launch_bounds__(kWarpgroup, 3) chunk_prepare_kernel(const __grid_constant__ PrepareArguments p) {
  using Mma = typename Config::Mma;
  extern __shared__ __align__(kTileAlign) char memory[];
  auto& shared = *reinterpret_cast<PrepareShared<Config>*>(memory);
  const int64_t chunk = blockIdx.x / p.Hk, n = sequence_of_chunk(p.plan, chunk);
  if (n < 0) return;
  const Sequence sequence = sequence_of(p.plan, n);
  const int64_t first = (chunk - sequence.first_chunk) * C;
  const PreparePlace at{chunk, sequence.row, sequence.begin + first, static_cast<int>(min(sequence.length - first, int64_t{C})),
                        static_cast<int>(blockIdx.x % p.Hk)};
  load_rows<Config>(p, at, p.k, p.k_strides, shared.k, shared.norm[0], shared.vector(kInverseK));
  load_rows<Config>(p, at, p.q, p.q_strides, shared.q, shared.norm[1], shared.vector(kInverseQ));
  publish_writes_to_async_proxy();
  __syncthreads();
  typename Mma::Accumulator kk, qk;
  const typename Config::RowsOperand k(shared.k), q(shared.q);
  wgmma_fence();
#pragma unroll
  for (int s = 0; s < Config::K / Mma::K; ++s) Mma::ss(kk, k.at(0, s * Mma::K), k.at(0, s * Mma::K), s > 0);  // Kn Knᵀ   [C, C]
#pragma unroll
  for (int s = 0; s < Config::K / Mma::K; ++s) Mma::ss(qk, q.at(0, s * Mma::K), k.at(0, s * Mma::K), s > 0);  // Qn Knᵀ   [C, C]
  wgmma_commit();
  wgmma_wait<0>();
  wgmma_touch(kk), wgmma_touch(qk);
  const int64_t heads = p.H / p.Hk;
#pragma unroll 1
  for (int64_t h = 0; h < heads; ++h) prepare_head<Config>(p, at, shared, at.hk * heads + h, kk, qk);
  if (threadIdx.x == 0) wait_stores_done<0>();
}

template <class Config>
void launch_prepare(const PrepareArguments& p, cudaStream_t stream) {
  const int64_t ctas = p.plan.most_chunks * p.Hk;
  require(ctas < (int64_t{1} << 31), "chunk_gated_delta_rule", "chunks * Hk", "below 2^31", ctas);
  launch("chunk_gated_delta_rule", {dim3(static_cast<unsigned>(ctas)), kWarpgroup, static_cast<int>(sizeof(PrepareShared<Config>))}, stream,
         chunk_prepare_kernel<Config>, p);
}

// chunk_prepare.cu
extern template void launch_prepare<PrepareConfig<64>>(const PrepareArguments& p, cudaStream_t stream);
extern template void launch_prepare<PrepareConfig<96>>(const PrepareArguments& p, cudaStream_t stream);
extern template void launch_prepare<PrepareConfig<128>>(const PrepareArguments& p, cudaStream_t stream);
extern template void launch_prepare<PrepareConfig<192>>(const PrepareArguments& p, cudaStream_t stream);
extern template void launch_prepare<PrepareConfig<256>>(const PrepareArguments& p, cudaStream_t stream);

}  // namespace jet::hopper
