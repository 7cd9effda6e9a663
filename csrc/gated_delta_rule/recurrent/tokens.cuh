// The tokens of a CTA of the recurrent kernel: from global memory, through registers, into shared memory; their l2norm.
#pragma once

#include "csrc/gated_delta_rule/recurrent/kernel_arguments.h"
#include "csrc/hopper/convert.h"
#include "csrc/hopper/sigmoid.h"

namespace jet::hopper {

// recurrent_gated_delta_rule.h, .._verify.h, .._commit.h; a JetBlock's step, whose activations are done here
enum class RecurrentMode { step, verify, commit, jet_block };

// v_first: states that lie as [V, K], their rows side by side in memory.
template <class State_, int tile_, RecurrentMode mode_, bool v_first_ = false>
struct RecurrentConfig {
  using State = State_;  // float or bf16
  static constexpr RecurrentMode mode = mode_;
  static constexpr bool v_first = v_first_;
  static constexpr int tile = tile_;  // columns of a slice
  // A slice may be wider than what is left of a head, where 64 does not divide V.
  static constexpr bool partial = tile < 64;
  static constexpr int columns = v_first ? 4 : 16 / sizeof(State);  // of a thread: one 16-byte access
  static constexpr int lanes = tile / columns;                      // threads side by side in a row
  static constexpr int rows = lanes / 2;  // of a thread, so that K / rows * lanes = 2 K threads cover a slice
  // Whether the next slice is loaded while this one is worked on. In fp32 it would take 32 registers, and a CTA less on
  // a multiprocessor.
  static constexpr bool ahead = sizeof(State) == 2;
  // That share the registers of a multiprocessor. 768: 80 registers each, four CTAs at K = 96, three at K = 128; 640:
  // 96, three and two.
  static constexpr int threads_at_a_time = ahead ? 640 : 768;
  // Whose loads a thread has under way at the beginning.
  static constexpr int first_tokens = mode == RecurrentMode::step || mode == RecurrentMode::jet_block ? 1 : 2;
  static_assert(rows >= 1 && lanes <= 16, "neighbouring row groups of a warp add up the two sums of a column");
};

// Column c of a slice in shared arrays: the threads of a row read and write 16 bytes side by side.
template <class Config>
__device__ constexpr int slot(int c) {
  return c % Config::columns / 4 * (Config::tile / 2) + c / Config::columns * 4 + c % 4;
}

// Dynamic shared memory.
struct alignas(8) TokenGates {
  float decay, beta;  // e^g
};
struct RecurrentShared {
  float* qk;          // [tokens, 2, K] q and k as they come
  float* v;           // [tokens, columns of the CTA] v, or u for commit
  float* partial;     // [2, warps, 2, tile] p and r of a warp; tokens alternate between the halves
  TokenGates* gates;  // [tokens, heads]
  static int64_t floats(const RecurrentArguments& p, int tile) {
    return p.tokens * (2 * p.K + p.columns + 2 * p.heads) + 2 * (p.K / 16) * 2 * tile;
  }
  template <class Config>
  __device__ RecurrentShared(Config, float* memory, const RecurrentArguments& p) {
    qk = memory, v = qk + p.tokens * 2 * p.K;
    partial = v + p.tokens * p.columns;
    gates = reinterpret_cast<TokenGates*>(partial + 4 * (p.K / 16) * Config::tile);
  }
};

// Where a CTA begins. Unsigned: a product with a stride of 64 bits is two instructions, with a sign it would be four.
struct RecurrentPlace {
  uint32_t n, h, hk, column;  // column: of value head h
  // Of the CTA's columns those that are there.
  template <class Config>
  __device__ uint32_t columns(const RecurrentArguments& p) const {
    return Config::partial ? min(static_cast<uint32_t>(p.columns), p.heads * p.V - column) : p.columns;
  }
};

__device__ inline RecurrentPlace recurrent_place(const RecurrentArguments& p) {
  const uint32_t unit = p.parts.quotient(blockIdx.x), n = p.head_groups.quotient(unit),
                 h = (unit - n * p.head_groups.d) * p.heads;
  return {n, h, p.group.quotient(h), (blockIdx.x - unit * p.parts.d) * p.columns};
}

// Each key head is written by one CTA.
__device__ inline bool writes_keys(const RecurrentArguments& p, const RecurrentPlace& at) {
  return at.column == 0 && at.h == at.hk * p.group.d;
}

// Loads of types known at run time only, as predicated instructions: the compiler must see no branch between the first
// load of a token and its last use. After a branch it would wait for the state as well.

// Elements of 32 or of 16 bits.
struct AnyElement {
  uint32_t wide, narrow;
};

__device__ inline AnyElement load_element(bool asked, Dtype dtype, const void* from) {
  // Initialised: else the registers would have to be kept from the beginning, for what a load that is not done leaves
  // in them.
  AnyElement x{};
  asm volatile(
      "{\n"
      ".reg .pred wide, narrow;\n"
      "setp.ne.s32 wide, %3, 0;\n"
      "setp.ne.s32 narrow, %4, 0;\n"
      "@wide ld.global.b32 %0, [%2];\n"
      "@narrow ld.global.u16 %1, [%2];\n"
      "}\n"
      : "+r"(x.wide), "+r"(x.narrow)
      : "l"(from), "r"(int{asked && dtype == Dtype::f32}), "r"(int{asked && dtype != Dtype::f32})
      : "memory");
  return x;
}

// The row of sequence n, negative if it has none.
__device__ inline int64_t load_row(const StatePool& pool, uint32_t n) {
  const bool wide = pool.rows.type == IndexType::i64;
  int64_t row = n, wide_row;
  int32_t narrow_row;
  asm volatile(
      "{\n"
      ".reg .pred wide, narrow;\n"
      "setp.ne.s32 wide, %3, 0;\n"
      "setp.ne.s32 narrow, %4, 0;\n"
      "@wide ld.global.b64 %0, [%2];\n"
      "@narrow ld.global.b32 %1, [%2];\n"
      "}\n"
      : "=&l"(wide_row), "=&r"(narrow_row)
      : "l"(static_cast<const char*>(pool.rows.data) + n * uint64_t{wide ? 8u : 4u}),
        "r"(int{pool.rows.data != nullptr && wide}), "r"(int{pool.rows.data != nullptr && !wide})
      : "memory");
  if (pool.rows.data != nullptr) row = wide ? wide_row : narrow_row;
  return row < pool.P ? row : -1;
}

__device__ inline AnyElement load_element(bool asked, const TokenTensor& x, uint32_t n, uint32_t t, uint32_t h,
                                          uint32_t d) {
  const auto times = [](uint32_t i, int64_t stride) { return i * static_cast<uint64_t>(stride); };
  const char* const from = static_cast<const char*>(x.data) + times(n, x.strides.b) + times(t, x.strides.t) +
                           times(h, x.strides.h) + times(d, x.strides.d);
  return load_element(asked, x.dtype, from);
}

__device__ inline AnyElement load_number(bool asked, const NumberVector& x, uint32_t i) {
  return load_element(asked, x.dtype, static_cast<const char*>(x.data) + i * (x.dtype == Dtype::f32 ? 4u : 2u));
}

__device__ inline float value_of(const AnyElement& x, Dtype dtype) {
  const float as_f16 = __half2float(__ushort_as_half(static_cast<uint16_t>(x.narrow)));
  const float small = dtype == Dtype::bf16 ? __uint_as_float(x.narrow << 16) : as_f16;
  return dtype == Dtype::f32 ? __uint_as_float(x.wide) : small;
}

// log(1 + e^x) as max(x, 0) + log(1 + e^-|x|), without a branch: relative error about 1e-6.
__device__ inline float fast_softplus(float x) {
  const float e = __expf(-fabsf(x)), sum = 1.0f + e;
  // log(sum) e / (sum - 1) takes back what was rounded off in the sum.
  const float log = sum == 1.0f ? e : logf(sum) * __fdividef(e, sum - 1.0f);
  return fmaxf(x, 0.0f) + log;
}

// What a thread brings of `tokens` tokens: an element of q or of k, two columns of v, the gates of a head.
template <class Config, int tokens>
struct TokensInFlight {
  static constexpr bool commit = Config::mode == RecurrentMode::commit;
  static constexpr bool jet_block = Config::mode == RecurrentMode::jet_block;
  AnyElement qk[tokens], v[tokens][2], g[tokens], beta[tokens];
  AnyElement A_log, dt_bias;  // jet_block

