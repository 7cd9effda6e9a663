// Registers of outstanding wgmma operations: who may touch them, and the wgmma.fence that must precede a wgmma.
//
// A register is dirty when an ordinary instruction has accessed it since the last wgmma.fence; a wgmma that uses a
// dirty register as accumulator, A operand or metadata is a fault. `mov` counts as a renaming of the compiler, not as
// an access: the copy inherits the state of its source, constants are clean. So a zero written straight before the
// wgmma is not reported.
#include <algorithm>

#include "report.h"
#include "tensor_state.h"

namespace hoppersim {
namespace {

template <class Visit>
void for_registers(const Operand& operand, Visit visit) {
  if (operand.kind == Operand::Kind::reg) visit(operand.index);
  for (const Operand& element : operand.elements) for_registers(element, visit);
}

bool is_wgmma(const Instruction& i) { return i.opcode == "wgmma"; }

void report_in_flight(Warp& warp, const Instruction& i, uint32_t index) {
  if (warp.register_in_flight[index] & TensorState::accumulator) {
    return report("accumulator read before wait_group", warp, i,
                  "it touches an accumulator of a wgmma that is not waited for: " + i.text);
  }
  report("wgmma operand register touched before wait_group", warp, i,
         "it touches a register that a wgmma not waited for reads as A or metadata: " + i.text);
}

// Joins `mov d, s` with s an outstanding accumulator to the outstanding operations.
void absorb_move(Warp& warp, TensorState& state, const Instruction& i, uint32_t target, uint32_t source) {
  bool busy = warp.register_in_flight[target];
  TensorOperation move;
  move.instruction = &i;
  move.is_move = true;
  move.group = std::max(state.last_group[source], busy ? state.last_group[target] : 0);
  if (warp.cta->cluster->launch->options.timing == Timing::early) {
    std::copy_n(&warp.registers[source * kLanes], kLanes, &warp.registers[target * kLanes]);
    move.done = true;
  }
  warp.register_in_flight[target] |= TensorState::accumulator;
  state.last_group[target] = move.group;
  state.shape[target] = state.shape[source];
  state.operations.push_back(std::move(move));
}

bool check_move(Warp& warp, TensorState& state, const Instruction& i, uint32_t mask) {
  const Operand &target = i.operands[0], &source = i.operands[1];
  bool plain = target.kind == Operand::Kind::reg && source.kind == Operand::Kind::reg && mask == ~0u;
  if (plain && bits_of(target.type) == 32 && warp.register_in_flight[source.index] & TensorState::accumulator &&
      !(warp.register_in_flight[target.index] & TensorState::operand)) {
    absorb_move(warp, state, i, target.index, source.index);
    return true;
  }
  uint32_t epoch = 0;
  for_registers(source, [&](uint32_t index) {
    if (warp.register_in_flight[index] & TensorState::accumulator) report_in_flight(warp, i, index);
    epoch = std::max(epoch, state.access_epoch[index]);
  });
  for_registers(target, [&](uint32_t index) {
    if (warp.register_in_flight[index]) report_in_flight(warp, i, index);
    state.access_epoch[index] = epoch;
  });
  return false;
}

}  // namespace

void mark_wgmma_registers(Function& function) {
  std::vector<bool> used(function.register_words + 2);
  bool any = false;
  auto add = [&](uint32_t index) { any = used[index] = true; };
  for (const Instruction& i : function.code) {
    if (!is_wgmma(i) || !i.has("mma_async")) continue;
    for_registers(i.operands[0], add);
    if (i.operands[1].kind == Operand::Kind::vector) for_registers(i.operands[1], add);
    if (WgmmaShape(i).has(WgmmaShape::sparse)) for_registers(i.operands[WgmmaShape::metadata_operand], add);
  }
  if (!any) return;
  auto touches = [&](const Instruction& i) {
    bool hit = false;
    for (const Operand& operand : i.operands) for_registers(operand, [&](uint32_t index) { hit = hit || used[index]; });
    return hit;
  };
  for (bool grown = true; grown;) {  // copies of such registers are such registers
    grown = false;
    for (const Instruction& i : function.code) {
      if (i.opcode != "mov" || !touches(i)) continue;
      for (const Operand& operand : i.operands) {
        for_registers(operand, [&](uint32_t index) {
          grown = grown || !used[index];
          used[index] = true;
        });
      }
    }
  }
  for (Instruction& i : function.code) {
    if (!is_wgmma(i) && touches(i)) i.wgmma_registers = i.opcode == "mov" ? 2 : 1;
  }
}

bool check_registers(Warp& warp, const Instruction& i, uint32_t mask) {
  TensorState& state = tensor_state(warp);
  if (i.wgmma_registers == 2) return check_move(warp, state, i, mask);
  for (const Operand& operand : i.operands) {
    for_registers(operand, [&](uint32_t index) {
      if (warp.register_in_flight[index]) report_in_flight(warp, i, index);
      state.access_epoch[index] = state.epoch;
    });
  }
  return false;
}

}  // namespace hoppersim
