// wgmma: decoding, issue, groups and waiting.
//
// The four warps of a warpgroup issue on their own and each computes its own rows, but they finish together: wait_group
// holds a warp until all four have issued the groups it waits for, as the hardware does (it cannot multiply before). So one
// thread may, after its own wait_group, hand the operand buffers of all four warps back to the copy engine.
//
// Timing::early computes at issue, Timing::late at the first wait_group that covers the operation. In both, accumulators and
// A registers stay in flight until the warp's own wait, and operand units stay marked as being read (Granule::async_readers)
// until the first warp's wait. Proxy fences and initialisation of operands are checked at issue.
#include "tensor.h"

#include <algorithm>
#include <cstdio>
#include <stdexcept>

#include "tensor_float.h"
#include "tensor_state.h"

namespace hoppersim {

TensorState& tensor_state(Warp& warp) {
  if (!warp.tensor) {
    auto state = std::make_shared<TensorState>();
    size_t registers = warp.registers.size() / kLanes;
    state->access_epoch.resize(registers);
    state->last_group.resize(registers);
    state->shape.resize(registers);
    if (warp.register_in_flight.size() < registers) warp.register_in_flight.resize(registers);
    warp.tensor = std::move(state);
  }
  return *static_cast<TensorState*>(warp.tensor.get());
}

namespace {

void require_converged(const Warp& warp, const Instruction& i, uint32_t mask) {
  if (mask != ~0u) fault("divergent aligned instruction", warp, i, "all 32 lanes must execute it together: " + i.text);
  if (warp.id / kWarpgroup * kWarpgroup + kWarpgroup > static_cast<int>(warp.cta->warps.size())) {
    fault("incomplete warpgroup", warp, i, "wgmma needs four warps, the first with a rank that is a multiple of 4");
  }
}

Warp& peer(Warp& warp, int w) { return *warp.cta->warps[warp.id / kWarpgroup * kWarpgroup + w]; }

uint64_t uniform_b64(const Warp& warp, const Instruction& i, const Operand& operand) {
  if (operand.kind == Operand::Kind::immediate) return operand.immediate;
  const uint32_t* words = &warp.registers[operand.index * kLanes];
  uint64_t first;
  std::memcpy(&first, words, 8);
  for (int lane = 1; lane < kLanes; ++lane) {
    if (std::memcmp(words, words + 2 * lane, 8) != 0) {
      fault("matrix descriptor differs between lanes", warp, i, i.text, lane);
    }
  }
  return first;
}

bool uniform_predicate(const Warp& warp, const Instruction& i, const Operand& operand) {
  if (operand.kind == Operand::Kind::immediate) return operand.immediate != 0;
  uint32_t mask = warp.predicates[operand.index];
  if (operand.negated) mask = ~mask;
  if (mask != 0 && mask != ~0u) fault("scale-d differs between lanes", warp, i, i.text);
  return mask != 0;
}

// ---- Registers at issue -----------------------------------------------------------------------------------------------
void require_fence(const Warp& warp, const Instruction& i, const TensorState& state, uint32_t index) {
  if (state.epoch == 1 || state.access_epoch[index] == state.epoch) {
    fault("missing wgmma.fence", warp, i, "one of its registers was accessed after the last wgmma.fence: " + i.text);
  }
}

void take_registers(Warp& warp, const Instruction& i, TensorState& state) {
  uint64_t group = state.committed + 1;
  WgmmaShape shape(i);
  uint32_t key = shape.n << 8 | shape.element << 4 | (shape.flags & WgmmaShape::half_accumulator);
  for (const Operand& d : i.operands[0].elements) {
    require_fence(warp, i, state, d.index);
    uint8_t flags = warp.register_in_flight[d.index];
    if (flags & TensorState::operand) {
      fault("wgmma operand register touched before wait_group", warp, i, "it accumulates into a register that is read as A: " + i.text);
    }
    if (flags && state.shape[d.index] != key) {
      fault("accumulator read before wait_group", warp, i, "a wgmma of another shape or type has it in flight: " + i.text);
    }
    warp.register_in_flight[d.index] = TensorState::accumulator;
    state.shape[d.index] = key;
    state.last_group[d.index] = group;
  }
  if (!shape.has(WgmmaShape::a_in_registers)) return;
  for (const Operand& a : i.operands[1].elements) {
    require_fence(warp, i, state, a.index);
    if (warp.register_in_flight[a.index] & TensorState::accumulator) {
      fault("accumulator read before wait_group", warp, i, "it reads an accumulator in flight as A: " + i.text);
    }
    warp.register_in_flight[a.index] |= TensorState::operand;
    state.last_group[a.index] = group;
  }
}

// ---- Operands in shared memory at issue ----------------------------------------------------------------------------------
void list_units(const Warp& warp, const Instruction& i, TensorOperation& operation) {
  WgmmaShape shape(i);
  try {
    if (!shape.has(WgmmaShape::a_in_registers)) {
      MatrixDescriptor a(operation.descriptor_a);
      int first = warp.id % kWarpgroup * 16;
      if (shape.has(WgmmaShape::a_mn_major)) {
        a.units_mn_major(first, 16, shape.k, operation.units);
      } else {
        a.units_k_major(first, 16, operation.units);
      }
    }
    MatrixDescriptor b(operation.descriptor_b);
    if (shape.has(WgmmaShape::b_mn_major)) {
      b.units_mn_major(0, shape.n, shape.k, operation.units);
    } else {
      b.units_k_major(0, shape.n, operation.units);
    }
  } catch (const std::invalid_argument& error) {
    fault("unsupported instruction", warp, i, std::string(error.what()) + ": " + i.text);
  }
}

void begin_reading(Warp& warp, const Instruction& i, const TensorOperation& operation) {
  uint8_t unit[16];
  for (uint32_t offset : operation.units) {
    async_read_shared(warp, i, *warp.cta, offset, 16, unit);
    ++warp.cta->shared.granules[offset / 16].async_readers;
  }
}

// ---- Completion --------------------------------------------------------------------------------------------------------
void complete(Warp& warp, uint64_t target) {
  for (TensorOperation& operation : tensor_state(warp).operations) {
    if (operation.group > target) continue;
    if (!operation.done) {
      if (operation.is_move) {
        const std::vector<Operand>& o = operation.instruction->operands;
        std::copy_n(&warp.registers[o[1].index * kLanes], kLanes, &warp.registers[o[0].index * kLanes]);
      } else {
        compute_wgmma(warp, operation);
      }
      operation.done = true;
    }
    if (!operation.released) {
      for (uint32_t offset : operation.units) --warp.cta->shared.granules[offset / 16].async_readers;
      operation.released = true;
    }
  }
}

// The warps of a warpgroup must have issued the same instructions with the same descriptors.
void compare_with_peers(Warp& warp, const Instruction& i, uint64_t target) {
  std::vector<const TensorOperation*> issued[kWarpgroup];
  for (int w = 0; w < kWarpgroup; ++w) {
    for (const TensorOperation& operation : tensor_state(peer(warp, w)).operations) {
      if (operation.group <= target && !operation.is_move && !operation.released) issued[w].push_back(&operation);
    }
  }
  for (int w = 1; w < kWarpgroup; ++w) {
    bool equal = std::equal(issued[0].begin(), issued[0].end(), issued[w].begin(), issued[w].end(), [](auto* a, auto* b) {
      return a->instruction == b->instruction && a->accumulate == b->accumulate && a->descriptor_a == b->descriptor_a &&
             a->descriptor_b == b->descriptor_b;
    });
    if (!equal) {
      fault("wgmma differs within the warpgroup", warp, i,
            "warp " + std::to_string(peer(warp, w).id) + " issued other operations, descriptors or scale-d than warp " + std::to_string(peer(warp, 0).id));
    }
  }
}

// Forgets the operations that this warp has now waited for.
void retire(Warp& warp, TensorState& state, uint64_t target) {
  auto release = [&](const Operand& operand) {
    if (state.last_group[operand.index] <= target) warp.register_in_flight[operand.index] = 0;
  };
  auto& operations = state.operations;
  for (const TensorOperation& operation : operations) {
    if (operation.group > target) continue;
    const std::vector<Operand>& o = operation.instruction->operands;
    if (operation.is_move) {
      release(o[0]);
      continue;
    }
    for (const Operand& d : o[0].elements) release(d);
    for (const Operand& a : o[1].elements) release(a);
  }
  operations.erase(std::remove_if(operations.begin(), operations.end(), [&](const auto& x) { return x.group <= target; }), operations.end());
}

// ---- Execution ---------------------------------------------------------------------------------------------------------
bool execute_fence(Warp& warp, const Instruction& i, uint32_t mask) {
  require_converged(warp, i, mask);
  ++tensor_state(warp).epoch;
  return true;
}

bool execute_commit(Warp& warp, const Instruction& i, uint32_t mask) {
  require_converged(warp, i, mask);
  ++tensor_state(warp).committed;
  return true;
}

bool execute_wait(Warp& warp, const Instruction& i, uint32_t mask) {
  require_converged(warp, i, mask);
  TensorState& state = tensor_state(warp);
  if (state.committed <= i.data[0]) return true;
  uint64_t target = state.committed - i.data[0];
  bool outstanding = std::any_of(state.operations.begin(), state.operations.end(), [&](const auto& o) { return o.group <= target; });
  if (!outstanding) return true;
  auto issued = [&warp, target] {
    for (int w = 0; w < kWarpgroup; ++w) {
      if (tensor_state(peer(warp, w)).committed < target) return false;
    }
    return true;
  };
  if (!issued()) {
    warp.state = Warp::State::waiting;
    warp.waiting_for = "wgmma.wait_group: the other warps of the warpgroup have not issued group " + std::to_string(target);
    warp.can_resume = issued;
    return false;
  }
  compare_with_peers(warp, i, target);
  for (int w = 0; w < kWarpgroup; ++w) complete(peer(warp, w), target);
  retire(warp, state, target);
  return true;
}

bool execute_mma_async(Warp& warp, const Instruction& i, uint32_t mask) {
  require_converged(warp, i, mask);
  TensorState& state = tensor_state(warp);
  WgmmaShape shape(i);
  TensorOperation operation;
  operation.instruction = &i;
  operation.group = state.committed + 1;
  if (!shape.has(WgmmaShape::a_in_registers)) operation.descriptor_a = uniform_b64(warp, i, i.operands[1]);
  operation.descriptor_b = uniform_b64(warp, i, i.operands[2]);
  operation.accumulate = uniform_predicate(warp, i, i.operands[3]);
  take_registers(warp, i, state);
  list_units(warp, i, operation);
  begin_reading(warp, i, operation);
  if (warp.cta->cluster->launch->options.timing == Timing::early) {
    compute_wgmma(warp, operation);
    operation.done = true;
  }
  state.operations.push_back(std::move(operation));
  warp.cta->cluster->counters.tensor_flop += 2ull * 16 * shape.n * shape.k;
  return true;
}

// ---- Decoding ------------------------------------------------------------------------------------------------------------
// sync, aligned, shape, D, A, B in this order and nothing else.
bool decode_types(const std::vector<std::string>& m, WgmmaShape& shape) {
  unsigned rows = 0, n = 0, k = 0;
  if (m.size() != 7 || m[1] != "sync" || m[2] != "aligned") return false;
  if (std::sscanf(m[3].c_str(), "m%un%uk%u", &rows, &n, &k) != 3) return false;
  if (rows != 64 || n < 8 || n > 256 || n % 8 != 0 || m[5] != m[6]) return false;
  if (m[4] != "f32" && !(m[4] == "f16" && m[5] == "f16")) return false;
  shape.n = n;
  shape.k = k;
  if (m[4] == "f16") shape.flags |= WgmmaShape::half_accumulator;
  if (m[5] == "tf32") {
    shape.element = static_cast<uint32_t>(Element::tf32);
    return k == 8;
  }
  if (m[5] != "f16" && m[5] != "bf16") return false;
  shape.element = static_cast<uint32_t>(m[5] == "f16" ? Element::f16 : Element::bf16);
  return k == 16;
}

bool immediate(const Operand& operand, int64_t allowed0, int64_t allowed1, bool& second) {
  if (operand.kind != Operand::Kind::immediate) return false;
  int32_t value = static_cast<int32_t>(operand.immediate);
  second = value == allowed1;
  return value == allowed0 || second;
}

// d, a | a-desc, b-desc, scale-d, imm-scale-a, imm-scale-b [, imm-trans-a of a descriptor, imm-trans-b: 16-bit types]
bool decode_operands(const std::vector<Operand>& o, WgmmaShape& shape) {
  if (o.size() < 6 || o[0].kind != Operand::Kind::vector || o[0].elements.size() != shape.accumulators()) return false;
  bool in_registers = o[1].kind == Operand::Kind::vector;
  if (in_registers && o[1].elements.size() != 4) return false;
  if (o[3].kind != Operand::Kind::predicate && o[3].kind != Operand::Kind::immediate) return false;
  size_t transposes = static_cast<Element>(shape.element) == Element::tf32 ? 0 : in_registers ? 1 : 2;
  if (o.size() != 6 + transposes) return false;
  bool negate_a = false, negate_b = false, a_mn_major = false, b_mn_major = false;
  if (!immediate(o[4], 1, -1, negate_a) || !immediate(o[5], 1, -1, negate_b)) return false;
  if (transposes == 2 && !immediate(o[6], 0, 1, a_mn_major)) return false;
  if (transposes >= 1 && !immediate(o[5 + transposes], 0, 1, b_mn_major)) return false;
  if (in_registers) shape.flags |= WgmmaShape::a_in_registers;
  if (a_mn_major) shape.flags |= WgmmaShape::a_mn_major;
  if (b_mn_major) shape.flags |= WgmmaShape::b_mn_major;
  if (negate_a != negate_b) shape.flags |= WgmmaShape::negate;
  return true;
}

bool bind_wgmma(Instruction& i) {
  if (i.modifiers.empty() || !i.has("sync") || !i.has("aligned")) return false;
  const std::string& what = i.modifiers[0];
  if (what == "fence") {
    i.execute = execute_fence;
  } else if (what == "commit_group") {
    i.execute = execute_commit;
  } else if (what == "wait_group") {
    if (i.operands.size() != 1 || i.operands[0].kind != Operand::Kind::immediate) return false;
    i.data[0] = static_cast<uint32_t>(i.operands[0].immediate);
    i.execute = execute_wait;
  } else if (what == "mma_async") {
    WgmmaShape shape(0, 0, 0, 0);
    if (!decode_types(i.modifiers, shape) || !decode_operands(i.operands, shape)) return false;
    i.data[0] = shape.n;
    i.data[1] = shape.k;
    i.data[2] = shape.element;
    i.data[3] = shape.flags;
    i.execute = execute_mma_async;
  }
  return i.execute != nullptr;
}

}  // namespace

void check_wgmma_exit(const Warp& warp, const Instruction& i) {
  if (!warp.tensor) return;
  size_t outstanding = static_cast<const TensorState*>(warp.tensor.get())->operations.size();
  if (outstanding) {
    fault("exit with wgmma in flight", warp, i, std::to_string(outstanding) + " operations were not waited for with wgmma.wait_group");
  }
}

bool bind_tensor(Instruction& i) {
  if (i.opcode == "wgmma") return bind_wgmma(i);
  return bind_mma(i) || bind_matrix_move(i);
}

}  // namespace hoppersim