  // Tokens t .. t + count - 1, at most `tokens` of them. Waits for none.
  __device__ TokensInFlight(const RecurrentArguments& p, const RecurrentPlace& at, int t, int count) {
    const bool is_q = threadIdx.x < p.K, has_gates = threadIdx.x < p.heads;
    const TokenStrides &q = p.q.strides, &k = p.k.strides;
    const TokenTensor x{is_q ? p.q.data : p.k.data,
                        p.k.dtype,
                        {is_q ? q.b : k.b, is_q ? q.t : k.t, is_q ? q.h : k.h, is_q ? q.d : k.d}};
#pragma unroll
    for (int i = 0; i < tokens; ++i) {
      const bool asked = i == 0 || i < count;
      qk[i] = load_element(asked && !(commit && is_q), x, at.n, t + i, at.hk, is_q ? threadIdx.x : threadIdx.x - p.K);
#pragma unroll
      for (int j = 0; j < 2; ++j) v[i][j] = load_column(asked, p, at, t + i, threadIdx.x + j * blockDim.x);
      g[i] = load_element(asked && has_gates, p.g, at.n, t + i, at.h + threadIdx.x, 0);
      if constexpr (!commit) beta[i] = load_element(asked && has_gates, p.beta, at.n, t + i, at.h + threadIdx.x, 0);
    }
    if constexpr (jet_block) {
      A_log = load_number(has_gates, p.A_log, at.h + threadIdx.x);
      dt_bias = load_number(has_gates, p.dt_bias, at.h + threadIdx.x);
    }
  }

