// wgmma: warpgroup matrix multiply-accumulate. N is 8, 16, 32, 64, 96, 128, 192 or 256; a file that needs another
// multiple of 8 defines CUTE_SM90_EXTENDED_MMA_SHAPES_ENABLED before its first include, and compiles 5 seconds longer.
// A shape is a type; operands are tiles in shared memory (ss) or A comes in registers (rs).
//   Wgmma<bf16, 96>::ss(s, a.at(0, k), b.at(0, k), accumulate);   // S (+)= A B^T   [64, 96], k16
#pragma once

#include <cute/arch/mma_sm90.hpp>
#ifdef CUTE_SM90_EXTENDED_MMA_SHAPES_ENABLED
#include <cute/arch/mma_sm90_gmma_ext.hpp>
#endif
#include <utility>

#include "csrc/hopper/convert.h"
#include "csrc/hopper/layout.h"

namespace jet::hopper {

// wgmma.commit_group
__device__ inline void wgmma_commit_group() { cute::warpgroup_commit_batch(); }
// wgmma.wait_group: until at most `groups_left` of the newest groups are pending.
template <int groups_left>
__device__ void wgmma_wait_group() {
  cute::warpgroup_wait<groups_left>();
}

// No instruction. After a wait: tells the compiler that the registers have changed, so that it does not read them
// early. Before a fence: that they are read.
template <int registers>
__device__ void wgmma_fence_operand(float (&accumulator)[registers]) {
#pragma unroll
  for (int r = 0; r < registers; ++r) cute::warpgroup_fence_operand(accumulator[r]);
}

// The same for A operands in registers.
template <int n>
__device__ void wgmma_fence_operand(uint32_t (&a)[n][4]) {
#pragma unroll
  for (int i = 0; i < n; ++i) asm volatile("" : "+r"(a[i][0]), "+r"(a[i][1]), "+r"(a[i][2]), "+r"(a[i][3])::"memory");
}

// No instruction: keeps A operands in registers, which a wgmma may read until the wait before this line.
template <int n>
__device__ void wgmma_hold_operand(const uint32_t (&a)[n][4]) {
#pragma unroll
  for (int i = 0; i < n; ++i) asm volatile("" ::"r"(a[i][0]), "r"(a[i][1]), "r"(a[i][2]), "r"(a[i][3]) : "memory");
}

// wgmma.fence.sync.aligned. Registers of a wgmma must not be touched between the fence before the first one that writes
// or reads them and the wait that follows its commit. Those that were computed are named, or the compiler may move the
// arithmetic behind the fence.
template <class... Registers>
__device__ void wgmma_fence(Registers&... computed) {
  (wgmma_fence_operand(computed), ...);
  cute::warpgroup_arrive();
}

// The matrix descriptor of a wgmma operand in shared memory. `Tile_` is an OperandTile.
template <class Tile_>
struct MatrixDescriptor {
  using Tile = Tile_;
  uint64_t descriptor;  // of the whole tile

  __device__ explicit MatrixDescriptor(const void* tile) {  // a shared-memory address, a multiple of kTileAlign
    constexpr DescriptorOffsets offsets = Tile::descriptor_offsets();
    cute::GmmaDescriptor bits;
    bits.bitfield.start_address_ = cute::cast_smem_ptr_to_uint(tile) >> 4;
    bits.bitfield.leading_byte_offset_ = offsets.leading_byte_offset >> 4;
    bits.bitfield.stride_byte_offset_ = offsets.stride_byte_offset >> 4;
    bits.bitfield.base_offset_ = 0;  // tiles are aligned to the swizzle's period
    bits.bitfield.layout_type_ = static_cast<uint8_t>(layout_type);
    descriptor = bits;
  }

  // Descriptor of the part of the operand that begins at (i, l). The address is its lowest field and has room for all
  // of shared memory, so that one addition moves it.
  __device__ uint64_t at(int i, int l) const { return descriptor + (Tile::start(i, l) >> 4); }

