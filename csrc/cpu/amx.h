// The tile registers of AMX: up to 16 rows of 64 bytes each, and products of two of them in fp32 or int32.
//
//   C += A B     A [16, 32] bf16, rows as they lie in memory   B [32, 16] bf16 as pairs[16][16]: pair k, column n
//                C [16, 16] fp32
//   C += A B     A [16, 64] int8   B [64, 16] int8 as fours[16][16]: four k, column n   C [16, 16] int32
//
// Products in fp32 take and give subnormal numbers as zero. Assembly rather than intrinsics: the code is compiled for
// machines without AMX too, and amx_bf16_is_active() and amx_int8_is_active() (csrc/cpu/isa.h) decide at run time.
#pragma once

#include <utility>

#include "csrc/cpu/isa.h"
#include "csrc/cpu/simd.h"

#if defined(__AVX512F__)

namespace jet::cpu::JET_CPU_ISA {

constexpr long kTileSide = 16;                           // rows of a tile, and columns of C
constexpr long kTileColumns = 32, kTileBytes = 64;       // of bf16 in a row of A
constexpr long kTileNumbers = kTileSide * kTileColumns;  // bf16 in A, or in B
constexpr long kTileSums = kTileSide * kTileSide;        // fp32 in C

// The shapes of the eight tile registers of this thread, all of them whole, from construction to destruction. Between
// them the thread may not leave the loop that multiplies: other libraries load shapes of their own.
class WholeTiles {
 public:
  WholeTiles() {
    struct alignas(64) {
      uint8_t palette = 1, start_row = 0, reserved[14] = {};
      uint16_t row_bytes[16] = {};
      uint8_t rows[16] = {};
    } config;
    static_assert(sizeof(config) == 64);
    for (int tile = 0; tile < 8; ++tile) config.row_bytes[tile] = kTileBytes, config.rows[tile] = kTileSide;
    asm volatile("ldtilecfg %0" : : "m"(config));
  }
  ~WholeTiles() { asm volatile("tilerelease"); }
  WholeTiles(const WholeTiles&) = delete;
  WholeTiles& operator=(const WholeTiles&) = delete;
};

// f(0), .., f(n - 1) with constants: the numbers of tiles are some.
template <int n, class F>
JET_INLINE void for_constants(const F& f) {
  [&]<int... i>(std::integer_sequence<int, i...>) __attribute__((always_inline)) {
    (f(std::integral_constant<int, i>()), ...);
  }(std::make_integer_sequence<int, n>());
}

template <int tile>
JET_INLINE void tile_zero() {
  asm volatile("tilezero %%tmm%c0" : : "i"(tile));
}

// 16 rows of 64 bytes at p, p + stride, ...
template <int tile>
JET_INLINE void tile_load(const void* p, long stride) {
  asm volatile("tileloadd (%1,%2,1), %%tmm%c0" : : "i"(tile), "r"(p), "r"(stride) : "memory");
}

template <int tile>
JET_INLINE void tile_store(void* p, long stride) {
  asm volatile("tilestored %%tmm%c0, (%1,%2,1)" : : "i"(tile), "r"(p), "r"(stride) : "memory");
}

// C += A B
template <int c, int a, int b>
JET_INLINE void tile_multiply_add() {
  asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(c), "i"(a), "i"(b));
}

// C += A B in int32
template <int c, int a, int b>
JET_INLINE void tile_multiply_add_int8() {
  asm volatile("tdpbssd %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(c), "i"(a), "i"(b));
}

}  // namespace jet::cpu::JET_CPU_ISA

#endif
