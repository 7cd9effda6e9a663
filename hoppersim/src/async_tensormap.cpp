// tensormap.replace, tensormap.cp_fenceproxy, fence.proxy.tensormap::generic: maps that a kernel modifies.
#include "core.h"
#include "tensor_map.h"
#include "tensor_map_proxy.h"

namespace hoppersim {
namespace {

constexpr uint32_t kMapBytes = 128;
enum class Field : uint32_t { global_address, rank, global_dim, global_stride };

struct MapBytes {
  alignas(16) uint8_t bytes[kMapBytes];
};

MapBytes load_map(const Issue& issue, Space space, uint64_t address) {
  if (address % kMapBytes)
    fault("misaligned", issue, "the tensor map at " + std::to_string(address) + " is not aligned to 128 bytes");
  MapBytes map;
  for (uint32_t part = 0; part < kMapBytes; part += 16)
    read_memory(*issue.warp, *issue.instruction, space, address + part, 16, map.bytes + part, issue.lane);
  return map;
}

void store_map(const Issue& issue, Space space, uint64_t address, const MapBytes& map) {
  for (uint32_t part = 0; part < kMapBytes; part += 16)
    write_memory(*issue.warp, *issue.instruction, space, address + part, 16, map.bytes + part, issue.lane);
}

// Whether a field may have this value, whatever the others are; the rest is checked when a copy uses the map.
const char* problem(Field field, uint64_t value) {
  switch (field) {
    case Field::global_address: return value % 16 ? "the tensor's address must be a multiple of 16" : nullptr;
    case Field::rank: return value >= kTensorRank ? "the new rank, less one, must be in 0 … 4" : nullptr;
    case Field::global_stride:
      return value % 16 || value >> 40 ? "a stride must be a multiple of 16 below 2^40" : nullptr;
    default: return nullptr;
  }
}

bool replace(Warp& warp, const Instruction& i, uint32_t mask) {
  const auto field = static_cast<Field>(i.data[0]);
  const auto space = static_cast<Space>(i.data[2]);
  for (int lane = 0; lane < kLanes; ++lane) {
    if (!(mask >> lane & 1)) continue;
    const Issue issue{&warp, &i, lane};
    const uint64_t address = address_of(warp, i.operands[0], lane),
                   value = operand_value(warp, i.operands.back(), lane);
    MapBytes bytes = load_map(issue, space, address);
    TensorMap map;
    std::memcpy(&map, bytes.bytes, sizeof map);
    if (map.magic != kTensorMapMagic) fault("invalid tensor map", issue, "no tensor map at this address");
    if (map.mode != TensorMode::tile) fault("invalid tensor map", issue, "it was made for im2col mode");
    if (const char* why = problem(field, value)) fault("invalid tensor map", issue, why);
    switch (field) {
      case Field::global_address: map.address = value; break;
      case Field::rank: map.rank = static_cast<uint8_t>(value + 1); break;
      case Field::global_dim: map.extent[i.data[1]] = static_cast<uint32_t>(value); break;
      case Field::global_stride: map.stride[i.data[1]] = value; break;
    }
    std::memcpy(bytes.bytes, &map, sizeof map);
    store_map(issue, space, address, bytes);
  }
  return true;
}

// One copy for the warp, and the release of the map in global memory.
bool copy_and_release(Warp& warp, const Instruction& i, uint32_t) {
  const Issue issue{&warp, &i, 0};
  const uint64_t to = address_of(warp, i.operands[0], 0);
  for (int lane = 1; lane < kLanes; ++lane) {
    if (address_of(warp, i.operands[0], lane) != to ||
        address_of(warp, i.operands[1], lane) != address_of(warp, i.operands[1], 0))
      fault("operands differ between lanes", Issue{&warp, &i, lane}, "the addresses must be those of the whole warp");
  }
  if (to % kMapBytes)
    fault("misaligned", issue, "the tensor map at " + std::to_string(to) + " is not aligned to 128 bytes");
  store_map(issue, Space::global, to, load_map(issue, Space::shared, address_of(warp, i.operands[1], 0)));
  map_written(warp, to, true);
  return true;
}

bool release(Warp& warp, const Instruction&, uint32_t) {
  release_maps(warp);
  return true;
}

bool acquire(Warp& warp, const Instruction& i, uint32_t mask) {
  for (int lane = 0; lane < kLanes; ++lane) {
    if (mask >> lane & 1) acquire_map(warp, address_of(warp, i.operands[0], lane));
  }
  return true;
}

bool is_size(const Operand& operand) {
  return operand.kind == Operand::Kind::immediate && operand.immediate == kMapBytes;
}

// tensormap.replace.tile.field{.ss}.b1024.type [map] {, ordinal}, value
bool bind_replace(Instruction& i) {
  if (!only(i, {"replace", "tile", "global_address", "rank", "global_dim", "global_stride", "global", "shared::cta",
                "b1024", "b32", "b64"}))
    return false;
  constexpr const char* fields[] = {"global_address", "rank", "global_dim", "global_stride"};
  constexpr uint32_t ordinals[] = {0, 0, kTensorRank, kTensorRank - 1};
  if (i.modifiers.size() < 5 || i.modifiers[1] != "tile" || !i.has("b1024")) return false;
  for (uint32_t f = 0; f < 4; ++f) {
    if (i.modifiers[2] != fields[f]) continue;
    const size_t operands = ordinals[f] ? 3 : 2;
    if (i.operands.size() != operands || i.operands[0].kind != Operand::Kind::address) return false;
    if (i.type != (f == 0 || f == 3 ? Type::b64 : Type::b32)) return false;
    if (ordinals[f] && (i.operands[1].kind != Operand::Kind::immediate || i.operands[1].immediate >= ordinals[f]))
      return false;
    i.data[0] = f;
    i.data[1] = ordinals[f] ? static_cast<uint32_t>(i.operands[1].immediate) : 0;
    i.data[2] = static_cast<uint32_t>(i.has("global")        ? Space::global
                                      : i.has("shared::cta") ? Space::shared
                                                             : Space::generic);
    i.execute = replace;
    return true;
  }
  return false;
}

}  // namespace

bool bind_tensormap(Instruction& i) {
  const size_t operands = i.operands.size();
  if (i.opcode == "tensormap" && !i.modifiers.empty() && i.modifiers[0] == "replace") return bind_replace(i);
  if (i.opcode == "tensormap" && i.has("cp_fenceproxy")) {
    if (!only(i, {"cp_fenceproxy", "global", "shared::cta", "tensormap::generic", "release", "cta", "cluster", "gpu",
                  "sys", "sync", "aligned"}))
      return false;
    if (operands != 3 || !i.has("release") || !i.aligned || !is_size(i.operands[2])) return false;
    i.execute = copy_and_release;
    return true;
  }
  if (i.opcode != "fence" || !i.has("tensormap::generic") ||
      !only(i, {"proxy", "tensormap::generic", "acquire", "release", "cta", "cluster", "gpu", "sys"}))
    return false;
  if (i.has("acquire") == i.has("release") || operands != (i.has("acquire") ? 2u : 0u) ||
      (operands && !is_size(i.operands[1])))
    return false;
  i.execute = i.has("acquire") ? acquire : release;
  return true;
}

}  // namespace hoppersim
