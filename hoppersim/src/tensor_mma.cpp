// mma.sync: synchronous, one warp.
//
// Arithmetic is fp32: c, then a[k] * b[k] for k = 0, 1, … one after another (see tensor_compute.cpp on exactness and on
// the difference to hardware); an f16 result is rounded once at the end. Integer and bit products are summed exactly.
// f64 is a chain of fused multiply-adds, each rounded to nearest even; PTX leaves the order of the sum open.
#include <algorithm>
#include <cmath>
#include <cstdio>

#include "tensor.h"
#include "tensor_float.h"
#include "tensor_warp.h"

namespace hoppersim {
namespace {

constexpr int kMaxK = 256;

// Instruction::data: k, element types (A in the low 4 bits), flags, rows.
enum Flag : uint32_t {
  half_c = 1,
  half_d = 2,
  integer = 4,
  saturate = 8,
  exclusive_or = 16,
  a_column = 32,
  b_row = 64
};

struct Shape {
  explicit Shape(const Instruction& i)
      : k(i.data[0]),
        a(static_cast<Element>(i.data[1] & 15)),
        b(static_cast<Element>(i.data[1] >> 4)),
        flags(i.data[2]),
        rows(i.data[3]) {}
  uint32_t k;
  Element a, b;
  uint32_t flags, rows;
};

struct Tile {
  float a[16][kMaxK], b[8][kMaxK], d[16][8];
};

// ---- Fragments of m16n8 and m8n8
// Register j of A: rows lane / 4 + 8 (j mod m / 8). A register holds adjacent elements of k; the lanes of four follow
// each other, and so do registers of the same rows. B likewise, with columns for rows.
void load_operand(Warp& warp, const Operand& operand, Element element, uint32_t rows, float (*to)[kMaxK]) {
  const int per_word = 32 / bits_of(element), blocks = static_cast<int>(rows / 8);
  for (int j = 0; j < static_cast<int>(elements_of(operand)); ++j) {
    const uint32_t* words = words_of(warp, element_of(operand, j));
    for (int lane = 0; lane < kLanes; ++lane) {
      float* row = to[lane / 4 + j % blocks * 8] + (lane % 4 + j / blocks * 4) * per_word;
      for (int e = 0; e < per_word; ++e) row[e] = element_of_word(element, words[lane], e);
    }
  }
}

// 32-bit register 2 h + e, or half e of f16 register h: row lane / 4 + 8 h, column lane % 4 * 2 + e.
void load_c(Warp& warp, const Instruction& i, const Shape& shape, Tile& t) {
  for (uint32_t h = 0; h < shape.rows / 8; ++h) {
    for (int lane = 0; lane < kLanes; ++lane) {
      for (uint32_t e = 0; e < 2; ++e) {
        float& c = t.d[lane / 4 + 8 * h][lane % 4 * 2 + e];
        if (shape.flags & integer) {
          c = 0;
        } else if (shape.flags & half_c) {
          c = float_of_half(static_cast<uint16_t>(words_of(warp, element_of(i.operands[3], h))[lane] >> 16 * e));
        } else {
          c = float_of_bits(words_of(warp, element_of(i.operands[3], 2 * h + e))[lane]);
        }
      }
    }
  }
}

void store_d(Warp& warp, const Instruction& i, const Shape& shape, const Tile& t) {
  for (uint32_t h = 0; h < shape.rows / 8; ++h) {
    for (int lane = 0; lane < kLanes; ++lane) {
      const float* row = &t.d[lane / 4 + 8 * h][lane % 4 * 2];
      if (shape.flags & half_d) {
        words_of(warp, element_of(i.operands[0], h))[lane] =
            half_of_float(row[0]) | static_cast<uint32_t>(half_of_float(row[1])) << 16;
        continue;
      }
      for (uint32_t e = 0; e < 2; ++e) {
        uint32_t& d = words_of(warp, element_of(i.operands[0], 2 * h + e))[lane];
        d = shape.flags & integer ? add_s32(words_of(warp, element_of(i.operands[3], 2 * h + e))[lane],
                                            static_cast<int64_t>(row[e]), shape.flags & saturate)
                                  : bits_of_float(row[e]);
      }
    }
  }
}

void multiply(const Shape& shape, Tile& t) {
  for (uint32_t row = 0; row < shape.rows; ++row) {
    for (int column = 0; column < 8; ++column) {
      const float *a = t.a[row], *b = t.b[column];
      for (uint32_t k = 0; k < shape.k; ++k)
        t.d[row][column] += shape.flags & exclusive_or ? float(a[k] != b[k]) : a[k] * b[k];
    }
  }
}

bool execute_mma(Warp& warp, const Instruction& i, uint32_t mask) {
  require_whole_warp(warp, i, mask);
  const Shape shape(i);
  Tile t;
  load_operand(warp, i.operands[1], shape.a, shape.rows, t.a);
  load_operand(warp, i.operands[2], shape.b, 8, t.b);
  load_c(warp, i, shape, t);
  multiply(shape, t);
  store_d(warp, i, shape, t);
  warp.cta->cluster->counters.tensor_flop += 2ull * shape.rows * 8 * shape.k;
  return true;
}

// ---- f64: the same fragments with one element in a register
double& double_of(Warp& warp, const Operand& operand, size_t j, int lane) {
  return *reinterpret_cast<double*>(words_of(warp, element_of(operand, j)) + 2 * lane);
}

bool execute_f64(Warp& warp, const Instruction& i, uint32_t mask) {
  require_whole_warp(warp, i, mask);
  const Shape shape(i);
  const uint32_t blocks = shape.rows / 8;
  double a[16][16], b[8][16], d[16][8];
  for (int lane = 0; lane < kLanes; ++lane) {
    for (uint32_t j = 0; j < elements_of(i.operands[1]); ++j)
      a[lane / 4 + j % blocks * 8][lane % 4 + j / blocks * 4] = double_of(warp, i.operands[1], j, lane);
    for (uint32_t j = 0; j < elements_of(i.operands[2]); ++j)
      b[lane / 4][lane % 4 + j * 4] = double_of(warp, i.operands[2], j, lane);
    for (uint32_t r = 0; r < 2 * blocks; ++r)
      d[lane / 4 + r / 2 * 8][lane % 4 * 2 + r % 2] = double_of(warp, i.operands[3], r, lane);
  }
  for (uint32_t row = 0; row < shape.rows; ++row) {
    for (int column = 0; column < 8; ++column) {
      for (uint32_t k = 0; k < shape.k; ++k) d[row][column] = std::fma(a[row][k], b[column][k], d[row][column]);
    }
  }
  for (int lane = 0; lane < kLanes; ++lane) {
    for (uint32_t r = 0; r < 2 * blocks; ++r)
      double_of(warp, i.operands[0], r, lane) = d[lane / 4 + r / 2 * 8][lane % 4 * 2 + r % 2];
  }
  warp.cta->cluster->counters.tensor_flop += 2ull * shape.rows * 8 * shape.k;
  return true;
}

// ---- m8n8k4 of f16: four products, each by the lanes 4 q … 4 q + 3 and 16 + 4 q … 16 + 4 q + 3
// The layouts are SM70_8x4_Row, SM70_8x4_Col, SM70_8x8_16b and SM70_8x8_32b of cute/atom/mma_traits_sm70.hpp.
struct Place {
  int row, column;
};
// Element e of a lane, member x = 0 … 3 of the upper or lower half of its product. `along`: its elements lie along k.
Place quad_operand(int x, bool upper, int e, bool along) {
  return along ? Place{x + 4 * upper, e} : Place{e + 4 * upper, x};
}
Place quad_accumulator(int x, bool upper, int e, bool half) {
  return half ? Place{x + 4 * upper, e} : Place{(x & 1) + (e & 2) + 4 * upper, (e & 4) + (x & 2) + (e & 1)};
}

bool execute_quads(Warp& warp, const Instruction& i, uint32_t mask) {
  require_whole_warp(warp, i, mask);
  const uint32_t flags = i.data[2];
  float a[4][8][4], b[4][8][4], d[4][8][8];
  auto half_at = [&](const Operand& operand, int lane, int e) {
    return float_of_half(static_cast<uint16_t>(words_of(warp, element_of(operand, e / 2))[lane] >> 16 * (e % 2)));
  };
  for (int lane = 0; lane < kLanes; ++lane) {
    const int quad = lane % 16 / 4, x = lane % 4;
    const bool upper = lane >= 16;
    for (int e = 0; e < 4; ++e) {
      const Place at = quad_operand(x, upper, e, !(flags & a_column)), bt = quad_operand(x, upper, e, !(flags & b_row));
      a[quad][at.row][at.column] = half_at(i.operands[1], lane, e);
      b[quad][bt.row][bt.column] = half_at(i.operands[2], lane, e);
    }
    for (int e = 0; e < 8; ++e) {
      const Place at = quad_accumulator(x, upper, e, flags & half_c);
      d[quad][at.row][at.column] = flags & half_c ? half_at(i.operands[3], lane, e)
                                                  : float_of_bits(words_of(warp, element_of(i.operands[3], e))[lane]);
    }
  }
  for (int cell = 0; cell < 4 * 8 * 8; ++cell) {
    const int quad = cell / 64, row = cell / 8 % 8, column = cell % 8;
    for (int k = 0; k < 4; ++k) d[quad][row][column] += a[quad][row][k] * b[quad][column][k];
  }
  for (int lane = 0; lane < kLanes; ++lane) {
    for (int e = 0; e < 8; ++e) {
      const Place at = quad_accumulator(lane % 4, lane >= 16, e, flags & half_d);
      const float value = d[lane % 16 / 4][at.row][at.column];
      uint32_t& word = words_of(warp, element_of(i.operands[0], flags & half_d ? e / 2 : e))[lane];
      if (flags & half_d) {
        word = e % 2 ? (word & 0xffff) | static_cast<uint32_t>(half_of_float(value)) << 16 : half_of_float(value);
      } else {
        word = bits_of_float(value);
      }
    }
  }
  warp.cta->cluster->counters.tensor_flop += 4 * 2ull * 8 * 8 * 4;
  return true;
}

// ---- Decoding
uint32_t flag(bool set, Flag value) { return set ? value : 0u; }

// Whether m x 8 x k of these operands exists, with D and C of these types.
bool exists(uint32_t m, uint32_t k, Element a, Element b, const std::string& d, const std::string& c) {
  const uint32_t bits = k * bits_of(a);  // a row of A
  auto accumulates = [&](bool f16) {
    return (d == "f32" || (f16 && d == "f16")) && (c == "f32" || (f16 && c == "f16"));
  };
  switch (a) {
    case Element::f16:
    case Element::bf16: return a == b && m == 16 && (k == 8 || k == 16) && accumulates(a == Element::f16);
    case Element::tf32: return a == b && m == 16 && (k == 4 || k == 8) && accumulates(false);
    case Element::e4m3:
    case Element::e5m2: return is_fp8(b) && m == 16 && k == 32 && d == c && accumulates(true);
    case Element::f64: return a == b && d == "f64" && c == "f64" && (k == 4 || (m == 16 && (k == 8 || k == 16)));
    default:
      return is_integer(b) && bits_of(b) == bits_of(a) && d == "s32" && c == "s32" &&
             (bits == 128 || (m == 16 && bits == 256));
  }
}

bool bind_quads(Instruction& i) {
  const std::vector<std::string>& m = i.modifiers;
  const bool half = m[5] == "f16";
  for (const std::string& layout : {m[3], m[4]}) {
    if (layout != "row" && layout != "col") return false;
  }
  if (m.size() != 9 || m[6] != "f16" || m[7] != "f16" || m[5] != m[8] || (!half && m[5] != "f32")) return false;
  const size_t sizes[4] = {half ? 4u : 8u, 2, 2, half ? 4u : 8u};
  for (int o = 0; o < 4; ++o) {
    if (!is_fragment(i.operands[o], sizes[o], 32)) return false;
  }
  i.data[2] = flag(half, half_c) | flag(half, half_d) | flag(m[3] == "col", a_column) | flag(m[4] == "row", b_row);
  i.execute = execute_quads;
  return true;
}

}  // namespace

// mma.sync.aligned.shape.row.col.D.A.B.C; integers: satfinite before D (PTX) or at the end (CUTLASS); bits: and.popc or
// xor.popc
bool bind_mma(Instruction& i) {
  std::vector<std::string> m = i.modifiers;
  if (i.opcode != "mma" || m.size() < 9 || i.operands.size() != 4 || m[0] != "sync" || m[1] != "aligned") return false;
  if (m[2] == "m8n8k4" && m[6] == "f16") return bind_quads(i);
  if (m[5] == "satfinite") std::rotate(m.begin() + 5, m.begin() + 6, m.end());
  unsigned rows = 0, n = 0, k = 0;
  if (std::sscanf(m[2].c_str(), "m%un%uk%u", &rows, &n, &k) != 3 || (rows != 16 && rows != 8) || n != 8) return false;
  const auto a = element_named(m[6]), b = element_named(m[7]);
  if (m[3] != "row" || m[4] != "col" || !a || !b || !exists(rows, k, *a, *b, m[5], m[8])) return false;
  uint32_t flags = flag(m[8] == "f16", half_c) | flag(m[5] == "f16", half_d) | flag(is_integer(*a), integer);
  m.erase(m.begin(), m.begin() + 9);
  if (*a == Element::b1) {
    if (m.size() != 2 || (m[0] != "and" && m[0] != "xor") || m[1] != "popc") return false;
    flags |= flag(m[0] == "xor", exclusive_or);
  } else if (is_integer(*a) && m == std::vector<std::string>{"satfinite"}) {
    flags |= saturate;
  } else if (!m.empty()) {
    return false;
  }
  const bool wide = *a == Element::f64;
  const size_t b_registers = k * bits_of(*b) / (wide ? 256 : 128), blocks = rows / 8;
  const size_t sizes[4] = {flags & half_d ? blocks : 2 * blocks, blocks * b_registers, b_registers,
                           flags & half_c ? blocks : 2 * blocks};
  for (int o = 0; o < 4; ++o) {
    if (!is_fragment(i.operands[o], sizes[o], wide ? 64 : 32)) return false;
  }
  i.data[0] = k;
  i.data[1] = static_cast<uint32_t>(*a) | static_cast<uint32_t>(*b) << 4;
  i.data[2] = flags;
  i.data[3] = rows;
  i.execute = wide ? execute_f64 : execute_mma;
  return true;
}

}  // namespace hoppersim
