// bra, brx, ret, exit, trap, calls of external functions, nanosleep.
#include "async.h"
#include "core.h"
#include "tensor.h"

namespace hoppersim {

namespace {

// Sends the lanes of `taken` to `target`; the others of the group go on.
void go(Warp& warp, uint32_t target, uint32_t taken) {
  Group& group = *warp.current;
  if (taken == group.mask) {
    group.pc = target;
    return;
  }
  group.mask &= ~taken;
  warp.groups.push_back({target, taken});
  warp.since_merge = 0;
}

bool branch(Warp& warp, const Instruction& i, uint32_t mask) {
  go(warp, i.operands[0].index, mask);
  return true;
}

bool branch_indexed(Warp& warp, const Instruction& i, uint32_t mask) {
  uint32_t index[kLanes];
  load(warp, i.operands[0], index);
  const std::vector<Operand>& targets = i.operands[1].elements;
  while (mask != 0) {
    const uint32_t chosen = index[__builtin_ctz(mask)];
    if (chosen >= targets.size())
      fault("branch index out of range", warp, i, std::to_string(chosen) + " of " + std::to_string(targets.size()));
    uint32_t same = 0;
    for (int lane = 0; lane < kLanes; ++lane) same |= uint32_t((mask >> lane & 1) && index[lane] == chosen) << lane;
    go(warp, targets[chosen].index, same);
    mask &= ~same;
  }
  return true;
}

bool leave(Warp& warp, const Instruction& i, uint32_t mask) {
  warp.alive &= ~mask;
  warp.current->mask &= ~mask;
  if (warp.alive == 0) {
    check_wgmma_exit(warp, i);
    check_setmaxnreg_exit(warp, i);
  }
  return true;
}

bool trap(Warp& warp, const Instruction& i, uint32_t mask) {
  fault("trap", warp, i, "the kernel stopped itself", __builtin_ctz(mask));
}

bool external_call(Warp& warp, const Instruction& i, uint32_t mask) {
  const bool assertion = i.text.find("__assertfail") != std::string::npos;
  fault(assertion ? "device assertion" : "unsupported instruction", warp, i,
        assertion ? "an assertion of the kernel failed" : "calls a function without a body", __builtin_ctz(mask));
}

bool nothing(Warp&, const Instruction&, uint32_t) { return true; }

}  // namespace

bool bind_control(Instruction& i) {
  if (i.opcode == "bra") {
    if (i.operands.size() != 1) unsupported(i);
    i.execute = branch;
  } else if (i.opcode == "brx") {
    if (i.operands.size() != 2 || i.operands[1].kind != Operand::Kind::vector) unsupported(i);
    i.execute = branch_indexed;
  } else if (i.opcode == "exit" || i.opcode == "ret") {
    i.execute = leave;
  } else if (i.opcode == "trap" || i.opcode == "brkpt") {
    i.execute = trap;
  } else if (i.opcode == "call") {
    i.execute = external_call;
  } else if (i.opcode == "nanosleep" || i.opcode == "pmevent") {
    i.execute = nothing;
  } else {
    return false;
  }
  return true;
}

}  // namespace hoppersim