  // The same tokens to shared memory, from place `first` on.
  __device__ void store(const RecurrentArguments& p, const RecurrentShared& shared, const RecurrentPlace& at, int t,
                        int count, int first) const {
#pragma unroll
    for (int i = 0; i < tokens; ++i) {
      const bool asked = i == 0 || i < count;
      if (asked && !(commit && threadIdx.x < p.K))
        shared.qk[(first + i) * 2 * p.K + threadIdx.x] = activated(value_of(qk[i], p.k.dtype));
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        const int c = threadIdx.x + j * blockDim.x;
        if (asked && c < p.columns) shared.v[(first + i) * p.columns + place(c)] = value_of(v[i][j], p.v.dtype);
      }
      const TokenGates both = gates_of(p, i);
      if (asked && threadIdx.x < p.heads) shared.gates[(first + i) * p.heads + threadIdx.x] = both;
    }
#pragma unroll 1
    for (int i = 0; i < min(count, tokens); ++i)
#pragma unroll 1
      for (int c = threadIdx.x + 2 * blockDim.x; c < p.columns; c += blockDim.x)  // more than 4 K columns
        shared.v[(first + i) * p.columns + place(c)] = value_of(load_column(true, p, at, t + i, c), p.v.dtype);
  }

 private:
  static __device__ float activated(float x) {
    if constexpr (jet_block)
      return x * fast_sigmoid(x);
    else
      return x;
  }

  __device__ TokenGates gates_of(const RecurrentArguments& p, int i) const {
    if constexpr (jet_block) {
      const float x = value_of(g[i], p.g.dtype) + value_of(dt_bias, p.dt_bias.dtype);
      const float decay = expf(-expf(value_of(A_log, p.A_log.dtype)) * fast_softplus(x));
      return {decay, fast_sigmoid(value_of(beta[i], p.beta.dtype))};
    } else {
      return {expf(value_of(g[i], p.g.dtype)), commit ? 0 : value_of(beta[i], p.beta.dtype)};
    }
  }

  static __device__ int place(int c) { return c - c % Config::tile + slot<Config>(c % Config::tile); }
  // Column c of the CTA's, counted through its heads: one of more than one head begins at column 0.
  static __device__ AnyElement load_column(bool asked, const RecurrentArguments& p, const RecurrentPlace& at, int t,
                                           uint32_t c) {
    const uint32_t h = p.width.quotient(c);
    return load_element(asked && c < at.columns<Config>(p), p.v, at.n, t, at.h + h, at.column + c - h * p.V);
  }
};

__device__ inline float warp_sum(float x) {
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) x += __shfl_xor_sync(0xffffffffu, x, offset);
  return x;
}

// What the l2norm multiplies q and k by, and <q, k> after it.
struct TokenFactors {
  float q = 1, k = 1, qk = 0;
  __device__ TokenFactors of_lane(int lane) const {
    return {__shfl_sync(0xffffffffu, q, lane), __shfl_sync(0xffffffffu, k, lane), __shfl_sync(0xffffffffu, qk, lane)};
  }
};

// To `mine`: the factors of tokens begin .. end - 1 in shared memory, of token i in lane i; t: of token 0. Every warp
// finds them for itself, as that is shorter than to wait for another.
template <class Config>
__device__ void find_factors(TokenFactors& mine, const RecurrentArguments& p, const RecurrentShared& shared,
                             const RecurrentPlace& at, int t, int begin, int end) {
  const int lane = threadIdx.x % 32;
#pragma unroll 1
  for (int i = begin; i < end; ++i) {
    const float *q = shared.qk + i * 2 * p.K, *k = q + p.K;
    TokenFactors token;
    float qq = 0, kk = 0, qk = 0;
#pragma unroll 1
    for (int from = 0; from < p.K; from += 128)
#pragma unroll
      for (int d = from + lane; d < from + 128; d += 32)
        if (d < p.K) qq += q[d] * q[d], kk += k[d] * k[d], qk += q[d] * k[d];
    qq = warp_sum(qq), kk = warp_sum(kk), qk = warp_sum(qk);
    if (p.l2norm_qk) token.q = rsqrtf(qq + float(kL2NormEps)), token.k = rsqrtf(kk + float(kL2NormEps));  // to 2^-22
    token.qk = qk * token.q * token.k;
    if (lane == i) mine = token;
    if constexpr (Config::mode == RecurrentMode::verify)
      if (threadIdx.x / 32 == i % (blockDim.x / 32) && writes_keys(p, at)) {
        float* keys = p.keys + ((uint64_t{at.n} * p.T + t + i) * p.Hk + at.hk) * p.K;
        for (int d = lane; d < p.K; d += 32) keys[d] = k[d] * token.k;
      }
  }
}

}  // namespace jet::hopper
