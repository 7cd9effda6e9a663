// mov, cvta, isspacep, mapa-free address moves; ld and st.
#include <bit>

#include "core.h"

namespace hoppersim {

namespace {

template <class T>
bool move(Warp& warp, const Instruction& i, uint32_t mask) {
  T values[kLanes];
  load(warp, i.operands[1], values);
  store(warp, i.operands[0], values, mask);
  return true;
}

bool move_predicate(Warp& warp, const Instruction& i, uint32_t mask) {
  uint32_t& target = warp.predicates[i.operands[0].index];
  target = (target & ~mask) | (predicate_mask(warp, i.operands[1]) & mask);
  return true;
}

int width_of(const Operand& operand, int whole, size_t parts) {
  return operand.kind == Operand::Kind::reg ? bits_of(operand.type) : whole / static_cast<int>(parts);
}

// mov.b64 {a, b}, c and the like; the first element is the low part.
bool unpack(Warp& warp, const Instruction& i, uint32_t mask) {
  const int whole = bits_of(i.type), part = whole / static_cast<int>(i.operands[0].elements.size());
  for (int lane = 0; lane < kLanes; ++lane) {
    if (!(mask >> lane & 1)) continue;
    const uint64_t value = operand_value(warp, i.operands[1], lane);
    int shift = 0;
    for (const Operand& element : i.operands[0].elements) {
      set_register(warp, element, lane, part == 64 ? value : value >> shift & ((1ull << part) - 1));
      shift += part;
    }
  }
  return true;
}

bool pack(Warp& warp, const Instruction& i, uint32_t mask) {
  const int whole = bits_of(i.type), part = whole / static_cast<int>(i.operands[1].elements.size());
  for (int lane = 0; lane < kLanes; ++lane) {
    if (!(mask >> lane & 1)) continue;
    uint64_t value = 0;
    int shift = 0;
    for (const Operand& element : i.operands[1].elements) {
      value |= (operand_value(warp, element, lane) & ((1ull << part) - 1)) << shift;
      shift += part;
    }
    set_register(warp, i.operands[0], lane, value);
  }
  return true;
}

// The two halves of a b128 register as b64, either way.
bool move_128(Warp& warp, const Instruction& i, uint32_t mask) {
  auto half = [&](const Operand& operand, int lane, int k) -> uint8_t* {
    return reinterpret_cast<uint8_t*>(&warp.registers[size_t(operand.index) * kLanes + 4 * lane + 2 * k]);
  };
  const Operand &to = i.operands[0], &from = i.operands[1];
  for (int lane = 0; lane < kLanes; ++lane) {
    if (!(mask >> lane & 1)) continue;
    uint64_t parts[2];
    for (int k = 0; k < 2; ++k) {
      if (from.kind == Operand::Kind::vector) {
        parts[k] = operand_value(warp, from.elements[k], lane);
      } else {
        std::memcpy(&parts[k], half(from, lane, k), 8);
      }
    }
    for (int k = 0; k < 2; ++k) {
      if (to.kind == Operand::Kind::vector) {
        set_register(warp, to.elements[k], lane, parts[k]);
      } else {
        std::memcpy(half(to, lane, k), &parts[k], 8);
      }
    }
  }
  return true;
}

// data[0]: cvta.to (the base is taken away), data[1]: the window (0 none, 1 shared, 2 local, 3 parameters)
bool convert_address(Warp& warp, const Instruction& i, uint32_t mask) {
  uint64_t values[kLanes];
  load(warp, i.operands[1], values);
  const Launch& launch = *warp.cta->cluster->launch;
  const uint64_t base = i.data[1] == 1   ? kSharedWindow
                        : i.data[1] == 2 ? kLocalWindow
                        : i.data[1] == 3 ? reinterpret_cast<uint64_t>(launch.parameter_base)
                                         : 0;
  for (uint64_t& value : values) value = i.data[0] ? value - base : value + base;
  store(warp, i.operands[0], values, mask);
  return true;
}

bool is_in_space(Warp& warp, const Instruction& i, uint32_t mask) {
  uint64_t values[kLanes];
  load(warp, i.operands[1], values);
  uint32_t result = 0;
  for (int lane = 0; lane < kLanes; ++lane) {
    const uint64_t a = values[lane];
    const bool shared = a >= kSharedWindow && a < kSharedWindow + (1ull << 32);
    const bool own = shared && (a - kSharedWindow) / kRankStride == static_cast<uint64_t>(warp.cta->rank);
    const bool local = a >= kLocalWindow && a < kLocalWindow + (1ull << 32);
    const bool in = i.has("shared") || i.has("shared::cta") ? own
                    : i.has("shared::cluster")              ? shared
                    : i.has("local")                        ? local
                                                            : !shared && !local;
    result |= uint32_t(in) << lane;
  }
  uint32_t& target = warp.predicates[i.operands[0].index];
  target = (target & ~mask) | (result & mask);
  return true;
}

bool bind_cvta(Instruction& i) {
  i.data[0] = i.has("to");
  i.data[1] = i.has("shared") || i.has("shared::cta") || i.has("shared::cluster") ? 1
              : i.has("local")                                                    ? 2
              : i.has("param")                                                    ? 3
                                                                                  : 0;
  i.execute = convert_address;
  return true;
}

}  // namespace

bool bind_move(Instruction& i) {
  if (i.opcode == "cvta") return bind_cvta(i);
  if (i.opcode == "isspacep") {
    i.execute = is_in_space;
    return true;
  }
  if (i.opcode != "mov") return false;
  if (i.operands.size() != 2) unsupported(i);
  const int bits = bits_of(i.type);
  const bool vectors = i.operands[0].kind == Operand::Kind::vector || i.operands[1].kind == Operand::Kind::vector;
  if (i.type == Type::pred) {
    i.execute = move_predicate;
  } else if (bits == 128) {
    i.execute = move_128;
  } else if (vectors) {
    i.execute = i.operands[0].kind == Operand::Kind::vector ? unpack : pack;
  } else if (i.operands[0].kind != Operand::Kind::reg) {
    unsupported(i);
  } else if (bits == 64 && width_of(i.operands[0], 64, 1) == 64) {
    i.execute = move<uint64_t>;
  } else if (i.type == Type::f32) {
    i.execute = move<float>;
  } else {
    i.execute = move<uint32_t>;
  }
  if (i.type == Type::f64) i.execute = move<double>;
  return true;
}

}  // namespace hoppersim
