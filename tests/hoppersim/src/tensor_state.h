// Outstanding wgmma operations of a warp (Warp::tensor).
#pragma once

#include <deque>
#include <memory>
#include <vector>

#include "tensor.h"

namespace hoppersim {

constexpr int kWarpgroup = 4;  // warps

// How wgmma.mma_async is decoded into Instruction::data.
struct WgmmaShape {
  enum Flag : uint32_t { half_accumulator = 1, a_in_registers = 2, a_mn_major = 4, b_mn_major = 8, negate = 16 };
  explicit WgmmaShape(const Instruction& i) : n(i.data[0]), k(i.data[1]), element(i.data[2]), flags(i.data[3]) {}
  WgmmaShape(uint32_t n, uint32_t k, uint32_t element, uint32_t flags) : n(n), k(k), element(element), flags(flags) {}
  uint32_t n, k, element, flags;
  bool has(Flag flag) const { return flags & flag; }
  uint32_t accumulators() const { return has(half_accumulator) ? n / 4 : n / 2; }  // registers per lane
};

struct TensorOperation {
  const Instruction* instruction = nullptr;  // wgmma.mma_async, or the mov that was absorbed
  uint64_t group = 0;                        // number of the commit that covers it
  bool is_move = false;
  bool accumulate = false;                   // scale-d
  uint64_t descriptor_a = 0, descriptor_b = 0;
  bool done = false;                         // accumulators written
  bool released = false;                     // operands no longer read
  std::vector<uint32_t> units;               // shared-memory offsets of 16-byte units: those of A (if there), then of B
};

struct TensorState {
  enum InFlight : uint8_t { accumulator = 1, operand = 2 };  // Warp::register_in_flight
  std::deque<TensorOperation> operations;    // in program order, until this warp has waited for them
  uint64_t committed = 0;                    // groups
  uint32_t epoch = 1;                        // 1 + number of wgmma.fence
  std::vector<uint32_t> access_epoch;        // per register: epoch of the last access by an ordinary instruction
  std::vector<uint64_t> last_group;          // per register: group of its last outstanding operation
  std::vector<uint32_t> shape;               // per accumulator in flight: shape and type of the wgmma that writes it
};

TensorState& tensor_state(Warp& warp);

// Multiplies and writes the accumulators of this warp's 16 rows.
void compute_wgmma(Warp& warp, const TensorOperation& operation);

}  // namespace hoppersim
