// The recurrent gated delta rule on a GPU: bound by reading and writing the states once. docs/gated_delta_rule.md has the data sheet.
//
// A CTA of 2 K threads has one sequence and one key head, and walks over slices of `tile` columns of the states S [K, V] of the value
// heads that read it. A thread keeps `rows` x `columns` of a slice in registers, loaded and stored in 16-byte accesses; the next slice is on its way while this
// one is worked on. Per token:
//   p = S^T k, r = S^T q   [tile]: partial sums per thread, then per warp by shuffles, then over the warps through shared memory
//   u = beta (v - e^g p)
//   o = scale (e^g r + <q, k> u)       = scale S'^T q of the updated state S' = e^g S + k u^T, without a second pass
//   S <- e^g S + k u^T
#pragma once

#include "csrc/gated_delta_rule/recurrent_kernel_takes.h"
#include "csrc/hopper/convert.h"
#include "csrc/hopper/device.h"
#include "csrc/hopper/launch.h"

namespace jet::hopper {

enum class RecurrentMode { step, verify, commit };  // recurrent_gated_delta_rule.h, .._verify.h, .._commit.h

constexpr int kMaxTokens = 8;  // prepared at a time in shared memory
constexpr int kMaxK = 256;

template <class State_, int tile_, RecurrentMode mode_>
struct RecurrentConfig {
  using State = State_;  // float or bf16
  static constexpr RecurrentMode mode = mode_;
  static constexpr int tile = tile_;                  // columns of a slice
  static constexpr int columns = 16 / sizeof(State);  // of a thread: one 16-byte access
  static constexpr int lanes = tile / columns;        // threads side by side in a row
  static constexpr int rows = lanes / 2;              // of a thread, so that K / rows * lanes = 2 K threads cover a slice
  static_assert(rows >= 1 && lanes <= 16, "the two sums of a column are written by two row groups of a warp");
};

// Column c of a slice in shared arrays: the threads of a row read and write 16 bytes side by side.
template <class Config>
__device__ constexpr int slot(int c) {
  return c % Config::columns / 4 * (Config::tile / 2) + c / Config::columns * 4 + c % 4;
}
struct RecurrentArguments {
  Dtype dtype, g_dtype, beta_dtype;
  int64_t T, H, Hk;
  int K, V;
  float scale;
  bool l2norm_qk;
  const void *q, *k, *v, *g, *beta;
  TokenStrides q_strides, k_strides, v_strides, g_strides, beta_strides;
  StatePool pool;
  void* o;
  float *keys, *updates;     // verify writes them, commit reads them
  const void* num_accepted;  // commit
  IndexType num_accepted_dtype;
  int tokens;  // prepared at a time: min(T, kMaxTokens)
  int slices;  // of a CTA: a divisor of V / tile, or a multiple of it that divides H / Hk * V / tile
  __host__ __device__ int heads(int tile) const { return slices * tile > V ? slices * tile / V : 1; }  // of a CTA
};

// Dynamic shared memory.
struct alignas(8) TokenGates {
  float decay, beta;  // e^g
};
struct RecurrentShared {
  float *q, *k;       // [tokens, K], after the l2norm
  float* v;           // [tokens, slices * tile] v, or u for commit
  float* partial;     // [2, warps, 2, tile] p and r of a warp; tokens alternate between the halves
  TokenGates* gates;  // [tokens, heads]
  float* qk;          // [tokens] <q, k>
  __host__ __device__ static int64_t floats(const RecurrentArguments& p, int tile) {
    return p.tokens * (2 * p.K + p.slices * tile + 2 * p.heads(tile) + 1) + 2 * (p.K / 16) * 2 * tile;
  }
  template <class Config>
  __device__ RecurrentShared(Config, float* memory, const RecurrentArguments& p) {
    q = memory, k = q + p.tokens * p.K, v = k + p.tokens * p.K;
    partial = v + p.tokens * p.slices * Config::tile;
    gates = reinterpret_cast<TokenGates*>(partial + 4 * (p.K / 16) * Config::tile);
    qk = reinterpret_cast<float*>(gates + p.tokens * p.heads(Config::tile));
  }
};

// What a CTA works on: slices `first` .. `first + slices - 1` of the key head's, counted through its value heads.
struct RecurrentPlace {
  int64_t n, row;   // row of the pool; negative: none
  int hk, h;        // h: of the first slice
  int column;       // of the first slice in its head
};

template <class Config>
__device__ RecurrentPlace recurrent_place(const RecurrentArguments& p) {
  const int Hk = static_cast<int>(p.Hk), group = static_cast<int>(p.H) / Hk;
  const int parts = group * p.V / (p.slices * Config::tile), head = blockIdx.x / parts;
  const int first = static_cast<int>(blockIdx.x) % parts * p.slices * Config::tile;  // column among those of the key head
  RecurrentPlace at{head / Hk, 0, head % Hk, head % Hk * group + first / p.V, first % p.V};
  at.row = p.pool.rows == nullptr ? at.n : load_index(p.pool.rows, p.pool.rows_dtype, at.n);
  if (at.row >= p.pool.P) at.row = -1;
  return at;
}

// Column c of the CTA's, counted through its heads.
struct HeadColumn {
  int h, column;  // h: from the CTA's first
};
__device__ inline HeadColumn head_column(const RecurrentArguments& p, const RecurrentPlace& at, int c) {
  return {c / p.V, at.column + c % p.V};  // a CTA of more than one head begins at column 0
}

// Each key head is written by one CTA.
__device__ inline bool writes_keys(const RecurrentArguments& p, const RecurrentPlace& at) {
  return at.column == 0 && at.h % static_cast<int>(p.H / p.Hk) == 0;
}

__device__ inline int64_t token_offset(const TokenStrides& s, int64_t n, int64_t t, int64_t h) { return n * s.b + t * s.t + h * s.h; }

__device__ inline float warp_sum(float x) {
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) x += __shfl_xor_sync(0xffffffffu, x, offset);
  return x;
}

