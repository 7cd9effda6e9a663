// cp.async.bulk and cp.reduce.async.bulk (one-dimensional), bulk groups, st.async.
#include <algorithm>

#include "async_reduce.h"
#include "races.h"
#include "races_global.h"

namespace hoppersim {
namespace {

enum class Way : uint32_t { global_to_shared, shared_to_shared, shared_to_global, prefetch };
constexpr uint32_t kNoReduction = ~0u;

void check_alignment(const Issue& issue, const char* what, uint64_t value) {
  if (value % 16)
    fault("misaligned bulk copy", issue, std::string(what) + " " + std::to_string(value) + " is not a multiple of 16");
}

std::optional<TensorType> element_type(const Instruction& i) {
  switch (i.type) {
    case Type::f16: return TensorType::f16;
    case Type::bf16: return TensorType::bf16;
    case Type::b32:
    case Type::u32: return TensorType::u32;
    case Type::s32: return TensorType::s32;
    case Type::b64:
    case Type::u64: return TensorType::u64;
    case Type::s64: return TensorType::s64;
    case Type::f32: return TensorType::f32_ftz;  // on global memory this reduction flushes subnormals
    case Type::f64: return TensorType::f64;
    default: return std::nullopt;
  }
}

void load_global(const Issue& issue, const SharedPlace& to, uint32_t barrier, uint64_t from, uint32_t size,
                 uint32_t ctas) {
  Cluster& cluster = *issue.warp->cta->cluster;
  check_global(issue, from, size, false);
  check_global_fence(issue, from, size);
  check_global_load(issue, from, size);
  cluster.counters.bulk_read_bytes += size;
  for (uint32_t rank = 0; rank < cluster.ctas.size(); ++rank) {
    if (!(ctas >> rank & 1)) continue;
    auto load = issue_load(issue, *cluster.ctas[rank], barrier, {{to.offset, size}});
    schedule(*issue.warp, issue.instruction->text, [load, from] { land(*load, reinterpret_cast<const void*>(from)); });
  }
}

void copy_shared(const Issue& issue, const SharedPlace& to, uint32_t barrier, const SharedPlace& from, uint32_t size) {
  const uint32_t reduction = issue.instruction->data[1];
  auto load = issue_load(issue, *to.cta, barrier, {{to.offset, size}},
                         reduction == kNoReduction ? LoadKind::copy : LoadKind::reduction);
  load->source_cta = from.cta;
  load->source = {from.offset, size};
  async_read_shared(*issue.warp, *issue.instruction, *from.cta, from.offset, size, nullptr);
  Mbarrier& mbarrier = to.cta->mbarriers.at(barrier);
  const Completion completion = completion_of(*to.cta, barrier, mbarrier, mbarrier.phase);
  note_async_read(issue, *from.cta, load->source, completion);
  Stamp end;
  end.step = completion.step;
  end.agent = static_cast<uint16_t>(completion.agent);
  from.cta->copied[completion.agent] = {issue.warp, issue.instruction, issue.lane, end};
  hold_source(*from.cta, load->source, 1);
  schedule(*issue.warp, issue.instruction->text, [load, reduction] {
    const Issue& by = load->issue;
    std::vector<uint8_t> data(load->source.size);
    async_read_shared(*by.warp, *by.instruction, *load->source_cta, load->source.offset, load->source.size,
                      data.data());
    if (reduction != kNoReduction) {
      std::vector<uint8_t> old(load->cta->shared.bytes.begin() + load->ranges[0].offset,
                               load->cta->shared.bytes.begin() + load->ranges[0].offset + load->source.size);
      reduce_elements(static_cast<Reduce>(reduction), *element_type(*by.instruction), old.data(), data.data(),
                      data.size());
      data = std::move(old);
    }
    land(*load, data.data());
  });
}

void store_global(const Issue& issue, uint64_t to, const SharedPlace& from, uint32_t size) {
  check_global(issue, to, size, true);
  issue.warp->cta->cluster->counters.bulk_write_bytes += size;
  const uint32_t reduction = issue.instruction->data[1];
  const auto type = element_type(*issue.instruction);
  std::vector<std::pair<uint64_t, uint64_t>> destination;
  if (reduction == kNoReduction) destination.emplace_back(to, size);
  issue_store(issue, *from.cta, {from.offset, size}, {{from.offset, size}}, std::move(destination),
              [=](std::vector<uint8_t>& data) {
                auto* memory = reinterpret_cast<void*>(to);
                if (reduction == kNoReduction) {
                  std::memcpy(memory, data.data(), data.size());
                } else {
                  reduce_elements(static_cast<Reduce>(reduction), *type, memory, data.data(), data.size());
                }
              });
}

SharedPlace place(Warp& warp, const Instruction& i, const Operand& operand, size_t size, int lane) {
  return shared_place(warp, i, address_of(warp, operand, lane), size, Space::shared);
}

void copy_lane(const Issue& issue, Way way) {
  Warp& warp = *issue.warp;
  const Instruction& i = *issue.instruction;
  const auto size = static_cast<uint32_t>(operand_value(warp, i.operands[way == Way::prefetch ? 1 : 2], issue.lane));
  check_alignment(issue, "size", size);
  if (way == Way::prefetch) {
    const uint64_t from = address_of(warp, i.operands[0], issue.lane);
    check_alignment(issue, "global address", from);
    return check_global(issue, from, size, false);
  }
  const uint64_t to = address_of(warp, i.operands[0], issue.lane), from = address_of(warp, i.operands[1], issue.lane);
  check_alignment(issue, "destination", to);
  check_alignment(issue, "source", from);
  if (way == Way::shared_to_global) {
    const SharedPlace source = place(warp, i, i.operands[1], size, issue.lane);
    if (source.cta != warp.cta)
      fault("address of another CTA", issue, "the source of a bulk store is shared memory of its own CTA");
    return store_global(issue, to, source, size);
  }
  const SharedPlace target = place(warp, i, i.operands[0], size, issue.lane);
  const SharedPlace barrier = place(warp, i, i.operands[3], 8, issue.lane);
  if (barrier.cta != target.cta) fault("mbarrier misuse", issue, "the mbarrier is in another CTA than the destination");
  if (i.has("shared::cta") && way == Way::global_to_shared && target.cta != warp.cta)
    fault("address of another CTA", issue, "the destination is shared::cta");
  if (way == Way::shared_to_shared)
    return copy_shared(issue, target, barrier.offset, place(warp, i, i.operands[1], size, issue.lane), size);
  const bool multicast = i.has("multicast::cluster");
  const uint32_t mask = multicast ? static_cast<uint32_t>(operand_value(warp, i.operands[4], issue.lane)) & 0xffff
                                  : 1u << target.cta->rank;
  if (mask >> warp.cta->cluster->ctas.size()) fault("no such CTA", issue, "multicast to a CTA outside of the cluster");
  load_global(issue, target, barrier.offset, from, size, mask);
}

bool copy(Warp& warp, const Instruction& i, uint32_t mask) {
  for (int lane = 0; lane < kLanes; ++lane)
    if (mask >> lane & 1) copy_lane({&warp, &i, lane}, static_cast<Way>(i.data[0]));
  return true;
}

bool commit(Warp& warp, const Instruction&, uint32_t mask) {
  WarpCopies& copies = copies_of(warp);
  for (const auto& store : copies.stores)
    if (store->group < 0 && mask >> store->issue.lane & 1) store->group = copies.bulk_groups[store->issue.lane];
  for (int lane = 0; lane < kLanes; ++lane) copies.bulk_groups[lane] += mask >> lane & 1;
  return true;
}

bool wait(Warp& warp, const Instruction& i, uint32_t mask) {
  WarpCopies& copies = copies_of(warp);
  const bool read = i.data[0];
  const auto allowed = static_cast<int64_t>(i.operands[0].immediate);
  std::vector<std::shared_ptr<Store>> covered;
  for (const auto& store : copies.stores) {
    const int lane = store->issue.lane;
    if (mask >> lane & 1 && store->group >= 0 && store->group < copies.bulk_groups[lane] - allowed)
      covered.push_back(store);
  }
  const auto complete = [covered, read] {
    return std::all_of(covered.begin(), covered.end(),
                       [&](const auto& store) { return read ? store->read : store->written; });
  };
  if (!complete()) {
    warp.waiting_for = "bulk group of " + covered.front()->issue.instruction->text;
    warp.state = Warp::State::waiting;
    warp.can_resume = complete;
    return false;
  }
  for (const auto& store : covered) {
    if (!store->released) {
      hold_source(*store->cta, store->source, -1);
      note_source_read(store->issue, *store->cta, store->source);
    }
    store->released = true;
    if (read) continue;
    for (const auto& [address, size] : store->destination) end_global_store(warp, address, size);
    store->destination.clear();
  }
  std::erase_if(copies.stores,
                [](const auto& store) { return store->released && store->written && store->destination.empty(); });
  return true;
}

// st.async: a remote store that counts its bytes on an mbarrier of the same CTA.
bool store_async(Warp& warp, const Instruction& i, uint32_t mask) {
  const uint32_t element = bits_of(i.type) / 8;
  const Operand& value = i.operands[1];
  const auto parts = static_cast<uint32_t>(std::max<size_t>(1, value.elements.size()));
  for (int lane = 0; lane < kLanes; ++lane) {
    if (!(mask >> lane & 1)) continue;
    const Issue issue{&warp, &i, lane};
    const SharedPlace to = place(warp, i, i.operands[0], element * parts, lane),
                      barrier = place(warp, i, i.operands[2], 8, lane);
    if (barrier.cta != to.cta) fault("mbarrier misuse", issue, "the mbarrier is in another CTA than the destination");
    if (to.offset % (element * parts))
      fault("misaligned shared", issue, "st.async of " + std::to_string(element * parts) + " bytes");
    std::array<uint8_t, 16> data{};
    for (uint32_t p = 0; p < parts; ++p) {
      const uint64_t bits = operand_value(warp, value.elements.empty() ? value : value.elements[p], lane);
      std::memcpy(data.data() + p * element, &bits, element);
    }
    auto load = issue_load(issue, *to.cta, barrier.offset, {{to.offset, element * parts}}, LoadKind::st_async);
    schedule(warp, i.text, [load, data] { land(*load, data.data()); });
  }
  return true;
}

bool bind_copy(Instruction& i, bool reduce) {
  const size_t operands = i.operands.size(), extra = i.has("L2::cache_hint") + i.has("multicast::cluster");
  const bool barrier = i.has("mbarrier::complete_tx::bytes");
  i.data[1] = kNoReduction;
  if (reduce) {
    const auto reduction = reduction_of(i);
    const auto type = element_type(i);
    const bool half = i.type == Type::f16 || i.type == Type::bf16;
    if (!reduction || !type || !reduces(*reduction, *type) || (half && *reduction == Reduce::add) != i.has("noftz"))
      return false;
    if (barrier && i.type >= Type::f16) return false;
    i.data[1] = static_cast<uint32_t>(*reduction);
  }
  if (barrier && operands == 4 + extra) {
    // …shared::cluster.global or …shared::cluster.shared::cta, destination first
    const bool from_shared = i.has("shared::cluster") && i.has("shared::cta");
    if (!from_shared && !i.has("global")) return false;
    if (from_shared && extra) return false;
    if (reduce && !from_shared) return false;
    i.data[0] = static_cast<uint32_t>(from_shared ? Way::shared_to_shared : Way::global_to_shared);
  } else if (i.has("bulk_group") && i.has("global") && i.has("shared::cta") && operands == 3 + extra &&
             !i.has("multicast::cluster")) {
    i.data[0] = static_cast<uint32_t>(Way::shared_to_global);
  } else if (i.has("prefetch") && i.has("L2") && i.has("global") && operands == 2 + extra) {
    i.data[0] = static_cast<uint32_t>(Way::prefetch);
  } else {
    return false;
  }
  i.execute = copy;
  return true;
}

}  // namespace

bool bind_bulk(Instruction& i) {
  if (i.opcode == "st" && !i.modifiers.empty() && i.modifiers[0] == "async" && i.operands.size() == 3) {
    if (!only(i, {"async", "weak", "shared::cluster", "mbarrier::complete_tx::bytes", "v2", "v4", "b32", "u32", "s32",
                  "f32", "b64", "u64", "s64", "f64"}))
      return false;
    i.execute = store_async;
    return true;
  }
  if (i.opcode != "cp" || i.modifiers.size() < 3 || i.has("tensor")) return false;
  const bool reduce = i.modifiers[0] == "reduce";
  if (!only(i, {"reduce",
                "async",
                "bulk",
                "prefetch",
                "L2",
                "commit_group",
                "wait_group",
                "read",
                "shared::cluster",
                "shared::cta",
                "global",
                "bulk_group",
                "mbarrier::complete_tx::bytes",
                "multicast::cluster",
                "L2::cache_hint",
                "add",
                "min",
                "max",
                "inc",
                "dec",
                "and",
                "or",
                "xor",
                "noftz",
                "f16",
                "bf16",
                "b32",
                "u32",
                "s32",
                "b64",
                "u64",
                "s64",
                "f32",
                "f64"}))
    return false;
  if (i.modifiers[reduce ? 2 : 1] != "bulk") return false;
  if (i.has("commit_group") && i.operands.empty()) {
    i.execute = commit;
  } else if (i.has("wait_group") && i.operands.size() == 1 && i.operands[0].kind == Operand::Kind::immediate) {
    i.data[0] = i.has("read");
    i.execute = wait;
  } else {
    return bind_copy(i, reduce);
  }
  return true;
}

}  // namespace hoppersim
