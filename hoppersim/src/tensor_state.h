// Outstanding wgmma operations of a warp (Warp::tensor).
#pragma once

#include <deque>
#include <memory>
#include <vector>

#include "tensor.h"
#include "tensor_float.h"

namespace hoppersim {

constexpr int kWarpgroup = 4;  // warps

// How wgmma.mma_async is decoded into Instruction::data: N, K of the product, both element types, flags.
struct WgmmaShape {
  enum Flag : uint32_t {
    half_accumulator = 1,
    a_in_registers = 2,
    a_mn_major = 4,
    b_mn_major = 8,
    negate = 16,
    integer = 32,
    saturate = 64,
    sparse = 128,
    second_pair = 256  // sparsity selector: lanes 2 and 3 of each four hold the metadata, not 0 and 1
  };
  WgmmaShape() = default;
  explicit WgmmaShape(const Instruction& i)
      : n(i.data[0]),
        k(i.data[1]),
        a(static_cast<Element>(i.data[2] & 15)),
        b(static_cast<Element>(i.data[2] >> 4)),
        flags(i.data[3]) {}
  void put(Instruction& i) const {
    i.data[0] = n;
    i.data[1] = k;
    i.data[2] = static_cast<uint32_t>(a) | static_cast<uint32_t>(b) << 4;
    i.data[3] = flags;
  }
  uint32_t n = 0, k = 0;
  Element a = Element::f16, b = Element::f16;
  uint32_t flags = 0;
  bool has(Flag flag) const { return flags & flag; }
  uint32_t accumulators() const { return has(half_accumulator) ? n / 4 : n / 2; }  // registers per lane
  uint32_t stored_k() const { return has(sparse) ? k / 2 : k; }  // elements of a row of A as it is stored
  uint32_t b_units() const { return has(sparse) ? 4 : 2; }       // 16-byte units of K in a row of K-major B
  // Position of B's descriptor among the operands d, a, b [, metadata, selector], scale-d, …
  static constexpr size_t b_operand = 2, metadata_operand = 3;
  size_t scale_d_operand() const { return has(sparse) ? 5 : 3; }
};

struct TensorOperation {
  const Instruction* instruction = nullptr;  // wgmma.mma_async, or the mov that was absorbed
  uint64_t group = 0;                        // number of the commit that covers it
  bool is_move = false;
  bool accumulate = false;  // scale-d
  uint64_t descriptor_a = 0, descriptor_b = 0;
  std::vector<uint32_t> metadata;  // sparse: the register of each lane, read when the wgmma is issued
  bool done = false;               // accumulators written
  bool released = false;           // operands no longer read
  std::vector<uint32_t> units;     // shared-memory offsets of 16-byte units: those of A (if there), then of B
};

struct TensorState {
  enum InFlight : uint8_t { accumulator = 1, operand = 2 };  // Warp::register_in_flight
  std::deque<TensorOperation> operations;                    // in program order, until this warp has waited for them
  uint64_t committed = 0;                                    // groups
  uint32_t epoch = 1;                                        // 1 + number of wgmma.fence
  std::vector<uint32_t> access_epoch;  // per register: epoch of the last access by an ordinary instruction
  std::vector<uint64_t> last_group;    // per register: group of its last outstanding operation
  std::vector<uint32_t> shape;         // per accumulator in flight: shape and type of the wgmma that writes it
};

TensorState& tensor_state(Warp& warp);

// Multiplies and writes the accumulators of this warp's 16 rows.
void compute_wgmma(Warp& warp, const TensorOperation& operation);

}  // namespace hoppersim