// Tokens t .. t + count - 1 as they are into shared memory. A thread loads one element of q or of k per token.
template <class Config>
__device__ void load_tokens(const RecurrentArguments& p, const RecurrentShared& shared, const RecurrentPlace& at, int64_t t, int count) {
  constexpr bool commit = Config::mode == RecurrentMode::commit;
  const bool is_q = threadIdx.x < p.K;
  const int d = is_q ? threadIdx.x : threadIdx.x - p.K;
  if constexpr (commit) {
    const float* keys = p.keys + ((at.n * p.T + t) * p.Hk + at.hk) * p.K + d;
    for (int i = is_q ? 0 : 1; i < count; i += 2) shared.k[i * p.K + d] = keys[i * p.Hk * p.K];
  } else {
    const TokenStrides& s = is_q ? p.q_strides : p.k_strides;
    const int64_t first = token_offset(s, at.n, t, at.hk) + d * s.d;
    for (int i = 0; i < count; ++i)
      (is_q ? shared.q : shared.k)[i * p.K + d] = load_as_float(is_q ? p.q : p.k, p.dtype, first + i * s.t);
  }
  const int columns = p.slices * Config::tile;
  for (int e = threadIdx.x; e < count * columns; e += blockDim.x) {
    const int i = e / columns, c = e % columns;
    const HeadColumn from = head_column(p, at, c);
    float* v = shared.v + e - c % Config::tile + slot<Config>(c % Config::tile);
    if constexpr (commit)
      *v = p.updates[((at.n * p.T + t + i) * p.H + at.h + from.h) * p.V + from.column];
    else
      *v = load_as_float(p.v, p.dtype, token_offset(p.v_strides, at.n, t + i, at.h + from.h) + from.column * p.v_strides.d);
  }
  const int heads = p.heads(Config::tile);
  for (int e = threadIdx.x; e < count * heads; e += blockDim.x) {
    const int64_t token = t + e / heads, h = at.h + e % heads;
    TokenGates gates{expf(load_as_float(p.g, p.g_dtype, token_offset(p.g_strides, at.n, token, h))), 0};
    if constexpr (!commit) gates.beta = load_as_float(p.beta, p.beta_dtype, token_offset(p.beta_strides, at.n, token, h));
    shared.gates[e] = gates;
  }
}

