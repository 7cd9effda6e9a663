// The arithmetic of wgmma.
//
// Each warp of the warpgroup computes its own 16 rows: row 16 w + r of D needs row 16 w + r of A and all of B.
// Arithmetic is fp32: acc, or 0 without scale-d, then + a[k] * b[k] for k = 0, 1, … one after another, each sum rounded
// to nearest even. Products of f16, bf16, tf32 and 8-bit floats are exact in fp32 (unless a bf16 or tf32 product leaves
// its exponent range). Hardware sums several products at once with truncation, in an order that is not documented:
// results agree within rounding, not bitwise. f16 accumulators are converted to fp32, summed as above over the k values
// of one instruction, and rounded once.
//
// Integers: the sum of the 32 products of an instruction is below 2^24, so fp32 holds it exactly; it is then added to
// the s32 accumulator, which wraps, or is clamped with .satfinite.
//
// Sparse A: only the stored elements are multiplied, each with the row of B that its metadata names.
#include <algorithm>

#include "tensor_float.h"
#include "tensor_state.h"

namespace hoppersim {
namespace {

constexpr int kRows = 16, kMaxN = 256, kMaxK = 64, kMaxStored = 32;

struct Tiles {
  float a[kRows][kMaxStored];
  uint8_t row_of_b[kRows][kMaxStored];  // of the stored element of A
  float b[kMaxK][kMaxN];
  float d[kRows][kMaxN];
};

// d += a b in the order of k, for rows that read the same rows of b; the sums stay in registers.
template <int kTileRows, int kColumns>
void multiply_tile(Tiles& t, int row, int column, int stored) {
  float sums[kTileRows][kColumns];
  for (int r = 0; r < kTileRows; ++r) std::copy_n(t.d[row + r] + column, kColumns, sums[r]);
  for (int x = 0; x < stored; ++x) {
    const float* b = t.b[t.row_of_b[row][x]] + column;
    for (int r = 0; r < kTileRows; ++r) {
      const float a = t.a[row + r][x];
      for (int c = 0; c < kColumns; ++c) sums[r][c] += a * b[c];
    }
  }
  for (int r = 0; r < kTileRows; ++r) std::copy_n(sums[r], kColumns, t.d[row + r] + column);
}

template <int kTileRows>
void multiply(Tiles& t, int n, int stored) {
  for (int row = 0; row < kRows; row += kTileRows) {
    int column = 0;
    for (; column + 32 <= n; column += 32) multiply_tile<kTileRows, 32>(t, row, column, stored);
    for (; column < n; column += 8) multiply_tile<kTileRows, 8>(t, row, column, stored);
  }
}

// ---- Operands
template <class Bits, Element E, class Store>
void each_in_unit(const uint8_t* unit, Store store) {
  Bits bits[16 / sizeof(Bits)];
  std::memcpy(bits, unit, 16);
  for (int e = 0; e < static_cast<int>(16 / sizeof(Bits)); ++e) store(e, float_of_element(E, bits[e]));
}

// Reads units of 16 bytes and calls store(index of the unit, element in the unit, value).
template <class Store>
void for_elements(const uint8_t* shared, const uint32_t* units, int count, Element element, Store store) {
  for (int u = 0; u < count; ++u) {
    const uint8_t* unit = shared + units[u];
    auto put = [&](int e, float value) { store(u, e, value); };
    switch (element) {
      case Element::f16: each_in_unit<uint16_t, Element::f16>(unit, put); break;
      case Element::bf16: each_in_unit<uint16_t, Element::bf16>(unit, put); break;
      case Element::tf32: each_in_unit<uint32_t, Element::tf32>(unit, put); break;
      case Element::e4m3: each_in_unit<uint8_t, Element::e4m3>(unit, put); break;
      case Element::e5m2: each_in_unit<uint8_t, Element::e5m2>(unit, put); break;
      case Element::s8: each_in_unit<uint8_t, Element::s8>(unit, put); break;
      default: each_in_unit<uint8_t, Element::u8>(unit, put); break;
    }
  }
}

// Element i of register j: row lane / 4 + 8 (j % 2), column e (lane % 4) + i, + 4 e for j >= 2; e elements in a
// register.
void load_a_registers(const Warp& warp, const std::vector<Operand>& registers, const WgmmaShape& shape, Tiles& t) {
  const int per_word = 32 / bits_of(shape.a);
  for (int j = 0; j < 4; ++j) {
    const uint32_t* words = &warp.registers[registers[j].index * kLanes];
    for (int lane = 0; lane < kLanes; ++lane) {
      float* row = t.a[lane / 4 + j % 2 * 8] + (lane % 4 + j / 2 * 4) * per_word;
      for (int i = 0; i < per_word; ++i) row[i] = element_of_word(shape.a, words[lane], i);
    }
  }
}

// A: 16 rows of this warp; returns the number of units used.
int load_a_shared(const uint8_t* shared, const uint32_t* units, const WgmmaShape& shape, Tiles& t) {
  const int per_unit = 128 / bits_of(shape.a);
  if (shape.has(WgmmaShape::a_mn_major)) {  // [2 units of 8 rows][k]
    int depth = shape.stored_k();
    for_elements(shared, units, 2 * depth, shape.a,
                 [&](int u, int e, float v) { t.a[u / depth * 8 + e][u % depth] = v; });
    return 2 * depth;
  }
  for_elements(shared, units, 2 * kRows, shape.a, [&](int u, int e, float v) { t.a[u / 2][u % 2 * per_unit + e] = v; });
  return 2 * kRows;
}

void load_b(const uint8_t* shared, const uint32_t* units, const WgmmaShape& shape, Tiles& t) {
  const int n = shape.n, depth = shape.k, per_unit = 128 / bits_of(shape.b);
  if (shape.has(WgmmaShape::b_mn_major)) {  // [n / 8 units of 8 columns][k]
    for_elements(shared, units, n / 8 * depth, shape.b,
                 [&](int u, int e, float v) { t.b[u % depth][u / depth * 8 + e] = v; });
    return;
  }
  const int per_row = shape.b_units();
  for_elements(shared, units, per_row * n, shape.b,
               [&](int u, int e, float v) { t.b[u % per_row * per_unit + e][u / per_row] = v; });
}

// ---- Sparsity
// The 4 metadata bits of chunk c of a row: two 2-bit positions in a chunk of 4 elements of 8 or 16 bits, of which 2 are
// stored; 0100 or 1110 for the first or second of 2 elements of 32 bits, of which 1 is stored. The lanes that hold
// them, as in ELayout_64x64, …x32 and …x16 of cute/atom/mma_traits_sm90_gmma_sparse.hpp:
uint32_t metadata_of(const WgmmaShape& shape, const std::vector<uint32_t>& metadata, int row, int chunk) {
  const int lanes = row % 8 * 4;
  if (bits_of(shape.a) == 8) return metadata[lanes + chunk / 8 * 2 + row / 8] >> chunk % 8 * 4 & 15;
  const int pair = shape.has(WgmmaShape::second_pair) ? 2 : 0;
  return metadata[lanes + pair + chunk / 4] >> (row / 8 * 16 + chunk % 4 * 4) & 15;
}

void place_elements(Warp& warp, const TensorOperation& operation, const WgmmaShape& shape, Tiles& t) {
  const int stored = shape.stored_k();
  for (int row = 0; row < kRows; ++row) {
    for (int x = 0; x < stored; ++x) {
      if (!shape.has(WgmmaShape::sparse)) {
        t.row_of_b[row][x] = static_cast<uint8_t>(x);
        continue;
      }
      const bool wide = shape.a == Element::tf32;
      const uint32_t bits = metadata_of(shape, operation.metadata, row, wide ? x : x / 2);
      const uint32_t first = bits & 3, second = bits >> 2;
      if (wide ? bits != 4 && bits != 14 : first >= second) {
        fault("invalid sparsity metadata", warp, *operation.instruction,
              "row " + std::to_string(warp.id % kWarpgroup * kRows + row) + " has metadata " + std::to_string(bits) +
                  " for its stored element " + std::to_string(x));
      }
      t.row_of_b[row][x] = static_cast<uint8_t>(wide ? 2 * x + first / 2 : x / 2 * 4 + (x % 2 ? second : first));
    }
  }
}

// ---- Accumulators
// Register 4 j + 2 h + i of 32-bit accumulators (2 j + h of f16, half i): row lane / 4 + 8 h, column 8 j + lane % 4 * 2
// + i.
void load_accumulators(const Warp& warp, const std::vector<Operand>& registers, const WgmmaShape& shape, Tiles& t) {
  bool half = shape.has(WgmmaShape::half_accumulator);
  for (uint32_t r = 0; r < registers.size(); ++r) {
    const uint32_t* words = &warp.registers[registers[r].index * kLanes];
    uint32_t block = half ? r / 2 : r / 4, high = half ? r % 2 : r / 2 % 2;
    for (int lane = 0; lane < kLanes; ++lane) {
      float* d = &t.d[lane / 4 + 8 * high][8 * block + lane % 4 * 2];
      if (half) {
        d[0] = float_of_half(words[lane] & 0xffff);
        d[1] = float_of_half(words[lane] >> 16);
      } else {
        d[r % 2] = float_of_bits(words[lane]);
      }
    }
  }
}

void store_accumulators(Warp& warp, const std::vector<Operand>& registers, const WgmmaShape& shape, bool accumulate,
                        const Tiles& t) {
  bool half = shape.has(WgmmaShape::half_accumulator), integer = shape.has(WgmmaShape::integer);
  for (uint32_t r = 0; r < registers.size(); ++r) {
    uint32_t* words = &warp.registers[registers[r].index * kLanes];
    uint32_t block = half ? r / 2 : r / 4, high = half ? r % 2 : r / 2 % 2;
    for (int lane = 0; lane < kLanes; ++lane) {
      const float* d = &t.d[lane / 4 + 8 * high][8 * block + lane % 4 * 2];
      if (integer) {
        words[lane] =
            add_s32(accumulate ? words[lane] : 0, static_cast<int64_t>(d[r % 2]), shape.has(WgmmaShape::saturate));
      } else {
        words[lane] =
            half ? half_of_float(d[0]) | static_cast<uint32_t>(half_of_float(d[1])) << 16 : bits_of_float(d[r % 2]);
      }
    }
  }
}

}  // namespace

void compute_wgmma(Warp& warp, const TensorOperation& operation) {
  const Instruction& i = *operation.instruction;
  WgmmaShape shape(i);
  Tiles t;
  const uint8_t* shared = warp.cta->shared.bytes.data();
  const uint32_t* units = operation.units.data();
  if (shape.has(WgmmaShape::a_in_registers)) {
    load_a_registers(warp, i.operands[1].elements, shape, t);
  } else {
    units += load_a_shared(shared, units, shape, t);
  }
  load_b(shared, units, shape, t);
  place_elements(warp, operation, shape, t);
  if (shape.has(WgmmaShape::negate)) {
    for (auto& row : t.a) {
      for (uint32_t x = 0; x < shape.stored_k(); ++x) row[x] = -row[x];
    }
  }
  if (operation.accumulate && !shape.has(WgmmaShape::integer)) {
    load_accumulators(warp, i.operands[0].elements, shape, t);
  } else {
    for (auto& row : t.d) std::fill(row, row + shape.n, 0.0f);
  }
  if (shape.has(WgmmaShape::sparse)) {
    multiply<1>(t, shape.n, shape.stored_k());
  } else {
    multiply<4>(t, shape.n, shape.stored_k());
  }
  store_accumulators(warp, i.operands[0].elements, shape, operation.accumulate, t);
}

}  // namespace hoppersim
