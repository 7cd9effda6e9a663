// What the synchronous tensor instructions of one warp share.
#pragma once

#include "ptx.h"

namespace hoppersim {

inline void require_whole_warp(const Warp& warp, const Instruction& i, uint32_t mask) {
  if (mask != ~0u) fault("divergent aligned instruction", warp, i, "all 32 lanes must execute it together: " + i.text);
}

inline uint32_t* words_of(Warp& warp, const Operand& operand) { return &warp.registers[operand.index * kLanes]; }

// A vector of registers, or one register written without braces.
inline const Operand& element_of(const Operand& operand, size_t j) {
  return operand.kind == Operand::Kind::vector ? operand.elements[j] : operand;
}
inline size_t elements_of(const Operand& operand) {
  return operand.kind == Operand::Kind::vector ? operand.elements.size() : 1;
}

// It is a list of `count` registers of `bits` bits.
inline bool is_fragment(const Operand& operand, size_t count, int bits) {
  if (elements_of(operand) != count) return false;
  for (size_t j = 0; j < count; ++j) {
    const Operand& element = element_of(operand, j);
    if (element.kind != Operand::Kind::reg || bits_of(element.type) != bits) return false;
  }
  return true;
}

}  // namespace hoppersim
