// Operands of a warp as arrays over its lanes, for the arithmetic and memory instructions.
#pragma once

#include "ptx.h"

namespace hoppersim {

enum class Special : uint32_t {
  tid_x,
  tid_y,
  tid_z,
  ntid_x,
  ntid_y,
  ntid_z,
  ctaid_x,
  ctaid_y,
  ctaid_z,
  nctaid_x,
  nctaid_y,
  nctaid_z,
  laneid,
  warpid,
  nwarpid,
  clusterid_x,
  clusterid_y,
  clusterid_z,
  nclusterid_x,
  nclusterid_y,
  nclusterid_z,
  cluster_ctaid_x,
  cluster_ctaid_y,
  cluster_ctaid_z,
  cluster_nctaid_x,
  cluster_nctaid_y,
  cluster_nctaid_z,
  cluster_ctarank,
  cluster_nctarank,
  is_explicit_cluster,
  smid,
  nsmid,
  gridid,
  clock,
  clock_hi,
  clock64,
  globaltimer,
  globaltimer_lo,
  globaltimer_hi,
  lanemask_eq,
  lanemask_le,
  lanemask_lt,
  lanemask_ge,
  lanemask_gt,
  dynamic_smem_size,
  total_smem_size,
  aggr_smem_size,
  reserved_smem_offset_begin,
  reserved_smem_offset_end,
  reserved_smem_offset_cap,
  reserved_smem_offset_0,
  reserved_smem_offset_1,
  envreg1,
  envreg2,
  warp_size,
  count
};
// The id of "%tid.x" and the like, or -1.
int special_id(const std::string& name);
uint64_t special_value(const Warp& warp, Special id, int lane);

using Execute = bool (*)(Warp&, const Instruction&, uint32_t);

constexpr uint32_t kAll = 0xffffffffu;

template <class T>
T from_bits(uint64_t bits) {
  T value;
  std::memcpy(&value, &bits, sizeof(T));
  return value;
}
template <class T>
uint64_t to_bits(T value) {
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  return bits;
}

// The 32 values of an operand. A register narrower than T is zero-extended, a wider one truncated.
template <class T>
inline void load(const Warp& warp, const Operand& operand, T* values) {
  if (operand.kind == Operand::Kind::reg) {
    const uint32_t* words = &warp.registers[size_t(operand.index) * kLanes];
    if (bits_of(operand.type) <= 32) {
      if constexpr (sizeof(T) == 4) {
        std::memcpy(values, words, sizeof(T) * kLanes);
      } else {
        for (int lane = 0; lane < kLanes; ++lane) values[lane] = from_bits<T>(words[lane]);
      }
    } else {
      if constexpr (sizeof(T) == 8) {
        std::memcpy(values, words, sizeof(T) * kLanes);
      } else {
        for (int lane = 0; lane < kLanes; ++lane) values[lane] = from_bits<T>(words[2 * lane]);
      }
    }
    return;
  }
  if (operand.kind == Operand::Kind::immediate) {
    T value = from_bits<T>(operand.immediate);
    if constexpr (std::is_same_v<T, double>) {
      if (operand.type == Type::f32) value = from_bits<float>(operand.immediate);
    }
    if constexpr (std::is_same_v<T, float>) {
      if (operand.type == Type::f64) value = static_cast<float>(from_bits<double>(operand.immediate));
    }
    for (int lane = 0; lane < kLanes; ++lane) values[lane] = value;
    return;
  }
  for (int lane = 0; lane < kLanes; ++lane) values[lane] = from_bits<T>(operand_value(warp, operand, lane));
}

// Writes the lanes of `mask`. A register wider than T is sign- or zero-extended by T's signedness.
template <class T>
inline void store(Warp& warp, const Operand& operand, const T* values, uint32_t mask) {
  if (operand.kind != Operand::Kind::reg) return;  // sink
  uint32_t* words = &warp.registers[size_t(operand.index) * kLanes];
  if (bits_of(operand.type) <= 32) {
    if constexpr (sizeof(T) == 4) {
      if (mask == kAll) {
        std::memcpy(words, values, sizeof(T) * kLanes);
        return;
      }
    }
    const uint32_t keep = bits_of(operand.type) == 32 ? kAll : (1u << bits_of(operand.type)) - 1;
    for (int lane = 0; lane < kLanes; ++lane) {
      uint32_t bits;
      if constexpr (std::is_integral_v<T>) {
        bits = static_cast<uint32_t>(values[lane]);
      } else {
        bits = static_cast<uint32_t>(to_bits(values[lane]));
      }
      if (mask >> lane & 1) words[lane] = bits & keep;
    }
    return;
  }
  for (int lane = 0; lane < kLanes; ++lane) {
    uint64_t bits;
    if constexpr (std::is_integral_v<T>) {
      bits = static_cast<uint64_t>(values[lane]);
    } else {
      bits = to_bits(values[lane]);
    }
    if (mask >> lane & 1) std::memcpy(words + 2 * lane, &bits, 8);
  }
}

// Waits until every lane of `members` that is alive is at this instruction. True when that is so.
bool converged(Warp& warp, const Instruction& instruction, uint32_t members, uint32_t mask);

[[noreturn]] void unsupported(const Instruction& instruction, const std::string& why = "");

// Nothing can run: throws if that is because a setmaxnreg.inc waits for registers that nobody can release any more.
void check_register_pool(const Cluster& cluster, const std::string& report);

// Each family binds its own instructions; false: not mine.
bool bind_integer(Instruction& instruction);
bool bind_bits(Instruction& instruction);
bool bind_float(Instruction& instruction);
bool bind_half(Instruction& instruction);
bool bind_convert(Instruction& instruction);
bool bind_compare(Instruction& instruction);
bool bind_move(Instruction& instruction);
bool bind_memory(Instruction& instruction);
bool bind_atomic(Instruction& instruction);
bool bind_control(Instruction& instruction);
bool bind_setmaxnreg(Instruction& instruction);
void check_setmaxnreg_exit(const Warp& warp, const Instruction& instruction);
bool bind_barrier(Instruction& instruction);
bool bind_warp(Instruction& instruction);

}  // namespace hoppersim