// The l2norm of the tokens that load_tokens brought, and <q, k>; a warp per token.
template <class Config>
__device__ void normalise_tokens(const RecurrentArguments& p, const RecurrentShared& shared, const RecurrentPlace& at, int64_t t, int count) {
  const int lane = threadIdx.x % 32;
  for (int i = threadIdx.x / 32; i < count; i += blockDim.x / 32) {
    float *q = shared.q + i * p.K, *k = shared.k + i * p.K;
    float qq = 0, kk = 0, qk = 0;
#pragma unroll 2
    for (int d = lane; d < p.K; d += 32) qq += q[d] * q[d], kk += k[d] * k[d], qk += q[d] * k[d];
    float q_factor = 1, k_factor = 1;
    if (p.l2norm_qk) {
      q_factor = 1.0f / sqrtf(warp_sum(qq) + float(kL2NormEps));
      k_factor = 1.0f / sqrtf(warp_sum(kk) + float(kL2NormEps));
    }
    qk = warp_sum(qk) * q_factor * k_factor;
    if (lane == 0) shared.qk[i] = qk;
#pragma unroll 2
    for (int d = lane; d < p.K; d += 32) q[d] *= q_factor, k[d] *= k_factor;
    if constexpr (Config::mode == RecurrentMode::verify)
      if (writes_keys(p, at)) {
        float* keys = p.keys + ((at.n * p.T + t + i) * p.Hk + at.hk) * p.K;
        for (int d = lane; d < p.K; d += 32) keys[d] = k[d];
      }
  }
}

// A thread's part of a slice: rows i .. i + rows - 1, columns c .. c + columns - 1.
template <class Config>
struct RecurrentThread {
  int i, c, lane_group;  // lane_group: which rows of the warp
  __device__ RecurrentThread() {
    i = threadIdx.x / Config::lanes * Config::rows, c = threadIdx.x % Config::lanes * Config::columns;
    lane_group = threadIdx.x % 32 / Config::lanes;
  }
};

template <class Config>
using RecurrentState = float[Config::rows][Config::columns];

template <class Config>
__device__ void unpack_state(RecurrentState<Config>& s, const uint4 (&raw)[Config::rows]) {
#pragma unroll
  for (int j = 0; j < Config::rows; ++j) {
    const uint32_t words[4] = {raw[j].x, raw[j].y, raw[j].z, raw[j].w};
#pragma unroll
    for (int w = 0; w < 4; ++w) {
      if constexpr (sizeof(typename Config::State) == 4) {
        s[j][w] = __uint_as_float(words[w]);
      } else {
        const float2 pair = unpack<bf16>(words[w]);
        s[j][2 * w] = pair.x, s[j][2 * w + 1] = pair.y;
      }
    }
  }
}

template <class Config>
__device__ void store_state(typename Config::State* to, int64_t stride, const RecurrentState<Config>& s) {
#pragma unroll
  for (int j = 0; j < Config::rows; ++j) {
    uint32_t words[4];
#pragma unroll
    for (int w = 0; w < 4; ++w) {
      if constexpr (sizeof(typename Config::State) == 4)
        words[w] = __float_as_uint(s[j][w]);
      else
        words[w] = pack<bf16>(s[j][2 * w], s[j][2 * w + 1]);
    }
    __stcg(reinterpret_cast<uint4*>(to + j * stride), make_uint4(words[0], words[1], words[2], words[3]));
  }
}

// x[rows] = row[i .. i + rows - 1]
template <int rows>
__device__ void load_rows(float (&x)[rows], const float* row) {
  if constexpr (rows % 4 == 0) {
#pragma unroll
    for (int j = 0; j < rows; j += 4) {
      const float4 four = *reinterpret_cast<const float4*>(row + j);
      x[j] = four.x, x[j + 1] = four.y, x[j + 2] = four.z, x[j + 3] = four.w;
    }
  } else {
#pragma unroll
    for (int j = 0; j < rows; ++j) x[j] = row[j];
  }
}

// sum over `count` rows from `first` of x[j] s[j][c], as a balanced tree. The shuffles go on with the same tree, so that a sum does not
// depend on how many rows a thread has: a sequence gives the same bits in every batch, whatever tiles are chosen.
template <int count, int rows, int columns>
__device__ float dot_tree(const float (&x)[rows], const float (&s)[rows][columns], int c, int first = 0) {
  if constexpr (count == 1)
    return __fmul_rn(x[first], s[first][c]);
  else if constexpr (count == 2)
    return fmaf(x[first + 1], s[first + 1][c], __fmul_rn(x[first], s[first][c]));
  else
    return __fadd_rn(dot_tree<count / 2>(x, s, c, first), dot_tree<count / 2>(x, s, c, first + count / 2));
}

