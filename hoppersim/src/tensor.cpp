// wgmma: decoding, issue, groups and waiting.
//
// The four warps of a warpgroup issue on their own and each computes its own rows, but they finish together: wait_group
// holds a warp until all four have issued the groups it waits for, as the hardware does (it cannot multiply before). So
// one thread may, after its own wait_group, hand the operand buffers of all four warps back to the copy engine.
//
// Timing::early computes at issue, Timing::late at the first wait_group that covers the operation. In both,
// accumulators, A and metadata registers stay in flight until the warp's own wait, and operand units stay marked as
// being read (Granule::async_readers) until the first warp's wait. Proxy fences and initialisation of operands are
// checked at issue.
#include "tensor.h"

#include <algorithm>
#include <cstdio>
#include <stdexcept>

#include "races.h"
#include "report.h"
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

// ---- Registers at issue
void require_fence(const Warp& warp, const Instruction& i, const TensorState& state, uint32_t index, bool& reported) {
  if (!reported && (state.epoch == 1 || state.access_epoch[index] == state.epoch)) {
    reported = true;
    report("missing wgmma.fence", warp, i, "one of its registers was accessed after the last wgmma.fence: " + i.text);
  }
}

void take_registers(Warp& warp, const Instruction& i, TensorState& state) {
  uint64_t group = state.committed + 1;
  WgmmaShape shape(i);
  bool reported = false;
  // What decides the layout of the accumulators, and the type of the product.
  uint32_t key = shape.n << 16 | i.data[2] << 8 |
                 (shape.flags & (WgmmaShape::half_accumulator | WgmmaShape::integer | WgmmaShape::sparse));
  for (const Operand& d : i.operands[0].elements) {
    require_fence(warp, i, state, d.index, reported);
    uint8_t flags = warp.register_in_flight[d.index];
    if (flags & TensorState::operand) {
      report("wgmma operand register touched before wait_group", warp, i,
             "it accumulates into a register that is read as an operand: " + i.text);
    }
    if (flags && state.shape[d.index] != key) {
      report("accumulator read before wait_group", warp, i,
             "a wgmma of another shape or type has it in flight: " + i.text);
    }
    warp.register_in_flight[d.index] = TensorState::accumulator;
    state.shape[d.index] = key;
    state.last_group[d.index] = group;
  }
  auto take_operand = [&](const Operand& operand) {
    require_fence(warp, i, state, operand.index, reported);
    if (warp.register_in_flight[operand.index] & TensorState::accumulator) {
      report("accumulator read before wait_group", warp, i,
             "it reads an accumulator in flight as an operand: " + i.text);
    }
    warp.register_in_flight[operand.index] |= TensorState::operand;
    state.last_group[operand.index] = group;
  };
  if (shape.has(WgmmaShape::a_in_registers)) {
    for (const Operand& a : i.operands[1].elements) take_operand(a);
  }
  if (shape.has(WgmmaShape::sparse)) take_operand(i.operands[WgmmaShape::metadata_operand]);
}

// ---- Operands in shared memory at issue
MatrixDescriptor descriptor_of(const Warp& warp, const Instruction& i, uint64_t bits, const char* name) {
  const MatrixDescriptor descriptor(bits);
  if (!descriptor.aligned())
    fault("misaligned matrix descriptor", warp, i,
          std::string(name) + " starts at shared address " + hex(descriptor.start) + "; with a swizzle of " +
              std::to_string(16 << descriptor.swizzle) + " bytes its tiles of 8 rows start at multiples of " +
              std::to_string(128 << descriptor.swizzle) + ", or have a base offset");
  return descriptor;
}

void list_units(const Warp& warp, const Instruction& i, TensorOperation& operation) {
  WgmmaShape shape(i);
  try {
    if (!shape.has(WgmmaShape::a_in_registers)) {
      const MatrixDescriptor a = descriptor_of(warp, i, operation.descriptor_a, "A");
      int first = warp.id % kWarpgroup * 16;
      if (shape.has(WgmmaShape::a_mn_major)) {
        a.units_mn_major(first, 16, shape.stored_k(), operation.units);
      } else {
        a.units_k_major(first, 16, 2, operation.units);
      }
    }
    const MatrixDescriptor b = descriptor_of(warp, i, operation.descriptor_b, "B");
    if (shape.has(WgmmaShape::b_mn_major)) {
      b.units_mn_major(0, shape.n, shape.k, operation.units);
    } else {
      b.units_k_major(0, shape.n, shape.b_units(), operation.units);
    }
  } catch (const std::invalid_argument& error) {
    fault("unsupported instruction", warp, i, std::string(error.what()) + ": " + i.text);
  }
}

// Wavefronts of the operand reads, by this model: a core matrix (8 rows or columns of 16 bytes) is one. Every layout
// that a descriptor can name spreads them over all banks. Each warp reads its rows of A; B is read once per warpgroup.
void count_operands(Warp& warp, const WgmmaShape& shape, size_t units) {
  const size_t of_a = shape.has(WgmmaShape::a_in_registers) ? 0 : 16 * 32 / 16;  // 16 rows of 32 bytes
  warp.cta->cluster->counters.wgmma_wavefronts += (warp.id % kWarpgroup ? of_a : units) / 8;
}

