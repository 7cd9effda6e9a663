// setmaxnreg and the pool of registers of a CTA: what its warps start with, moved between them. A warp keeps its
// registers when it ends.
#include <algorithm>

#include "core.h"

namespace hoppersim {

namespace {

constexpr int kWarpgroup = 4;

uint32_t limit_of(const Instruction& i) { return static_cast<uint32_t>(i.operands[0].immediate); }
bool is_release(const Instruction& i) { return i.opcode == "setmaxnreg" && i.has("dec"); }
bool same(const Instruction& a, const Instruction& b) {
  return is_release(a) == is_release(b) && limit_of(a) == limit_of(b);
}

template <class Visit>
void each_of_warpgroup(const Warp& warp, Visit visit) {
  const auto& warps = warp.cta->warps;
  const size_t first = static_cast<size_t>(warp.id / kWarpgroup * kWarpgroup);
  for (size_t w = first; w < std::min(warps.size(), first + kWarpgroup); ++w) visit(*warps[w]);
}

bool whole_warpgroup(const Warp& warp) {
  return warp.id / kWarpgroup * kWarpgroup + kWarpgroup <= static_cast<int>(warp.cta->warps.size());
}

void check_peers(const Warp& warp, const Instruction& i) {
  if (!whole_warpgroup(warp)) return;
  const size_t n = warp.setmaxnreg.size();
  each_of_warpgroup(warp, [&](const Warp& peer) {
    if (peer.setmaxnreg.size() <= n || same(*peer.setmaxnreg[n], i)) return;
    fault("setmaxnreg", warp, i,
          "warp " + std::to_string(peer.id) + " of its warpgroup executed " + peer.setmaxnreg[n]->text +
              " instead (ptx line " + std::to_string(peer.setmaxnreg[n]->line) + ")");
  });
}

// Of a warpgroup that asks for `limit`: what its warps lack.
uint32_t lacking(const Warp& warp, uint32_t limit) {
  uint32_t sum = 0;
  each_of_warpgroup(warp, [&](const Warp& peer) {
    if (peer.alive != 0 && peer.registers_held < limit) sum += limit - peer.registers_held;
  });
  return sum;
}

void hold(Warp& warp, uint32_t limit) {
  warp.cta->free_registers += warp.registers_held;
  warp.cta->free_registers -= limit;
  warp.registers_held = limit;
}

bool execute(Warp& warp, const Instruction& i, uint32_t) {
  const Launch& launch = *warp.cta->cluster->launch;
  const uint32_t limit = limit_of(i);
  const bool down = is_release(i), first = warp.setmaxnreg.empty();
  const uint32_t now = first ? launch.registers : limit_of(*warp.setmaxnreg.back());
  check_peers(warp, i);
  if (down ? limit > now : limit < now && (!first || launch.registers_known))
    fault("setmaxnreg", warp, i, "the warp has " + std::to_string(now) + " registers per thread");
  if (warp.registers_held >= limit) {
    hold(warp, limit);
  } else {
    // The warpgroup takes its registers together, so that two that wait do not keep them from each other.
    if (lacking(warp, limit) > warp.cta->free_registers) {
      warp.waiting_for = std::to_string(limit) + " registers per thread, " + std::to_string(warp.registers_held) +
                         " held; the pool can give " + std::to_string(warp.cta->free_registers / kWarpgroup) +
                         " to a warpgroup";
      warp.can_resume = [&warp, limit] {
        return warp.registers_held >= limit || lacking(warp, limit) <= warp.cta->free_registers;
      };
      return false;
    }
    each_of_warpgroup(warp, [&](Warp& peer) {
      if (peer.alive != 0 && peer.registers_held < limit) hold(peer, limit);
    });
  }
  warp.setmaxnreg.push_back(&i);
  return true;
}

// Whether a setmaxnreg.dec may follow.
bool may_release(const Function& function, uint32_t start) {
  std::vector<bool> seen(function.code.size());
  std::vector<uint32_t> left{start};
  while (!left.empty()) {
    const uint32_t pc = left.back();
    left.pop_back();
    if (pc >= seen.size() || seen[pc]) continue;
    seen[pc] = true;
    const Instruction& i = function.code[pc];
    if (is_release(i)) return true;
    const bool ends = i.opcode == "exit" || i.opcode == "ret" || i.opcode == "trap";
    const bool jumps = i.opcode == "bra" || i.opcode == "brx";
    if (i.opcode == "bra") left.push_back(i.operands[0].index);
    if (i.opcode == "brx")
      for (const Operand& target : i.operands[1].elements) left.push_back(target.index);
    if (i.guard >= 0 || (!ends && !jumps)) left.push_back(pc + 1);
  }
  return false;
}

bool waits_for_registers(const Warp& warp, const Function& function) {
  return std::any_of(warp.groups.begin(), warp.groups.end(), [&](const Group& group) {
    const Instruction& i = function.code[group.pc];
    return group.can_resume && !group.converging && i.opcode == "setmaxnreg";
  });
}

std::string holders(const Cta& cta) {
  std::string text;
  for (const auto& warp : cta.warps) {
    text += (text.empty() ? "warp " : ", warp ") + std::to_string(warp->id) + " " +
            std::to_string(warp->registers_held) + (warp->alive == 0 ? " (ended)" : "");
  }
  return text;
}

}  // namespace

void check_register_pool(const Cluster& cluster, const std::string& report) {
  const Launch& launch = *cluster.launch;
  const Function& function = *launch.function;
  for (const auto& cta : cluster.ctas) {
    const Warp* waiting = nullptr;
    bool release = false;
    for (const auto& warp : cta->warps) {
      if (waits_for_registers(*warp, function)) {
        if (waiting == nullptr) waiting = warp.get();
      } else {
        for (const Group& group : warp->groups) release |= may_release(function, group.pc);
      }
    }
    if (waiting == nullptr || release) continue;
    const Instruction& i = function.code[waiting->groups.front().pc];
    const size_t warps = cta->warps.size();
    fault("setmaxnreg pool exhausted", *waiting, i,
          "its warpgroup lacks " + std::to_string(lacking(*waiting, limit_of(i))) + " registers per thread (of its " +
              "warps together), the pool has " + std::to_string(cta->free_registers) +
              " and nobody can release any more; the CTA started with " + std::to_string(warps) + " warps of " +
              std::to_string(launch.registers) +
              (launch.registers_known ? "" : " (the most that the launch bound allows)") + " registers per thread, " +
              std::to_string(warps * launch.registers) + " together; held now: " + holders(*cta) + "\n" + report);
  }
}

void check_setmaxnreg_exit(const Warp& warp, const Instruction& i) {
  if (!whole_warpgroup(warp)) return;
  each_of_warpgroup(warp, [&](const Warp& peer) {
    if (peer.alive != 0 || peer.setmaxnreg.size() == warp.setmaxnreg.size()) return;
    fault("setmaxnreg", warp, i,
          "it ends after " + std::to_string(warp.setmaxnreg.size()) + " of them and warp " + std::to_string(peer.id) +
              " of its warpgroup after " + std::to_string(peer.setmaxnreg.size()));
  });
}

bool bind_setmaxnreg(Instruction& i) {
  if (i.opcode != "setmaxnreg") return false;
  const uint64_t limit = i.operands.empty() ? 0 : i.operands[0].immediate;
  if (i.operands.size() != 1 || i.operands[0].kind != Operand::Kind::immediate || limit < 24 || limit > 256 ||
      limit % 8 != 0 || !i.aligned || i.has("inc") == i.has("dec")) {
    unsupported(i, "the count must be a multiple of 8 in 24..256");
  }
  i.execute = execute;
  return true;
}

}  // namespace hoppersim