// p = S^T k and r = S^T q of the warp's rows to shared.partial[half, warp].
template <class Config>
__device__ void reduce_over_rows(const RecurrentShared& shared, const RecurrentThread<Config>& me, const RecurrentState<Config>& s,
                                 const float (&k)[Config::rows], const float (&q)[Config::rows], int half) {
  float sums[2][Config::columns];
#pragma unroll
  for (int c = 0; c < Config::columns; ++c) sums[0][c] = dot_tree<Config::rows>(k, s, c), sums[1][c] = dot_tree<Config::rows>(q, s, c);
#pragma unroll
  for (int offset = Config::lanes; offset < 32; offset *= 2)
#pragma unroll
    for (int c = 0; c < Config::columns; ++c) {
      sums[0][c] += __shfl_xor_sync(0xffffffffu, sums[0][c], offset);
      sums[1][c] += __shfl_xor_sync(0xffffffffu, sums[1][c], offset);
    }
  if (me.lane_group >= 2) return;
  const int warp = threadIdx.x / 32, warps = blockDim.x / 32;
  float* partial = shared.partial + ((half * warps + warp) * 2 + me.lane_group) * Config::tile;
#pragma unroll
  for (int c = 0; c < Config::columns; ++c) sums[0][c] = me.lane_group == 0 ? sums[0][c] : sums[1][c];
#pragma unroll
  for (int c = 0; c < Config::columns; c += 4)
    store_shared_16(partial + slot<Config>(me.c + c), sums[0][c], sums[0][c + 1], sums[0][c + 2], sums[0][c + 3]);
}

// x[columns] = sum over the warps of p (which = 0) or r (1), in the order of the warps
template <class Config>
__device__ void sum_of_warps(float (&x)[Config::columns], const RecurrentShared& shared, const RecurrentThread<Config>& me, int half, int which) {
  const int warps = blockDim.x / 32;
#pragma unroll
  for (int c = 0; c < Config::columns; ++c) x[c] = 0;
#pragma unroll 2
  for (int warp = 0; warp < warps; ++warp)
#pragma unroll
    for (int c = 0; c < Config::columns; c += 4) {
      const float4 part =
          *reinterpret_cast<const float4*>(shared.partial + ((half * warps + warp) * 2 + which) * Config::tile + slot<Config>(me.c + c));
      x[c] += part.x, x[c + 1] += part.y, x[c + 2] += part.z, x[c + 3] += part.w;
    }
}

// x[columns] = v, or u, of token i
template <class Config>
__device__ void load_columns(float (&x)[Config::columns], const RecurrentArguments& p, const RecurrentShared& shared,
                             const RecurrentThread<Config>& me, int slice, int i) {
  const float* v = shared.v + (i * p.slices + slice) * Config::tile;
#pragma unroll
  for (int c = 0; c < Config::columns; c += 4) {
    const float4 four = *reinterpret_cast<const float4*>(v + slot<Config>(me.c + c));
    x[c] = four.x, x[c + 1] = four.y, x[c + 2] = four.z, x[c + 3] = four.w;
  }
}

// A slice of the CTA's: its value head, and where its columns begin.
struct RecurrentSlice {
  int index, h, column;
};

// u[columns] of token i (in shared memory), which is token t, and its outputs.
template <class Config>
__device__ void update_of_token(float (&u)[Config::columns], const RecurrentArguments& p, const RecurrentShared& shared,
                                const RecurrentPlace& at, const RecurrentThread<Config>& me, const RecurrentSlice& slice,
                                const TokenGates& gates, int64_t t, int i, int half) {
  float v[Config::columns];
  load_columns<Config>(v, p, shared, me, slice.index, i);
  sum_of_warps<Config>(u, shared, me, half, 0);
#pragma unroll
  for (int c = 0; c < Config::columns; ++c) u[c] = gates.beta * (v[c] - gates.decay * u[c]);  // u = beta (v - e^g p)
  if (me.i != 0) return;
  float o[Config::columns];
  sum_of_warps<Config>(o, shared, me, half, 1);
#pragma unroll
  for (int c = 0; c < Config::columns; ++c) o[c] = p.scale * (gates.decay * o[c] + shared.qk[i] * u[c]);  // o = scale (e^g r + <q, k> u)
  const int64_t out = ((at.n * p.T + t) * p.H + at.h + slice.h) * p.V + slice.column + me.c;
  store_rounded(p.o, p.dtype, out, o);
  if constexpr (Config::mode == RecurrentMode::verify) store_rounded(p.updates, Dtype::f32, out, u);
}