void begin_reading(Warp& warp, const Instruction& i, const TensorOperation& operation) {
  const Issue issue{&warp, &i, -1};
  const Completion completion{warpgroup_agent(warp), static_cast<uint32_t>(operation.group)};
  for (uint32_t offset : operation.units) {
    async_read_shared(warp, i, *warp.cta, offset, 16, nullptr);
    note_async_read(issue, *warp.cta, {offset, 16}, completion);
    ++warp.cta->shared.granules[offset / 16].async_readers;
  }
}

// ---- Completion
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
    bool equal =
        std::equal(issued[0].begin(), issued[0].end(), issued[w].begin(), issued[w].end(), [](auto* a, auto* b) {
          return a->instruction == b->instruction && a->accumulate == b->accumulate &&
                 a->descriptor_a == b->descriptor_a && a->descriptor_b == b->descriptor_b;
        });
    if (!equal) {
      fault("wgmma differs within the warpgroup", warp, i,
            "warp " + std::to_string(peer(warp, w).id) + " issued other operations, descriptors or scale-d than warp " +
                std::to_string(peer(warp, 0).id));
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
    if (WgmmaShape(*operation.instruction).has(WgmmaShape::sparse)) release(o[WgmmaShape::metadata_operand]);
  }
  operations.erase(
      std::remove_if(operations.begin(), operations.end(), [&](const auto& x) { return x.group <= target; }),
      operations.end());
}

// What the four warps have released by their commits.
Clock& group_clock(const Warp& warp) {
  const Cluster& cluster = *warp.cta->cluster;
  return cluster.order->warpgroups[warpgroup_agent(warp) - cluster.ctas.size() * warp.cta->warps.size()];
}

// ---- Execution
bool execute_fence(Warp& warp, const Instruction& i, uint32_t mask) {
  require_converged(warp, i, mask);
  ++tensor_state(warp).epoch;
  return true;
}

bool execute_commit(Warp& warp, const Instruction& i, uint32_t mask) {
  require_converged(warp, i, mask);
  ++tensor_state(warp).committed;
  release(group_clock(warp), warp, mask);
  ++warp.step;
  return true;
}

bool execute_wait(Warp& warp, const Instruction& i, uint32_t mask) {
  require_converged(warp, i, mask);
  TensorState& state = tensor_state(warp);
  if (state.committed <= i.data[0]) return true;
  uint64_t target = state.committed - i.data[0];
  bool outstanding =
      std::any_of(state.operations.begin(), state.operations.end(), [&](const auto& o) { return o.group <= target; });
  if (!outstanding) return true;
  auto issued = [&warp, target] {
    for (int w = 0; w < kWarpgroup; ++w) {
      if (tensor_state(peer(warp, w)).committed < target) return false;
    }
    return true;
  };
  if (!issued()) {
    warp.state = Warp::State::waiting;
    warp.waiting_for =
        "wgmma.wait_group: the other warps of the warpgroup have not issued group " + std::to_string(target);
    warp.can_resume = issued;
    return false;
  }
  compare_with_peers(warp, i, target);
  for (int w = 0; w < kWarpgroup; ++w) complete(peer(warp, w), target);
  acquire(warp, group_clock(warp), mask);
  Known& reads = warp.clock[warpgroup_agent(warp)];
  reads.all = std::max(reads.all, static_cast<uint32_t>(target));
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
  operation.descriptor_b = uniform_b64(warp, i, i.operands[WgmmaShape::b_operand]);
  operation.accumulate = uniform_predicate(warp, i, i.operands[shape.scale_d_operand()]);
  if (shape.has(WgmmaShape::sparse)) {
    const uint32_t* words = &warp.registers[i.operands[WgmmaShape::metadata_operand].index * kLanes];
    operation.metadata.assign(words, words + kLanes);
  }
  take_registers(warp, i, state);
  list_units(warp, i, operation);
  begin_reading(warp, i, operation);
  count_operands(warp, shape, operation.units.size());
  if (warp.cta->cluster->launch->options.timing == Timing::early) {
    compute_wgmma(warp, operation);
    operation.done = true;
  }
  state.operations.push_back(std::move(operation));
  warp.cta->cluster->counters.tensor_flop += 2ull * 16 * shape.n * shape.k;
  return true;
}

// ---- Decoding
bool product_types(const std::string& d, Element a, Element b) {
  if (is_integer(a)) return d == "s32" && bits_of(a) == 8 && is_integer(b) && bits_of(b) == 8;
  if (is_fp8(a)) return (d == "f32" || d == "f16") && is_fp8(b);
  if (a != b || bits_of(a) > 32) return false;
  return d == "f32" || (d == "f16" && a == Element::f16);
}

