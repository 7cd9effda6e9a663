// mma.sync, ldmatrix, stmatrix, movmatrix: synchronous, one warp.
//
// mma.sync adds in fp32: c, then a[k] * b[k] for k = 0, 1, … one after another (see tensor_compute.cpp on exactness and on
// the difference to hardware); an f16 result is rounded once at the end.
#include <algorithm>
#include <cstdio>

#include "tensor.h"
#include "tensor_float.h"

namespace hoppersim {
namespace {

void require_converged(const Warp& warp, const Instruction& i, uint32_t mask) {
  if (mask != ~0u) fault("divergent aligned instruction", warp, i, "all 32 lanes must execute it together: " + i.text);
}

uint32_t* words_of(Warp& warp, const Operand& operand) { return &warp.registers[operand.index * kLanes]; }

// A vector of registers, or one register written without braces.
const Operand& element_of(const Operand& operand, size_t j) { return operand.kind == Operand::Kind::vector ? operand.elements[j] : operand; }
size_t elements_of(const Operand& operand) { return operand.kind == Operand::Kind::vector ? operand.elements.size() : 1; }

// ---- mma.sync m16n8k* ------------------------------------------------------------------------------------------------------
constexpr uint32_t half_c = 1, half_d = 2;  // flags: type of C, of D

// data: k, Element, flags. Register j of A: row lane / 4 + 8 (j % 2); of A and B: next half of k for each further pair
// (A) or register (B), with lane % 4 selecting two adjacent values of 16 bits or one of 32.
void load_operands(Warp& warp, const Instruction& i, float (*a)[16], float (*b)[16]) {
  auto element = static_cast<Element>(i.data[1]);
  auto load = [&](const Operand& operand, bool is_a) {
    for (size_t j = 0; j < elements_of(operand); ++j) {
      const uint32_t* words = words_of(warp, element_of(operand, j));
      int half = static_cast<int>(is_a ? j / 2 : j);
      for (int lane = 0; lane < kLanes; ++lane) {
        float* row = is_a ? a[lane / 4 + j % 2 * 8] : b[lane / 4];
        if (element == Element::tf32) {
          row[lane % 4 + 4 * half] = float_of_tf32(words[lane]);
        } else {
          row[lane % 4 * 2 + 8 * half] = float_of_element(element, words[lane] & 0xffff);
          row[lane % 4 * 2 + 8 * half + 1] = float_of_element(element, words[lane] >> 16);
        }
      }
    }
  };
  load(i.operands[1], true);
  load(i.operands[2], false);
}

bool execute_mma(Warp& warp, const Instruction& i, uint32_t mask) {
  require_converged(warp, i, mask);
  float a[16][16], b[8][16], d[16][8];
  load_operands(warp, i, a, b);
  for (int lane = 0; lane < kLanes; ++lane) {
    for (int x = 0; x < 4; ++x) {
      float& c = d[lane / 4 + x / 2 * 8][lane % 4 * 2 + x % 2];
      if (i.data[2] & half_c) {
        c = float_of_half(static_cast<uint16_t>(words_of(warp, element_of(i.operands[3], x / 2))[lane] >> 16 * (x % 2)));
      } else {
        c = float_of_bits(words_of(warp, element_of(i.operands[3], x))[lane]);
      }
    }
  }
  for (int row = 0; row < 16; ++row) {
    for (int column = 0; column < 8; ++column) {
      for (uint32_t k = 0; k < i.data[0]; ++k) d[row][column] += a[row][k] * b[column][k];
    }
  }
  for (int lane = 0; lane < kLanes; ++lane) {
    for (int h = 0; h < 2; ++h) {
      const float* row = &d[lane / 4 + 8 * h][lane % 4 * 2];
      if (i.data[2] & half_d) {
        words_of(warp, element_of(i.operands[0], h))[lane] = half_of_float(row[0]) | static_cast<uint32_t>(half_of_float(row[1])) << 16;
      } else {
        words_of(warp, element_of(i.operands[0], 2 * h))[lane] = bits_of_float(row[0]);
        words_of(warp, element_of(i.operands[0], 2 * h + 1))[lane] = bits_of_float(row[1]);
      }
    }
  }
  warp.cta->cluster->counters.tensor_flop += 2ull * 16 * 8 * i.data[0];
  return true;
}

// ---- ldmatrix, stmatrix, movmatrix -------------------------------------------------------------------------------------------
// data: matrices, transposed, Space. Row r of matrix j is at the address of lane 8 j + r.
void row_addresses(Warp& warp, const Instruction& i, const Operand& operand, uint64_t* addresses) {
  auto space = static_cast<Space>(i.data[2]);
  uint32_t offsets[kLanes] = {}, lanes = static_cast<uint32_t>((1ull << 8 * i.data[0]) - 1);
  for (uint32_t lane = 0; lane < 8 * i.data[0]; ++lane) {
    addresses[lane] = address_of(warp, operand, static_cast<int>(lane));
    offsets[lane] = shared_place(warp, i, addresses[lane], 16, space).offset;
  }
  count_shared(warp.cta->cluster->counters, offsets, lanes, 16);
}

// Lane l holds elements (l / 4, l % 4 * 2) and (l / 4, l % 4 * 2 + 1) of the matrix, or of its transpose.
uint16_t& element_at(uint16_t (*matrix)[8], int lane, int half, bool transposed) {
  int row = lane / 4, column = lane % 4 * 2 + half;
  return transposed ? matrix[column][row] : matrix[row][column];
}

bool execute_ldmatrix(Warp& warp, const Instruction& i, uint32_t mask) {
  require_converged(warp, i, mask);
  uint64_t addresses[kLanes];
  row_addresses(warp, i, i.operands[1], addresses);
  uint16_t matrices[4][8][8];  // all read before any register is written: the address may be among the targets
  for (uint32_t lane = 0; lane < 8 * i.data[0]; ++lane) {
    read_memory(warp, i, static_cast<Space>(i.data[2]), addresses[lane], 16, matrices[lane / 8][lane % 8], static_cast<int>(lane));
  }
  for (uint32_t j = 0; j < i.data[0]; ++j) {
    uint32_t* words = words_of(warp, element_of(i.operands[0], j));
    for (int lane = 0; lane < kLanes; ++lane) {
      words[lane] = element_at(matrices[j], lane, 0, i.data[1]) | static_cast<uint32_t>(element_at(matrices[j], lane, 1, i.data[1])) << 16;
    }
  }
  return true;
}

bool execute_stmatrix(Warp& warp, const Instruction& i, uint32_t mask) {
  require_converged(warp, i, mask);
  uint64_t addresses[kLanes];
  row_addresses(warp, i, i.operands[0], addresses);
  for (uint32_t j = 0; j < i.data[0]; ++j) {
    uint16_t matrix[8][8];
    const uint32_t* words = words_of(warp, element_of(i.operands[1], j));
    for (int lane = 0; lane < kLanes; ++lane) {
      element_at(matrix, lane, 0, i.data[1]) = static_cast<uint16_t>(words[lane]);
      element_at(matrix, lane, 1, i.data[1]) = static_cast<uint16_t>(words[lane] >> 16);
    }
    for (int row = 0; row < 8; ++row) {
      int lane = static_cast<int>(8 * j) + row;
      write_memory(warp, i, static_cast<Space>(i.data[2]), addresses[lane], 16, matrix[row], lane);
    }
  }
  return true;
}

bool execute_movmatrix(Warp& warp, const Instruction& i, uint32_t mask) {
  require_converged(warp, i, mask);
  uint16_t matrix[8][8];
  const uint32_t* source = words_of(warp, i.operands[1]);
  for (int lane = 0; lane < kLanes; ++lane) {
    element_at(matrix, lane, 0, false) = static_cast<uint16_t>(source[lane]);
    element_at(matrix, lane, 1, false) = static_cast<uint16_t>(source[lane] >> 16);
  }
  uint32_t* target = words_of(warp, i.operands[0]);
  for (int lane = 0; lane < kLanes; ++lane) {
    target[lane] = element_at(matrix, lane, 0, true) | static_cast<uint32_t>(element_at(matrix, lane, 1, true)) << 16;
  }
  return true;
}

}  // namespace

// mma.sync.aligned.m16n8k*.row.col.D.A.B.C
bool bind_mma(Instruction& i) {
  const std::vector<std::string>& m = i.modifiers;
  if (i.opcode != "mma" || m.size() != 9 || i.operands.size() != 4) return false;
  if (m[0] != "sync" || m[1] != "aligned" || m[3] != "row" || m[4] != "col" || m[6] != m[7]) return false;
  unsigned rows = 0, n = 0, k = 0;
  if (std::sscanf(m[2].c_str(), "m%un%uk%u", &rows, &n, &k) != 3 || rows != 16 || n != 8) return false;
  auto accumulator = [&](const std::string& type) { return type == "f32" || (type == "f16" && m[6] == "f16"); };
  if (!accumulator(m[5]) || !accumulator(m[8])) return false;
  unsigned per_register;
  if (m[6] == "tf32") {
    if (k != 4 && k != 8) return false;
    per_register = 4;
    i.data[1] = static_cast<uint32_t>(Element::tf32);
  } else if (m[6] == "f16" || m[6] == "bf16") {
    if (k != 8 && k != 16) return false;
    per_register = 8;
    i.data[1] = static_cast<uint32_t>(m[6] == "f16" ? Element::f16 : Element::bf16);
  } else {
    return false;
  }
  i.data[0] = k;
  i.data[2] = (m[8] == "f16" ? half_c : 0) | (m[5] == "f16" ? half_d : 0);
  size_t b = k / per_register, sizes[4] = {m[5] == "f16" ? 2u : 4u, 2 * b, b, m[8] == "f16" ? 2u : 4u};
  for (int o = 0; o < 4; ++o) {
    if (elements_of(i.operands[o]) != sizes[o]) return false;
    for (size_t j = 0; j < sizes[o]; ++j) {
      if (element_of(i.operands[o], j).kind != Operand::Kind::reg) return false;
    }
  }
  i.execute = execute_mma;
  return true;
}

// ldmatrix.sync.aligned.m8n8.x4{.trans}{.shared}.b16 r, [p]; stmatrix likewise with [p], r; movmatrix.….m8n8.trans.b16 d, a
bool bind_matrix_move(Instruction& i) {
  bool load = i.opcode == "ldmatrix", store = i.opcode == "stmatrix", move = i.opcode == "movmatrix";
  if ((!load && !store && !move) || i.operands.size() != 2) return false;
  i.data[0] = 0;
  i.data[1] = i.has("trans");
  i.data[2] = static_cast<uint32_t>(Space::generic);
  for (const std::string& m : i.modifiers) {
    if (m == "x1" || m == "x2" || m == "x4") {
      i.data[0] = static_cast<uint32_t>(m[1] - '0');
    } else if (m == "shared" || m == "shared::cta") {
      i.data[2] = static_cast<uint32_t>(Space::shared);
    } else if (m != "sync" && m != "aligned" && m != "m8n8" && m != "b16" && m != "trans") {
      return false;
    }
  }
  if (!i.has("sync") || !i.has("aligned") || !i.has("m8n8") || !i.has("b16")) return false;
  if (move) {
    if (!i.data[1] || i.data[0] || i.operands[0].kind != Operand::Kind::reg || i.operands[1].kind != Operand::Kind::reg) return false;
    i.execute = execute_movmatrix;
    return true;
  }
  const Operand &registers = i.operands[load ? 0 : 1], &address = i.operands[load ? 1 : 0];
  if (i.data[0] == 0 || elements_of(registers) != i.data[0] || address.kind != Operand::Kind::address) return false;
  i.execute = load ? execute_ldmatrix : execute_stmatrix;
  return true;
}

}  // namespace hoppersim
