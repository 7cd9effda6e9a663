// The recurrent gated delta rule on a GPU: bound by reading and writing the states once. docs/gated_delta_rule.md has
// the data sheet.
//
// A CTA of 2 K threads has one sequence and one key head, and walks over slices of `tile` columns of the states S [K,
// V] of the value heads that read it. A thread keeps `rows` x `columns` of a slice in registers, loaded and stored in
// 16-byte accesses along V, or where states lie as [V, K] along K, of 8 bytes in the narrow tile of bf16; while it
// waits, the other CTAs of the multiprocessor work. Per token:
//   p = S^T k, r = S^T q          [tile]: partial sums per thread, then per warp by shuffles, then over the warps
//   u = beta (v - e^g p)
//   o = scale (e^g r + <q, k> u)  = scale S'^T q of the updated state S' = e^g S + k u^T, without a second pass
//   S <- e^g S + k u^T
#pragma once

#include "csrc/gated_delta_rule/recurrent/tokens.cuh"
#include "csrc/hopper/launch.h"

namespace jet::hopper {

// A thread's part of a slice: rows i .. i + rows - 1, columns c .. c + columns - 1.
template <class Config>
struct RecurrentThread {
  int i, c, lane_group;  // lane_group: which rows of the warp; even ones have p in their care, odd ones r
  __device__ RecurrentThread() {
    i = threadIdx.x / Config::lanes * Config::rows, c = threadIdx.x % Config::lanes * Config::columns;
    lane_group = threadIdx.x % 32 / Config::lanes;
  }
};

template <class Config>
using RecurrentState = float[Config::rows][Config::columns];

// A thread's part of a slice as it is in memory: 16 bytes of each row, or [V, K] in bf16 the words of each column. In
// fp32 it is the state.
template <class Config>
using RecurrentRaw = float[Config::ahead && Config::v_first ? Config::columns : Config::rows]
                          [Config::ahead && Config::v_first ? Config::rows / 2 : 4];

__device__ inline void load_words(float& a, float& b, float& c, float& d, const void* from, bool asked) {
  asm volatile(
      "{\n.reg .pred asked;\nsetp.ne.s32 asked, %5, 0;\n@asked ld.global.cg.v4.f32 {%0, %1, %2, %3}, [%4];\n}\n"
      : "=f"(a), "=f"(b), "=f"(c), "=f"(d)
      : "l"(from), "r"(int{asked})
      : "memory");
}

__device__ inline void load_words(float& a, float& b, const void* from, bool asked) {
  asm volatile("{\n.reg .pred asked;\nsetp.ne.s32 asked, %3, 0;\n@asked ld.global.cg.v2.f32 {%0, %1}, [%2];\n}\n"
               : "=f"(a), "=f"(b)
               : "l"(from), "r"(int{asked})
               : "memory");
}

// Waits for nothing. `stride`: of rows, or [V, K] of columns.
template <class Config>
__device__ void load_state(RecurrentRaw<Config>& raw, const typename Config::State* from, int64_t stride,
                           bool asked = true) {
  if constexpr (!Config::v_first) {
#pragma unroll
    for (int j = 0; j < Config::rows; ++j)
      load_words(raw[j][0], raw[j][1], raw[j][2], raw[j][3], from + j * stride, asked);
  } else if constexpr (!Config::ahead) {
#pragma unroll
    for (int c = 0; c < Config::columns; ++c)
#pragma unroll
      for (int j = 0; j < Config::rows; j += 4)
        load_words(raw[j][c], raw[j + 1][c], raw[j + 2][c], raw[j + 3][c], from + c * stride + j, asked);
  } else {
#pragma unroll
    for (int c = 0; c < Config::columns; ++c)
      if constexpr (Config::rows == 8)
        load_words(raw[c][0], raw[c][1], raw[c][2], raw[c][3], from + c * stride, asked);
      else
        load_words(raw[c][0], raw[c][1], from + c * stride, asked);
  }
}

// Where the next slice is loaded to.
template <class Config>
__device__ RecurrentRaw<Config>& place_of_next(RecurrentState<Config>& s, RecurrentRaw<Config>& ahead) {
  if constexpr (Config::ahead)
    return ahead;
  else
    return s;
}

template <class Config>
__device__ void unpack_state(RecurrentState<Config>& s, const RecurrentRaw<Config>& raw) {
  if constexpr (Config::ahead && Config::v_first) {
#pragma unroll
    for (int c = 0; c < Config::columns; ++c)
#pragma unroll
      for (int w = 0; w < Config::rows / 2; ++w) {
        const float2 pair = unpack<bf16>(__float_as_uint(raw[c][w]));
        s[2 * w][c] = pair.x, s[2 * w + 1][c] = pair.y;
      }
  } else if constexpr (Config::ahead) {
#pragma unroll
    for (int j = 0; j < Config::rows; ++j)
#pragma unroll
      for (int w = 0; w < 4; ++w) {
        const float2 pair = unpack<bf16>(__float_as_uint(raw[j][w]));
        s[j][2 * w] = pair.x, s[j][2 * w + 1] = pair.y;
      }
  }
}

template <class Config>
__device__ void store_columns(typename Config::State* to, int64_t stride, const RecurrentState<Config>& s) {
#pragma unroll
  for (int c = 0; c < Config::columns; ++c) {
    typename Config::State* const column = to + c * stride;
    if constexpr (!Config::ahead) {
#pragma unroll
      for (int j = 0; j < Config::rows; j += 4)
        __stcg(reinterpret_cast<float4*>(column + j), make_float4(s[j][c], s[j + 1][c], s[j + 2][c], s[j + 3][c]));
    } else {
      uint32_t words[Config::rows / 2];
#pragma unroll
      for (int w = 0; w < Config::rows / 2; ++w) words[w] = pack<bf16>(s[2 * w][c], s[2 * w + 1][c]);
      if constexpr (Config::rows == 8)
        __stcg(reinterpret_cast<uint4*>(column), make_uint4(words[0], words[1], words[2], words[3]));
      else
        __stcg(reinterpret_cast<uint2*>(column), make_uint2(words[0], words[1]));
    }
  }
}

template <class Config>
__device__ void store_state(typename Config::State* to, int64_t stride, const RecurrentState<Config>& s) {
  if constexpr (Config::v_first) return store_columns<Config>(to, stride, s);
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

// sum over `count` rows from `first` of x[j] s[j][c], as a balanced tree. The shuffles go on with the same tree, so
// that a sum does not depend on how many rows a thread has: a sequence gives the same bits in every batch, whatever
// tiles are chosen.
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
__device__ void reduce_over_rows(const RecurrentShared& shared, const RecurrentThread<Config>& me,
                                 const RecurrentState<Config>& s, const float (&k)[Config::rows],
                                 const float (&q)[Config::rows], int half) {
  const bool has_r = me.lane_group % 2 != 0;
  float sums[Config::columns];
#pragma unroll
  for (int c = 0; c < Config::columns; ++c) {
    const float p = dot_tree<Config::rows>(k, s, c), r = dot_tree<Config::rows>(q, s, c);
    sums[c] = (has_r ? r : p) + __shfl_xor_sync(0xffffffffu, has_r ? p : r,
                                                Config::lanes);  // neighbours give each other what is not in their care
  }
#pragma unroll
  for (int offset = 2 * Config::lanes; offset < 32; offset *= 2)
#pragma unroll
    for (int c = 0; c < Config::columns; ++c) sums[c] += __shfl_xor_sync(0xffffffffu, sums[c], offset);
  if (me.lane_group >= 2) return;
  const int warp = threadIdx.x / 32, warps = blockDim.x / 32;
  float* partial = shared.partial + ((half * warps + warp) * 2 + me.lane_group) * Config::tile;
#pragma unroll
  for (int c = 0; c < Config::columns; c += 4)
    st_shared_v4(partial + slot<Config>(me.c + c), sums[c], sums[c + 1], sums[c + 2], sums[c + 3]);
}

// x[columns] = four or eight of an array in the order of `slot`
template <class Config>
__device__ void load_columns(float (&x)[Config::columns], const float* row, const RecurrentThread<Config>& me) {
#pragma unroll
  for (int c = 0; c < Config::columns; c += 4) {
    const float4 four = *reinterpret_cast<const float4*>(row + slot<Config>(me.c + c));
    x[c] = four.x, x[c + 1] = four.y, x[c + 2] = four.z, x[c + 3] = four.w;
  }
}

// x[columns] = sum over the warps, in their order, of p in even lane groups and of r in odd ones
template <class Config>
__device__ void sum_of_warps(float (&x)[Config::columns], const RecurrentShared& shared,
                             const RecurrentThread<Config>& me, int half) {
  const int warps = blockDim.x / 32;
  const float* partial = shared.partial + (half * warps * 2 + me.lane_group % 2) * Config::tile;
  load_columns<Config>(x, partial, me);
#pragma unroll 16 / Config::columns - 1
  for (int warp = 1; warp < warps; ++warp) {
    float part[Config::columns];
    load_columns<Config>(part, partial + warp * 2 * Config::tile, me);
#pragma unroll
    for (int c = 0; c < Config::columns; ++c) x[c] += part[c];
  }
}

// One token on one slice: token i in shared memory, which is token t. `column`: the slice's first, among those of the
// CTA.
template <class Config>
__device__ void recurrent_token(RecurrentState<Config>& s, const RecurrentArguments& p, const RecurrentShared& shared,
                                const RecurrentPlace& at, const RecurrentThread<Config>& me,
                                const TokenFactors& factors, const TokenGates& gates, int column, int t, int i,
                                int half) {
  constexpr bool commit = Config::mode == RecurrentMode::commit;
  const float* token = shared.qk + i * 2 * p.K + me.i;
  float k[Config::rows], u[Config::columns];
  load_rows(k, token + p.K);
  load_columns<Config>(u, shared.v + i * p.columns + column, me);
  if constexpr (!commit) {
    float q[Config::rows];
    load_rows(q, token);
#pragma unroll
    for (int j = 0; j < Config::rows; ++j) k[j] *= factors.k, q[j] *= factors.q;
    reduce_over_rows<Config>(shared, me, s, k, q, half);
  }
#pragma unroll
  for (int j = 0; j < Config::rows; ++j)
#pragma unroll
    for (int c = 0; c < Config::columns; ++c) s[j][c] *= gates.decay;
  if constexpr (!commit) {
    __syncthreads();
    float x[Config::columns], o[Config::columns];
    sum_of_warps<Config>(x, shared, me, half);
#pragma unroll
    for (int c = 0; c < Config::columns; ++c) {
      const float predicted = __shfl_sync(0xffffffffu, x[c], threadIdx.x % 32 & ~Config::lanes);
      u[c] = gates.beta * fmaf(-gates.decay, predicted, u[c]);                // u = beta (v - e^g p)
      o[c] = p.scale * fmaf(gates.decay, x[c], __fmul_rn(factors.qk, u[c]));  // o = scale (e^g r + <q, k> u)
    }
    if (threadIdx.x / Config::lanes == 1 && (!Config::partial || column + me.c < at.columns<Config>(p))) {
      const int64_t out = ((uint64_t{at.n} * p.T + t) * p.H + at.h) * p.V + at.column + column + me.c;
      store_rounded(p.o, p.o_dtype, out, o);
      if constexpr (Config::mode == RecurrentMode::verify) store_rounded(p.updates, Dtype::f32, out, u);
    }
  }
#pragma unroll
  for (int j = 0; j < Config::rows; ++j)
#pragma unroll
    for (int c = 0; c < Config::columns; ++c) s[j][c] = fmaf(k[j], u[c], s[j][c]);  // S <- e^g S + k u^T
}

// A sequence without a row: zeros.
template <class Config>
__device__ void write_zeros(const RecurrentArguments& p, const RecurrentPlace& at) {
  if constexpr (Config::mode == RecurrentMode::commit) return;
  const float zeros[4] = {};
#pragma unroll 1
  for (int t = 0; t < p.T; ++t) {
    const int64_t token = uint64_t{at.n} * p.T + t, out = (token * p.H + at.h) * p.V + at.column;
#pragma unroll 1
    for (int c = threadIdx.x * 4; c < at.columns<Config>(p); c += blockDim.x * 4) {
      store_rounded(p.o, p.o_dtype, out + c, zeros);
      if constexpr (Config::mode == RecurrentMode::verify) store_rounded(p.updates, Dtype::f32, out + c, zeros);
    }
    if constexpr (Config::mode == RecurrentMode::verify)
      if (writes_keys(p, at) && threadIdx.x < p.K) p.keys[(token * p.Hk + at.hk) * p.K + threadIdx.x] = 0;
  }
}

// Hides from the compiler that x stays as it is: what it would then compute once and keep takes registers that the
// state needs.
__device__ inline void forget(uint32_t& x) { asm volatile("" : "+r"(x)); }

template <class Config>
__global__ void __launch_bounds__(Config::threads_at_a_time)
    recurrent_kernel(const __grid_constant__ RecurrentArguments p) {
  using State = typename Config::State;
  extern __shared__ __align__(16) float memory[];
  const RecurrentShared shared(Config(), memory, p);
  RecurrentPlace at = recurrent_place(p);
  const RecurrentThread<Config> me;
  griddepcontrol_wait();
  int T = p.T;
  if constexpr (Config::mode == RecurrentMode::commit) {
    T = static_cast<int>(min(max(load_index({p.num_accepted, p.num_accepted_type}, at.n), int64_t{0}), int64_t{p.T}));
    if (T == 0) return;
  }
  // On their way at the same time: the first tokens, the row, then the first slice.
  const TokensInFlight<Config, Config::first_tokens> first(p, at, 0, T);
  const int64_t row = load_row(p.pool, at.n);
  const StateStrides& strides = p.pool.strides;
  State* state = static_cast<State*>(p.pool.data) + row * strides.n + at.h * strides.h;
  if constexpr (Config::v_first)
    state += me.i + (at.column + me.c) * strides.v;
  else
    state += me.i * strides.k + at.column + me.c;
  RecurrentState<Config> s;
  RecurrentRaw<Config> ahead;
  RecurrentRaw<Config>& next = place_of_next<Config>(s, ahead);
  const auto load_slice = [&](bool asked) {
    load_state<Config>(next, state, Config::v_first ? strides.v : strides.k, asked);
  };
  // In every slice of a CTA with more than one.
  const bool has_columns = !Config::partial || me.c < at.columns<Config>(p);
  load_slice(row >= 0 && has_columns);
  first.store(p, shared, at, 0, T, 0);
  if (row < 0) return write_zeros<Config>(p, at);
  griddepcontrol_launch_dependents();
  TokenFactors factors;
  const auto tokens_are_there = [&](int t, int begin, int end) {
    __syncthreads();
    if constexpr (Config::mode != RecurrentMode::commit) find_factors<Config>(factors, p, shared, at, t, begin, end);
  };
  tokens_are_there(0, 0, min(T, Config::first_tokens));
  int half = 0;
#pragma unroll 1
  for (int t = 0; t < T; t += p.tokens) {  // more than once only for a CTA of one slice
    const int count = min(p.tokens, T - t), there = t == 0 ? Config::first_tokens : 0;
    if (t > 0) __syncthreads();  // nobody reads the tokens before these any more
    if (there < count) {
#pragma unroll 1
      for (int i = there; i < count; ++i) {
        const TokensInFlight<Config, 1> more(p, at, t + i, 1);
        more.store(p, shared, at, t + i, 1, i);
      }
      tokens_are_there(t, there, count);
    }
    const TokenGates* gates = shared.gates;
#pragma unroll 1
    for (int column = 0; column < p.columns; column += Config::tile) {
      State* const here = state;
      const int following = column + Config::tile;
      const bool next_head = p.width.quotient(following) * p.V == following;
      const auto load_following = [&] {
        if (following >= p.columns) return;
        if constexpr (Config::v_first)
          state += (next_head ? strides.h - p.V * strides.v : 0) + Config::tile * strides.v;
        else
          state += next_head ? strides.h - p.V + Config::tile : Config::tile;
        load_slice(true);
      };
      if (t == 0) unpack_state<Config>(s, next);
      if constexpr (Config::ahead) load_following();
#pragma unroll 1
      for (int i = 0; i < count; ++i, half ^= 1)
        recurrent_token<Config>(s, p, shared, at, me, factors.of_lane(i), gates[i * p.heads], column, t + i, i, half);
      if constexpr (Config::mode != RecurrentMode::verify)
        if (t + count == T && has_columns) store_state<Config>(here, Config::v_first ? strides.v : strides.k, s);
      if constexpr (!Config::ahead) load_following();
      if (next_head) ++gates;
    }
    forget(at.n), forget(at.h), forget(at.hk), forget(at.column);
  }
}

}  // namespace jet::hopper