 private:
  using Layout = cute::SM90::GMMA::LayoutType;
  static constexpr Layout layout_type = Tile::swizzle == Swizzle::b128  ? Layout::B128
                                        : Tile::swizzle == Swizzle::b64 ? Layout::B64
                                        : Tile::swizzle == Swizzle::b32 ? Layout::B32
                                                                        : Layout::INTERLEAVE;
};

// CUTLASS's name of an element type. fp32 memory is read as tf32 by the tensor cores: the low 13 bits are dropped.
template <class Element>
struct CutlassElement;
template <>
struct CutlassElement<bf16> {
  using type = cute::bfloat16_t;
};
template <>
struct CutlassElement<f16> {
  using type = cute::half_t;
};
template <>
struct CutlassElement<float> {
  using type = cute::tfloat32_t;
};

// wgmma.mma_async.sync.aligned.m64nNkK: D[64, n] (+)= A[64, K] B[n, K]^T, accumulated in fp32.
template <class Element, int n, Major major_a = Major::k, Major major_b = Major::k>
struct Wgmma {
  static constexpr int M = 64, N = n, K = 32 / sizeof(Element);
  static constexpr int registers = M * N / kWarpgroup;
  using Accumulator = float[registers];  // layout.h: accumulator_row, accumulator_column
  using Fragment = uint32_t[4];          // layout.h: a_fragment_row, a_fragment_k

  __device__ static void ss(Accumulator& d, uint64_t a, uint64_t b, bool accumulate) {
    using Op = decltype(cute::SM90::GMMA::ss_op_selector<Type, Type, float, Shape, cute_major_a, cute_major_b>());
    ss_expanded<Op>(d, a, b, accumulate, std::make_integer_sequence<int, registers>());
  }

  __device__ static void rs(Accumulator& d, const Fragment& a, uint64_t b, bool accumulate) {
    static_assert(major_a == Major::k, "a register operand has no memory order");
    using Op = decltype(cute::SM90::GMMA::rs_op_selector<Type, Type, float, Shape, cute_major_a, cute_major_b>());
    rs_expanded<Op>(d, a, b, accumulate, std::make_integer_sequence<int, registers>());
  }

 private:
  using Type = typename CutlassElement<Element>::type;
  using Shape = cute::Shape<cute::Int<M>, cute::Int<N>, cute::Int<K>>;
  using ScaleOut = cute::SM90::GMMA::ScaleOut;
  using CuteMajor = cute::SM90::GMMA::Major;
  static constexpr CuteMajor cute_major_a = major_a == Major::k ? CuteMajor::K : CuteMajor::MN;
  static constexpr CuteMajor cute_major_b = major_b == Major::k ? CuteMajor::K : CuteMajor::MN;
  template <class Op, int... r>
  __device__ static void ss_expanded(Accumulator& d, uint64_t a, uint64_t b, bool accumulate,
                                     std::integer_sequence<int, r...>) {
    static_assert(sizeof(typename Op::CRegisters) == sizeof(Accumulator),
                  "wgmma N must be a multiple of 8, at most 256");
    Op::fma(a, b, d[r]..., accumulate ? ScaleOut::One : ScaleOut::Zero);
  }
  template <class Op, int... r>
  __device__ static void rs_expanded(Accumulator& d, const Fragment& a, uint64_t b, bool accumulate,
                                     std::integer_sequence<int, r...>) {
    static_assert(sizeof(typename Op::CRegisters) == sizeof(Accumulator),
                  "wgmma N must be a multiple of 8, at most 256");
    Op::fma(a[0], a[1], a[2], a[3], b, d[r]..., accumulate ? ScaleOut::One : ScaleOut::Zero);
  }
};

// k16 step `step` of an accumulator's columns, rounded, as an A operand in registers (layout.h proves that they are
// one).
template <class Element, int registers>
__device__ void accumulator_to_a_fragment(uint32_t (&a)[4], const float (&accumulator)[registers], int step) {
#pragma unroll
  for (int i = 0; i < 4; ++i) a[i] = pack<Element>(accumulator[8 * step + 2 * i], accumulator[8 * step + 2 * i + 1]);
}

}  // namespace jet::hopper
