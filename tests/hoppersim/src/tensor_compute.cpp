// The arithmetic of wgmma.
//
// Each warp of the warpgroup computes its own 16 rows: row 16 w + r of D needs row 16 w + r of A and all of B. Arithmetic is
// fp32: acc, or 0 without scale-d, then + a[k] * b[k] for k = 0, 1, … one after another, each sum rounded to nearest even.
// Products of f16, bf16 and tf32 are exact in fp32 (unless a bf16 or tf32 product leaves its exponent range). Hardware sums
// several products at once with truncation, in an order that is not documented: results agree within rounding, not bitwise.
// f16 accumulators are converted to fp32, summed as above over the k values of one instruction, and rounded once.
#include "tensor_float.h"
#include "tensor_state.h"

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define HOPPERSIM_CLONES __attribute__((target_clones("default", "avx2", "arch=skylake-avx512"), optimize("O3,fp-contract=off")))
#else
#define HOPPERSIM_CLONES
#endif

namespace hoppersim {
namespace {

constexpr int kRows = 16, kMaxN = 256, kMaxK = 16;

struct Tiles {
  float a[kRows][kMaxK];
  float b[kMaxK][kMaxN];
  float d[kRows][kMaxN];
};

HOPPERSIM_CLONES void multiply(Tiles& t, int n, int k) {
  for (int row = 0; row < kRows; ++row) {
    float* d = t.d[row];
    for (int x = 0; x < k; ++x) {
      float a = t.a[row][x];
      const float* b = t.b[x];
      for (int column = 0; column < n; ++column) d[column] += a * b[column];
    }
  }
}

// Reads units of 16 bytes and calls store(index of the unit, element in the unit, value).
template <class Store>
void for_elements(const uint8_t* shared, const uint32_t* units, int count, uint32_t element, Store store) {
  for (int u = 0; u < count; ++u) {
    if (static_cast<Element>(element) == Element::tf32) {
      uint32_t words[4];
      std::memcpy(words, shared + units[u], 16);
      for (int e = 0; e < 4; ++e) store(u, e, float_of_tf32(words[e]));
    } else {
      uint16_t words[8];
      std::memcpy(words, shared + units[u], 16);
      for (int e = 0; e < 8; ++e) store(u, e, float_of_element(static_cast<Element>(element), words[e]));
    }
  }
}

void load_a_registers(const Warp& warp, const std::vector<Operand>& registers, const WgmmaShape& shape, Tiles& t) {
  bool tf32 = static_cast<Element>(shape.element) == Element::tf32;
  for (int j = 0; j < 4; ++j) {
    const uint32_t* words = &warp.registers[registers[j].index * kLanes];
    for (int lane = 0; lane < kLanes; ++lane) {
      int row = lane / 4 + j % 2 * 8;
      if (tf32) {
        t.a[row][lane % 4 + j / 2 * 4] = float_of_tf32(words[lane]);
        continue;
      }
      int k = lane % 4 * 2 + j / 2 * 8;
      t.a[row][k] = float_of_element(static_cast<Element>(shape.element), words[lane] & 0xffff);
      t.a[row][k + 1] = float_of_element(static_cast<Element>(shape.element), words[lane] >> 16);
    }
  }
}

// A: 16 rows of this warp; returns the number of units used.
int load_a_shared(const uint8_t* shared, const uint32_t* units, const WgmmaShape& shape, Tiles& t) {
  int per_unit = static_cast<Element>(shape.element) == Element::tf32 ? 4 : 8;
  if (shape.has(WgmmaShape::a_mn_major)) {  // [2 units of 8 rows][k]
    int depth = shape.k;
    for_elements(shared, units, 2 * depth, shape.element, [&](int u, int e, float v) { t.a[u / depth * 8 + e][u % depth] = v; });
    return 2 * depth;
  }
  for_elements(shared, units, 2 * kRows, shape.element, [&](int u, int e, float v) { t.a[u / 2][u % 2 * per_unit + e] = v; });
  return 2 * kRows;
}

void load_b(const uint8_t* shared, const uint32_t* units, const WgmmaShape& shape, Tiles& t) {
  int n = shape.n, depth = shape.k, per_unit = static_cast<Element>(shape.element) == Element::tf32 ? 4 : 8;
  if (shape.has(WgmmaShape::b_mn_major)) {  // [n / 8 units of 8 columns][k]
    for_elements(shared, units, n / 8 * depth, shape.element, [&](int u, int e, float v) { t.b[u % depth][u / depth * 8 + e] = v; });
    return;
  }
  for_elements(shared, units, 2 * n, shape.element, [&](int u, int e, float v) { t.b[u % 2 * per_unit + e][u / 2] = v; });
}

// Register 4 j + 2 h + i of an f32 accumulator (2 j + h of f16, half i): row lane / 4 + 8 h, column 8 j + lane % 4 * 2 + i.
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

void store_accumulators(Warp& warp, const std::vector<Operand>& registers, const WgmmaShape& shape, const Tiles& t) {
  bool half = shape.has(WgmmaShape::half_accumulator);
  for (uint32_t r = 0; r < registers.size(); ++r) {
    uint32_t* words = &warp.registers[registers[r].index * kLanes];
    uint32_t block = half ? r / 2 : r / 4, high = half ? r % 2 : r / 2 % 2;
    for (int lane = 0; lane < kLanes; ++lane) {
      const float* d = &t.d[lane / 4 + 8 * high][8 * block + lane % 4 * 2];
      words[lane] = half ? half_of_float(d[0]) | static_cast<uint32_t>(half_of_float(d[1])) << 16 : bits_of_float(d[r % 2]);
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
  if (shape.has(WgmmaShape::negate)) {
    for (auto& row : t.a) {
      for (uint32_t x = 0; x < shape.k; ++x) row[x] = -row[x];
    }
  }
  if (operation.accumulate) {
    load_accumulators(warp, i.operands[0].elements, shape, t);
  } else {
    for (auto& row : t.d) std::fill(row, row + shape.n, 0.0f);
  }
  multiply(t, shape.n, shape.k);
  store_accumulators(warp, i.operands[0].elements, shape, t);
}

}  // namespace hoppersim