// One token on one slice.
template <class Config>
__device__ void recurrent_token(RecurrentState<Config>& s, const RecurrentArguments& p, const RecurrentShared& shared,
                                const RecurrentPlace& at, const RecurrentThread<Config>& me, const RecurrentSlice& slice, int64_t t, int i,
                                int half) {
  float k[Config::rows], u[Config::columns];
  load_rows(k, shared.k + i * p.K + me.i);
  const TokenGates gates = shared.gates[i * p.heads(Config::tile) + slice.h];
  if constexpr (Config::mode == RecurrentMode::commit) {
    load_columns<Config>(u, p, shared, me, slice.index, i);
  } else {
    float q[Config::rows];
    load_rows(q, shared.q + i * p.K + me.i);
    reduce_over_rows<Config>(shared, me, s, k, q, half);
    __syncthreads();
    update_of_token<Config>(u, p, shared, at, me, slice, gates, t, i, half);
  }
#pragma unroll
  for (int j = 0; j < Config::rows; ++j)
#pragma unroll
    for (int c = 0; c < Config::columns; ++c) s[j][c] = fmaf(k[j], u[c], gates.decay * s[j][c]);  // S <- e^g S + k u^T
}

// A sequence without a row: zeros.
template <class Config>
__device__ void write_zeros(const RecurrentArguments& p, const RecurrentPlace& at) {
  if constexpr (Config::mode == RecurrentMode::commit) return;
  const float zeros[4] = {};
  for (int64_t t = 0; t < p.T; ++t) {
    const int64_t token = at.n * p.T + t;
    for (int c = threadIdx.x * 4; c < p.slices * Config::tile; c += blockDim.x * 4) {
      const HeadColumn to = head_column(p, at, c);
      const int64_t out = (token * p.H + at.h + to.h) * p.V + to.column;
      store_rounded(p.o, p.dtype, out, zeros);
      if constexpr (Config::mode == RecurrentMode::verify) store_rounded(p.updates, Dtype::f32, out, zeros);
    }
    if constexpr (Config::mode == RecurrentMode::verify)
      if (writes_keys(p, at))
        for (int d = threadIdx.x; d < p.K; d += blockDim.x) p.keys[(token * p.Hk + at.hk) * p.K + d] = 0;
  }
}

template <class Config>
__global__ void __launch_bounds__(2 * kMaxK, 1) recurrent_kernel(const __grid_constant__ RecurrentArguments p) {
  using State = typename Config::State;
  extern __shared__ __align__(16) float memory[];
  const RecurrentShared shared(Config(), memory, p);
  const RecurrentPlace at = recurrent_place<Config>(p);
  if (at.row < 0) return write_zeros<Config>(p, at);
  int64_t T = p.T;
  if constexpr (Config::mode == RecurrentMode::commit) {
    T = min(max(load_index(p.num_accepted, p.num_accepted_dtype, at.n), int64_t{0}), p.T);
    if (T == 0) return;
  }
  const RecurrentThread<Config> me;
  const StateStrides& strides = p.pool.strides;
  State* state = static_cast<State*>(p.pool.data) + at.row * strides.n + at.h * strides.h + me.i * strides.k + me.c;
  uint4 next[Config::rows];
  const auto slice_at = [&](int index) {
    const HeadColumn from = head_column(p, at, index * Config::tile);
    return RecurrentSlice{index, from.h, from.column};
  };
  const auto load_slice = [&](const RecurrentSlice& slice) {
    const State* from = state + slice.h * strides.h + slice.column;
#pragma unroll
    for (int j = 0; j < Config::rows; ++j) next[j] = __ldcg(reinterpret_cast<const uint4*>(from + j * strides.k));
  };
  load_slice(slice_at(0));  // the longest wait first
  const bool prepared_once = T <= p.tokens;
  int half = 0;
  for (int index = 0; index < p.slices; ++index) {
    const RecurrentSlice slice = slice_at(index);
    RecurrentState<Config> s;
    unpack_state<Config>(s, next);
    if (index + 1 < p.slices) load_slice(slice_at(index + 1));
    for (int64_t t = 0; t < T; t += p.tokens) {
      const int count = min(int64_t{p.tokens}, T - t);
      if (index == 0 || !prepared_once) {
        __syncthreads();  // nobody reads the tokens before these any more
        load_tokens<Config>(p, shared, at, t, count);
        __syncthreads();
        if constexpr (Config::mode != RecurrentMode::commit) {
          normalise_tokens<Config>(p, shared, at, t, count);
          __syncthreads();
        }
      }
      for (int i = 0; i < count; ++i, half ^= 1) recurrent_token<Config>(s, p, shared, at, me, slice, t + i, i, half);
    }
    if constexpr (Config::mode != RecurrentMode::verify) store_state<Config>(state + slice.h * strides.h + slice.column, strides.k, s);
  }
}

