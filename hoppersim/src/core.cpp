// Binding of the core's instructions, operand values, special registers, counter classes.
#include "core.h"

#include <algorithm>

#include "ptx_parser.h"

namespace hoppersim {

namespace {

const char* const kSpecials[] = {"%tid.x",
                                 "%tid.y",
                                 "%tid.z",
                                 "%ntid.x",
                                 "%ntid.y",
                                 "%ntid.z",
                                 "%ctaid.x",
                                 "%ctaid.y",
                                 "%ctaid.z",
                                 "%nctaid.x",
                                 "%nctaid.y",
                                 "%nctaid.z",
                                 "%laneid",
                                 "%warpid",
                                 "%nwarpid",
                                 "%clusterid.x",
                                 "%clusterid.y",
                                 "%clusterid.z",
                                 "%nclusterid.x",
                                 "%nclusterid.y",
                                 "%nclusterid.z",
                                 "%cluster_ctaid.x",
                                 "%cluster_ctaid.y",
                                 "%cluster_ctaid.z",
                                 "%cluster_nctaid.x",
                                 "%cluster_nctaid.y",
                                 "%cluster_nctaid.z",
                                 "%cluster_ctarank",
                                 "%cluster_nctarank",
                                 "%is_explicit_cluster",
                                 "%smid",
                                 "%nsmid",
                                 "%gridid",
                                 "%clock",
                                 "%clock_hi",
                                 "%clock64",
                                 "%globaltimer",
                                 "%globaltimer_lo",
                                 "%globaltimer_hi",
                                 "%lanemask_eq",
                                 "%lanemask_le",
                                 "%lanemask_lt",
                                 "%lanemask_ge",
                                 "%lanemask_gt",
                                 "%dynamic_smem_size",
                                 "%total_smem_size",
                                 "%aggr_smem_size",
                                 "%reserved_smem_offset_begin",
                                 "%reserved_smem_offset_end",
                                 "%reserved_smem_offset_cap",
                                 "%reserved_smem_offset_0",
                                 "%reserved_smem_offset_1",
                                 "%envreg1",
                                 "%envreg2",
                                 "WARP_SZ"};
static_assert(std::size(kSpecials) == size_t(Special::count));

uint32_t pick(const Dim3& d, int axis) { return axis == 0 ? d.x : axis == 1 ? d.y : d.z; }

std::string class_of(const Instruction& i) {
  static const char* const spaces[] = {"global", "shared", "shared::cta", "shared::cluster", "local", "param", "const"};
  const std::string& o = i.opcode;
  if (o == "ld" || o == "st" || o == "atom" || o == "red") {
    for (const char* space : spaces) {
      if (i.has(space)) return o + "." + std::string(space).substr(0, std::string(space).find(':'));
    }
    return o + ".generic";
  }
  if (o == "cp") {
    std::string name = "cp.async";
    if (i.has("bulk")) name += ".bulk";
    if (i.has("tensor")) name += ".tensor";
    for (const char* control : {"commit_group", "wait_group", "wait_all"}) {
      if (i.has(control)) name += std::string(".") + control;
    }
    return name;
  }
  if (o == "wgmma" || o == "mbarrier" || o == "fence") return i.modifiers.empty() ? o : o + "." + i.modifiers[0];
  if (o == "bra" || o == "brx" || o == "ret" || o == "exit") return "control";
  if (o == "bar" || o == "barrier") return i.has("warp") ? "bar.warp" : i.has("cluster") ? "barrier.cluster" : "bar";
  const bool floating = i.type >= Type::f16;
  if (o == "fma" || (o == "mad" && floating)) return "fma";
  if (o == "ex2" || o == "lg2" || o == "rcp" || o == "rsqrt" || o == "sqrt" || o == "sin" || o == "cos" || o == "tanh")
    return "special";
  if (o == "cvt") return "cvt";
  if (o == "add" || o == "sub" || o == "mul" || o == "div") return floating ? "float" : "alu";
  static const char* const own[] = {"mma",       "wmma",           "ldmatrix",  "stmatrix", "shfl", "vote",
                                    "match",     "redux",          "elect",     "membar",   "mapa", "setmaxnreg",
                                    "tensormap", "griddepcontrol", "nanosleep", "prefetch"};
  for (const char* name : own) {
    if (o == name) return o;
  }
  return "alu";
}

// Leniently: any access that may take part in a synchronisation on its address.
bool synchronises(const Instruction& i) {
  if (i.opcode == "atom" || i.opcode == "red") return true;
  if (i.opcode != "ld" && i.opcode != "st") return false;
  for (const char* m : {"volatile", "relaxed", "acquire", "release", "mmio"}) {
    if (i.has(m)) return true;
  }
  return false;
}

uint16_t class_index(const std::string& name) {
  std::vector<std::string>& names = counter_class_names();
  const size_t index = static_cast<size_t>(std::find(names.begin(), names.end(), name) - names.begin());
  if (index == names.size()) names.push_back(name);
  return static_cast<uint16_t>(index);
}

}  // namespace

std::vector<std::string>& counter_class_names() {
  static std::vector<std::string> names;
  return names;
}

// What a warp that waits for others in a loop does not do: it loads, tests, sleeps, computes, and tries to take a lock
// with an atomic.
bool class_progresses(const std::string& name) {
  static const char* const first[] = {"st.",  "red.",     "cp.",       "mbarrier.", "wgmma.", "mma",
                                      "wmma", "stmatrix", "tensormap", "bar",       "barrier"};
  static const char* const looks[] = {"bar.warp", "mbarrier.test_wait", "mbarrier.try_wait", "mbarrier.pending_count"};
  if (std::find(std::begin(looks), std::end(looks), name) != std::end(looks)) return false;
  return std::any_of(std::begin(first), std::end(first), [&](const char* text) { return name.rfind(text, 0) == 0; });
}

int special_id(const std::string& name) {
  if (name == "%tid" || name == "%ntid") return -1;
  for (size_t i = 0; i < std::size(kSpecials); ++i) {
    if (name == kSpecials[i]) return static_cast<int>(i);
  }
  return -1;
}

uint64_t special_value(const Warp& warp, Special id, int lane) {
  const Cta& cta = *warp.cta;
  const Cluster& cluster = *cta.cluster;
  const Launch& launch = *cluster.launch;
  const uint32_t lane_bit = 1u << lane;
  auto axis = [&](Special first) { return static_cast<int>(id) - static_cast<int>(first); };
  if (id <= Special::tid_z) return warp.tid[axis(Special::tid_x)][lane];
  if (id <= Special::ntid_z) return pick(launch.block, axis(Special::ntid_x));
  if (id <= Special::ctaid_z) return cta.ctaid[axis(Special::ctaid_x)];
  if (id <= Special::nctaid_z) return pick(launch.grid, axis(Special::nctaid_x));
  if (id >= Special::clusterid_x && id <= Special::clusterid_z) {
    return cta.ctaid[axis(Special::clusterid_x)] / pick(launch.cluster, axis(Special::clusterid_x));
  }
  if (id >= Special::nclusterid_x && id <= Special::nclusterid_z) {
    return pick(launch.grid, axis(Special::nclusterid_x)) / pick(launch.cluster, axis(Special::nclusterid_x));
  }
  if (id >= Special::cluster_ctaid_x && id <= Special::cluster_ctaid_z) {
    return cta.ctaid[axis(Special::cluster_ctaid_x)] % pick(launch.cluster, axis(Special::cluster_ctaid_x));
  }
  if (id >= Special::cluster_nctaid_x && id <= Special::cluster_nctaid_z)
    return pick(launch.cluster, axis(Special::cluster_nctaid_x));
  switch (id) {
    case Special::laneid: return lane;
    case Special::warpid: return warp.id;
    case Special::nwarpid: return cta.warps.size();
    case Special::cluster_ctarank: return cta.rank;
    case Special::cluster_nctarank: return cluster.ctas.size();
    case Special::is_explicit_cluster: return launch.function->cluster_x != 0 || cluster.ctas.size() > 1;
    case Special::smid:
      return (cta.ctaid[0] + cta.ctaid[1] * launch.grid.x + cta.ctaid[2] * launch.grid.x * launch.grid.y) % 132;
    case Special::nsmid: return 132;
    case Special::clock:
    case Special::globaltimer_lo: return static_cast<uint32_t>(cluster.executed);
    case Special::clock_hi:
    case Special::globaltimer_hi: return cluster.executed >> 32;
    case Special::clock64:
    case Special::globaltimer: return cluster.executed;
    case Special::lanemask_eq: return lane_bit;
    case Special::lanemask_le: return lane_bit | (lane_bit - 1);
    case Special::lanemask_lt: return lane_bit - 1;
    case Special::lanemask_ge: return ~(lane_bit - 1);
    case Special::lanemask_gt: return ~(lane_bit | (lane_bit - 1));
    case Special::dynamic_smem_size: return launch.dynamic_shared;
    case Special::total_smem_size: return cta.shared.bytes.size() - kSharedBase;
    case Special::aggr_smem_size: return cta.shared.bytes.size();
    case Special::reserved_smem_offset_begin: return 0;
    case Special::reserved_smem_offset_end:
    case Special::reserved_smem_offset_cap: return kSharedBase;
    case Special::reserved_smem_offset_0:
    case Special::reserved_smem_offset_1: return kReservedForKernels;
    // what cooperative groups take a grid's barrier from
    case Special::envreg1: return launch.grid_workspace >> 32;
    case Special::envreg2: return static_cast<uint32_t>(launch.grid_workspace);
    case Special::warp_size: return kLanes;
    default: return 0;  // gridid
  }
}

// Shared symbols lie in the window of the CTA.
static uint64_t symbol_value(const Warp& warp, const Operand& operand) {
  if (operand.space == Space::shared) return operand.immediate + uint64_t(warp.cta->rank) * kRankStride;
  return operand.immediate;
}

uint64_t operand_value(const Warp& warp, const Operand& operand, int lane) {
  switch (operand.kind) {
    case Operand::Kind::reg: {
      const uint32_t* words = &warp.registers[size_t(operand.index) * kLanes];
      if (bits_of(operand.type) <= 32) return words[lane];
      uint64_t bits;
      std::memcpy(&bits, words + 2 * lane, 8);
      return bits;
    }
    case Operand::Kind::predicate: return (warp.predicates[operand.index] >> lane & 1) ^ (operand.negated ? 1 : 0);
    case Operand::Kind::immediate: return operand.immediate;
    case Operand::Kind::symbol: return symbol_value(warp, operand);
    case Operand::Kind::special: return special_value(warp, static_cast<Special>(operand.index), lane);
    case Operand::Kind::address: return address_of(warp, operand, lane);
    default: throw Fault("ptx syntax", "operand " + operand.name + " has no value");
  }
}

uint64_t address_of(const Warp& warp, const Operand& address, int lane) {
  if (address.base < 0) return symbol_value(warp, address);
  return operand_value(warp, address.elements[address.base], lane) + address.immediate;
}

void addresses_of(const Warp& warp, const Operand& address, uint64_t* addresses) {
  if (address.base < 0) {
    std::fill_n(addresses, kLanes, symbol_value(warp, address));
    return;
  }
  load(warp, address.elements[address.base], addresses);
  for (int lane = 0; lane < kLanes; ++lane) addresses[lane] += address.immediate;
}

void set_register(Warp& warp, const Operand& reg, int lane, uint64_t bits) {
  if (reg.kind == Operand::Kind::predicate) {
    uint32_t& mask = warp.predicates[reg.index];
    mask = (mask & ~(1u << lane)) | static_cast<uint32_t>(bits & 1) << lane;
    return;
  }
  if (reg.kind != Operand::Kind::reg) return;
  uint32_t* words = &warp.registers[size_t(reg.index) * kLanes];
  const int width = bits_of(reg.type);
  if (width <= 32) {
    words[lane] = static_cast<uint32_t>(width == 32 ? bits : bits & ((1u << width) - 1));
  } else {
    std::memcpy(words + 2 * lane, &bits, 8);
  }
}

uint32_t predicate_mask(const Warp& warp, const Operand& predicate) {
  if (predicate.kind == Operand::Kind::predicate)
    return warp.predicates[predicate.index] ^ (predicate.negated ? kAll : 0);
  if (predicate.kind == Operand::Kind::immediate) return (predicate.immediate != 0) != predicate.negated ? kAll : 0;
  throw Fault("ptx syntax", "operand " + predicate.name + " is no predicate");
}

void unsupported(const Instruction& i, const std::string& why) {
  throw Fault("unsupported instruction",
              "line " + std::to_string(i.line) + ": " + i.text + (why.empty() ? "" : " (" + why + ")"));
}

bool bind_core(Instruction& i) {
  return bind_move(i) || bind_memory(i) || bind_control(i) || bind_setmaxnreg(i) || bind_integer(i) || bind_bits(i) ||
         bind_float(i) || bind_half(i) || bind_compare(i) || bind_convert(i) || bind_atomic(i) || bind_barrier(i) ||
         bind_warp(i);
}

void PtxParser::emit(Instruction&& i) {
  i.aligned = i.has("aligned") || (i.opcode == "bar" && !i.has("warp"));
  if (!bind_core(i) && !bind_async(i) && !bind_tensor(i)) {
    line_ = i.line;
    not_modelled(i.text);
  }
  i.counter_class = class_index(class_of(i));
  i.pc = static_cast<uint32_t>(function_->code.size());
  i.strong = synchronises(i);
  i.read_only = i.opcode == "ld" && i.has("nc");
  function_->loads_read_only |= i.read_only;
  function_->stores_bulk |= i.opcode == "cp" && i.has("bulk_group");
  i.acquires = i.strong && (i.has("acquire") || i.has("acq_rel"));
  i.releases = i.strong && (i.has("release") || i.has("acq_rel"));
  function_->polls |= i.strong && !i.acquires && !i.releases;
  function_->loads_bulk |= i.opcode == "cp" && i.has("mbarrier::complete_tx::bytes") && i.has("global");
  i.source = source_;
  function_->code.push_back(std::move(i));
}

}  // namespace hoppersim
