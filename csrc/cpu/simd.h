// The registers of one instruction set: vectors of numbers, what one step of a product multiplies, and transposes.
#pragma once

#include <cstdint>

#define JET_INLINE inline __attribute__((always_inline))
#define JET_INLINE_LAMBDA __attribute__((always_inline))  // behind its parameters

namespace jet::cpu::JET_CPU_ISA {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64, kRegisters = 32;
#elif defined(__AVX__)
constexpr int kVectorBytes = 32, kRegisters = 16;
#elif defined(__aarch64__)
constexpr int kVectorBytes = 16, kRegisters = 32;
#else
constexpr int kVectorBytes = 16, kRegisters = 16;
#endif

// Tile shape: rows x vectors accumulators + one row of B + one broadcast of A fill the register file
// (6 x 4 + 4 + 1 of 32 registers, 6 x 2 + 2 + 1 of 16), and rows x vectors >= 8 hides the FMA latency.
constexpr int kTileRows = 6, kTileVectors = kRegisters / 8;
constexpr int kAccumulators = kTileRows * kTileVectors;

template <class T>
struct Simd {
  static constexpr int lanes = kVectorBytes / int(sizeof(T));
  static constexpr int stripe = lanes * kTileVectors;  // columns of a full tile
  typedef T Vec __attribute__((vector_size(kVectorBytes)));
  typedef T Unaligned __attribute__((vector_size(kVectorBytes), aligned(sizeof(T)), may_alias));

  static JET_INLINE Vec load(const T* p) { return *reinterpret_cast<const Unaligned*>(p); }
  static JET_INLINE void store(T* p, Vec v) { *reinterpret_cast<Unaligned*>(p) = v; }
  static JET_INLINE Vec all(T x) { return x - Vec{}; }
};

template <class T>
using Vector = typename Simd<T>::Vec;
using Floats = Vector<float>;
using Ints = Vector<int32_t>;
using Words = Vector<uint32_t>;

constexpr long smaller(long a, long b) { return a < b ? a : b; }
constexpr long larger(long a, long b) { return a > b ? a : b; }
constexpr long round_up(long n, long unit) { return (n + unit - 1) / unit * unit; }

template <class T>
JET_INLINE T horizontal_sum(Vector<T> x) {
  T sum = 0;
#pragma GCC unroll 16
  for (int i = 0; i < Simd<T>::lanes; ++i) sum += x[i];
  return sum;
}

// c + a b
template <class V>
JET_INLINE V multiply_add(V a, V b, V c) {
  return c + a * b;
}

#if defined(__AVX512F__)
// The instructions of AVX512-BF16 take and give subnormal numbers as zero. Assembly rather than intrinsics: the code is
// compiled for machines without them too, and has_bf16_instructions() decides at run time.
inline bool has_bf16_instructions() { return __builtin_cpu_supports("avx512bf16"); }

// c + a0 b0 + a1 b1 in fp32 for the pairs of bf16 in each word
JET_INLINE Floats multiply_add(Words a, Words b, Floats c) {
  asm("vdpbf16ps %2, %1, %0" : "+v"(c) : "v"(a), "v"(b));
  return c;
}
#endif

// x(i, j) <- x(j, i): log2(L) perfect shuffles rotate the bits of the L x L element index by log2(L).
template <class V, int L>
JET_INLINE void transpose_in_registers(V (&x)[L]) {
  typedef decltype(V{} < V{}) Index;
  Index low{}, high{};  // interleave the halves of a pair of vectors: a0 b0 a1 b1 ..
#pragma GCC unroll 16
  for (int i = 0; i < L; ++i) {
    low[i] = i / 2 + (i % 2) * L;
    high[i] = low[i] + L / 2;
  }
#pragma GCC unroll 4
  for (int stage = 1; stage < L; stage *= 2) {
    V y[L];
#pragma GCC unroll 16
    for (int r = 0; r < L / 2; ++r) {
      y[2 * r] = __builtin_shuffle(x[r], x[r + L / 2], low);
      y[2 * r + 1] = __builtin_shuffle(x[r], x[r + L / 2], high);
    }
#pragma GCC unroll 16
    for (int r = 0; r < L; ++r) x[r] = y[r];
  }
}

}  // namespace jet::cpu::JET_CPU_ISA