struct RecurrentTiles {
  int tile;    // columns of a slice
  int slices;  // of a CTA
};

// For N sequences. A wide slice reads whole 256-byte rows; a narrow one gives every multiprocessor something to do.
inline RecurrentTiles choose_recurrent_tiles(int64_t N, int64_t H, int64_t Hk, int64_t V, int multiprocessors) {
  int tile = V % 64 == 0 ? 64 : V % 32 == 0 ? 32 : 16;
  // From half the multiprocessors on, latency and not the number of CTAs decides; below 128-byte rows of fp32 nothing is won.
  while (tile > 32 && N * H * (V / tile) < multiprocessors / 2) tile /= 2;
  const int64_t full = 3 * multiprocessors;  // as many CTAs as fit at a time, about: four at K = 64, two at K = 96 and 128
  // Inputs that slices have in common are read once if one CTA takes these slices, all those of a key head or of a value head.
  const int64_t per_head = V / tile, per_key_head = H / Hk * per_head;
  if (N * Hk >= full && per_key_head * tile <= kRecurrentMaxV) return {tile, static_cast<int>(per_key_head)};
  return {tile, N * H >= full ? static_cast<int>(per_head) : 1};
}

template <class State, int tile, RecurrentMode mode>
void launch_recurrent(const char* op, RecurrentArguments& p, int64_t N, cudaStream_t stream) {
  using Config = RecurrentConfig<State, tile, mode>;
  const int64_t ctas = N * p.H * p.V / (p.slices * tile);
  require(ctas < (int64_t{1} << 31), op, "N * H * V / 16", "below 2^31", ctas);
  const int bytes = 4 * static_cast<int>(RecurrentShared::floats(p, tile));
  launch(op, {dim3(static_cast<unsigned>(ctas)), 2 * p.K, bytes}, stream, recurrent_kernel<Config>, p);
}

// All of `p` but the tiles is filled in.
template <RecurrentMode mode>
void launch_recurrent(const char* op, RecurrentArguments& p, int64_t N, void* stream) {
  if (N * p.H == 0 || p.T == 0) return;
  const RecurrentTiles tiles = choose_recurrent_tiles(N, p.H, p.Hk, p.V, current_device_facts().multiprocessors);
  p.tokens = static_cast<int>(p.T < kMaxTokens ? p.T : kMaxTokens);
  p.slices = tiles.slices;
  const auto on = [&](auto tile) {
    if (p.pool.dtype == Dtype::f32)
      launch_recurrent<float, tile.value, mode>(op, p, N, static_cast<cudaStream_t>(stream));
    else
      launch_recurrent<bf16, tile.value, mode>(op, p, N, static_cast<cudaStream_t>(stream));
  };
  if (tiles.tile == 64) return on(std::integral_constant<int, 64>());
  if (tiles.tile == 32) return on(std::integral_constant<int, 32>());
  on(std::integral_constant<int, 16>());
}

// The arguments that step and verify share.
inline RecurrentArguments recurrent_arguments(const RecurrentGatedDeltaRuleParams& p) {
  RecurrentArguments a{};
  a.dtype = p.dtype, a.g_dtype = p.g_dtype, a.beta_dtype = p.beta_dtype;
  a.T = p.T, a.H = p.H, a.Hk = p.Hk, a.K = static_cast<int>(p.K), a.V = static_cast<int>(p.V);
  a.scale = static_cast<float>(p.scale), a.l2norm_qk = p.l2norm_qk;
  a.q = p.q, a.k = p.k, a.v = p.v, a.g = p.g, a.beta = p.beta;
  a.q_strides = p.q_strides, a.k_strides = p.k_strides, a.v_strides = p.v_strides;
  a.g_strides = p.g_strides, a.beta_strides = p.beta_strides;
  a.pool = p.pool, a.o = p.o;
  return a;
}

}  // namespace jet::hopper