// [sp], sync, aligned, shape, D, A, B in this order and nothing else but satfinite, before D (PTX) or at the end
// (CUTLASS).
bool decode_types(std::vector<std::string> m, WgmmaShape& shape) {
  unsigned rows = 0, n = 0, k = 0;
  if (m.size() > 1 && m[1] == "sp") {
    shape.flags |= WgmmaShape::sparse;
    m.erase(m.begin() + 1);
  }
  if (const auto saturate = std::find(m.begin(), m.end(), "satfinite");
      saturate != m.end() && (saturate == m.begin() + 4 || saturate == m.end() - 1)) {
    shape.flags |= WgmmaShape::saturate;
    m.erase(saturate);
  }
  if (m.size() != 7 || m[1] != "sync" || m[2] != "aligned") return false;
  if (std::sscanf(m[3].c_str(), "m%un%uk%u", &rows, &n, &k) != 3) return false;
  if (rows != 64 || n < 8 || n > 256 || n % 8 != 0) return false;
  const auto a = element_named(m[5]), b = element_named(m[6]);
  if (!a || !b || !product_types(m[4], *a, *b)) return false;
  shape.n = n;
  shape.k = k;
  shape.a = *a;
  shape.b = *b;
  if (m[4] == "f16") shape.flags |= WgmmaShape::half_accumulator;
  if (is_integer(*a)) {
    shape.flags |= WgmmaShape::integer;
    if (n > 32 && n % 16 != 0) return false;
  } else if (shape.has(WgmmaShape::saturate)) {
    return false;
  }
  return shape.stored_k() * bits_of(*a) == 32 * 8;  // an instruction reads 32 bytes of each row of A
}

bool immediate(const Operand& operand, int64_t allowed0, int64_t allowed1, bool& second) {
  if (operand.kind != Operand::Kind::immediate) return false;
  int32_t value = static_cast<int32_t>(operand.immediate);
  second = value == allowed1;
  return value == allowed0 || second;
}

// metadata register, selector: which lanes of each four hold it. All four do for 8-bit types.
bool decode_sparsity(const std::vector<Operand>& o, WgmmaShape& shape) {
  bool second = false;
  if (o.size() < 6 || o[WgmmaShape::metadata_operand].kind != Operand::Kind::reg ||
      bits_of(o[WgmmaShape::metadata_operand].type) != 32)
    return false;
  if (!immediate(o[4], 0, 1, second) || (second && bits_of(shape.a) == 8)) return false;
  if (second) shape.flags |= WgmmaShape::second_pair;
  return true;
}

// d, a | a-desc, b-desc [, metadata, selector], scale-d [, imm-scale-a, imm-scale-b: floating types
// [, imm-trans-a of a descriptor, imm-trans-b: 16-bit types]]
bool decode_operands(const std::vector<Operand>& o, WgmmaShape& shape) {
  const size_t scale_d = shape.scale_d_operand(), scales = scale_d + 1;
  if (o.size() <= scale_d || o[0].kind != Operand::Kind::vector || o[0].elements.size() != shape.accumulators())
    return false;
  bool in_registers = o[1].kind == Operand::Kind::vector;
  if (in_registers && o[1].elements.size() != 4) return false;
  if (shape.has(WgmmaShape::sparse) && !decode_sparsity(o, shape)) return false;
  if (o[scale_d].kind != Operand::Kind::predicate && o[scale_d].kind != Operand::Kind::immediate) return false;
  if (in_registers) shape.flags |= WgmmaShape::a_in_registers;
  if (shape.has(WgmmaShape::integer)) return o.size() == scales;
  size_t transposes = bits_of(shape.a) != 16 ? 0 : in_registers ? 1 : 2;
  if (o.size() != scales + 2 + transposes) return false;
  bool negate_a = false, negate_b = false, a_mn_major = false, b_mn_major = false;
  if (!immediate(o[scales], 1, -1, negate_a) || !immediate(o[scales + 1], 1, -1, negate_b)) return false;
  if (transposes == 2 && !immediate(o[scales + 2], 0, 1, a_mn_major)) return false;
  if (transposes >= 1 && !immediate(o[scales + 1 + transposes], 0, 1, b_mn_major)) return false;
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
    WgmmaShape shape;
    if (!decode_types(i.modifiers, shape) || !decode_operands(i.operands, shape)) return false;
    shape.put(i);
    i.execute = execute_mma_async;
  }
  return i.execute != nullptr;
}

}  // namespace

void check_wgmma_exit(const Warp& warp, const Instruction& i) {
  if (!warp.tensor) return;
  size_t outstanding = static_cast<const TensorState*>(warp.tensor.get())->operations.size();
  if (outstanding) {
    report("exit with wgmma in flight", warp, i,
           std::to_string(outstanding) + " operations were not waited for with wgmma.wait_group");
  }
}

bool bind_tensor(Instruction& i) {
  if (i.opcode == "wgmma") return bind_wgmma(i);
  return bind_mma(i) || bind_matrix_move(i) || bind_wmma(i);
}

}  // namespace hoppersim
