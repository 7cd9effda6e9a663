// wmma.load, wmma.mma, wmma.store: synchronous, one warp. PTX leaves open which lane holds which element. Here slot e
// of a lane holds element (lane * slots + e) of the matrix, row by row, and begins again behind the last one: f16
// operands have more slots than elements, as on the device.
#include <algorithm>
#include <cstdio>

#include "tensor.h"
#include "tensor_float.h"
#include "tensor_warp.h"

namespace hoppersim {
namespace {

enum class Cell : uint32_t { f16, bf16, f32 };
constexpr uint32_t bytes_of(Cell cell) { return cell == Cell::f32 ? 4 : 2; }
constexpr int kDepth = 16;  // k of every shape
constexpr int kChunk = 16;  // bytes of a lane's access, for the counters

// Instruction::data of a load or store: rows and columns, cell, Space, whether columns are contiguous.
struct Matrix {
  explicit Matrix(const Instruction& i)
      : rows(i.data[0] & 0xff),
        columns(i.data[0] >> 8),
        cell(static_cast<Cell>(i.data[1])),
        space(static_cast<Space>(i.data[2])),
        column_major(i.data[3]) {}
  uint32_t rows, columns;
  Cell cell;
  Space space;
  bool column_major;

  uint32_t count() const { return rows * columns; }
  uint32_t line() const { return column_major ? rows : columns; }  // contiguous elements
  uint64_t offset(uint32_t element, uint64_t stride) const {
    const uint32_t row = element / columns, column = element % columns;
    return (column_major ? column * stride + row : row * stride + column) * bytes_of(cell);
  }
};

struct Place {
  uint64_t address, stride;  // of the first element; elements between lines
};

// The same for all lanes.
Place place_of(Warp& warp, const Instruction& i, const Matrix& m, const Operand& address) {
  const bool given = i.operands.size() == 3;
  auto of_lane = [&](int lane) {
    return Place{address_of(warp, address, lane),
                 given ? static_cast<uint32_t>(operand_value(warp, i.operands[2], lane)) : m.line()};
  };
  const Place place = of_lane(0);
  for (int lane = 1; lane < kLanes; ++lane) {
    const Place other = of_lane(lane);
    if (other.address != place.address || other.stride != place.stride)
      fault("operands differ between lanes", warp, i, "address and stride must be those of the whole warp", lane);
  }
  if (place.stride * bytes_of(m.cell) % 16)
    fault("misaligned", warp, i,
          "a stride of " + std::to_string(place.stride) + " elements is no multiple of 16 bytes");
  return place;
}

// As if lanes took chunks of the lines one after another.
void count(Warp& warp, const Matrix& m, const Place& place, bool write) {
  const uint32_t per_line = m.line() * bytes_of(m.cell) / kChunk, chunks = m.count() / m.line() * per_line;
  Counters& counters = warp.cta->cluster->counters;
  const bool generic_shared =
      m.space == Space::generic && place.address >= kSharedWindow && place.address < kLocalWindow;
  for (uint32_t first = 0; first < chunks; first += kLanes) {
    uint64_t addresses[kLanes];
    uint32_t offsets[kLanes], lanes = 0;
    for (uint32_t c = first; c < std::min<uint32_t>(chunks, first + kLanes); ++c) {
      addresses[c - first] = place.address + c / per_line * place.stride * bytes_of(m.cell) + c % per_line * kChunk;
      offsets[c - first] = static_cast<uint32_t>(addresses[c - first] % kRankStride);
      lanes |= 1u << (c - first);
    }
    if (m.space == Space::shared || generic_shared) {
      count_shared(counters, offsets, lanes, kChunk);
    } else if (m.space == Space::global || place.address < kSharedWindow) {
      count_global(counters, addresses, lanes, kChunk, write);
    }
  }
}

// ---- Fragments
uint32_t slots_of(const Operand& fragment, Cell cell) {
  return static_cast<uint32_t>(elements_of(fragment)) * 4 / bytes_of(cell);
}

uint32_t get(Warp& warp, const Operand& fragment, Cell cell, uint32_t lane, uint32_t slot) {
  if (cell == Cell::f32) return words_of(warp, element_of(fragment, slot))[lane];
  return words_of(warp, element_of(fragment, slot / 2))[lane] >> 16 * (slot % 2) & 0xffff;
}

void set(Warp& warp, const Operand& fragment, Cell cell, uint32_t lane, uint32_t slot, uint32_t bits) {
  uint32_t& word = words_of(warp, element_of(fragment, cell == Cell::f32 ? slot : slot / 2))[lane];
  word = cell == Cell::f32 ? bits : slot % 2 ? (word & 0xffff) | bits << 16 : bits;
}

bool execute_load(Warp& warp, const Instruction& i, uint32_t mask) {
  require_whole_warp(warp, i, mask);
  const Matrix m(i);
  const Place place = place_of(warp, i, m, i.operands[1]);
  const Operand& fragment = i.operands[0];
  const uint32_t slots = slots_of(fragment, m.cell);
  std::vector<uint32_t> elements(m.count());
  for (uint32_t e = 0; e < m.count(); ++e)
    read_memory(warp, i, m.space, place.address + m.offset(e, place.stride), bytes_of(m.cell), &elements[e],
                static_cast<int>(e / slots));
  count(warp, m, place, false);
  for (uint32_t s = 0; s < kLanes * slots; ++s)
    set(warp, fragment, m.cell, s / slots, s % slots, elements[s % m.count()]);
  return true;
}

bool execute_store(Warp& warp, const Instruction& i, uint32_t mask) {
  require_whole_warp(warp, i, mask);
  const Matrix m(i);
  const Place place = place_of(warp, i, m, i.operands[0]);
  const uint32_t slots = slots_of(i.operands[1], m.cell);
  for (uint32_t e = 0; e < m.count(); ++e) {
    const uint32_t bits = get(warp, i.operands[1], m.cell, e / slots, e % slots);
    write_memory(warp, i, m.space, place.address + m.offset(e, place.stride), bytes_of(m.cell), &bits,
                 static_cast<int>(e / slots));
  }
  count(warp, m, place, true);
  return true;
}

float value_of(uint32_t bits, Cell cell) {
  return cell == Cell::f16 ? float_of_half(static_cast<uint16_t>(bits))
                           : float_of_bits(cell == Cell::bf16 ? bits << 16 : bits);
}

// Element e of a matrix, as the first lane has it that does.
float element(Warp& warp, const Operand& fragment, Cell cell, uint32_t e) {
  const uint32_t slots = slots_of(fragment, cell);
  return value_of(get(warp, fragment, cell, e / slots, e % slots), cell);
}

// data: m and n, cell of A and B, cells of D and C. The arithmetic is that of tensor_mma.cpp.
bool execute_product(Warp& warp, const Instruction& i, uint32_t mask) {
  require_whole_warp(warp, i, mask);
  const uint32_t rows = i.data[0] & 0xff, columns = i.data[0] >> 8;
  const Cell operand = static_cast<Cell>(i.data[1]), d = static_cast<Cell>(i.data[2]), c = static_cast<Cell>(i.data[3]);
  float a[32][kDepth], b[kDepth][32];
  for (uint32_t e = 0; e < rows * kDepth; ++e) a[e / kDepth][e % kDepth] = element(warp, i.operands[1], operand, e);
  for (uint32_t e = 0; e < kDepth * columns; ++e)
    b[e / columns][e % columns] = element(warp, i.operands[2], operand, e);
  std::vector<float> sums(rows * columns);
  for (uint32_t e = 0; e < rows * columns; ++e) {
    sums[e] = element(warp, i.operands[3], c, e);
    for (int k = 0; k < kDepth; ++k) sums[e] += a[e / columns][k] * b[k][e % columns];
  }
  const uint32_t slots = slots_of(i.operands[0], d);
  for (uint32_t e = 0; e < rows * columns; ++e)
    set(warp, i.operands[0], d, e / slots, e % slots, d == Cell::f16 ? half_of_float(sums[e]) : bits_of_float(sums[e]));
  warp.cta->cluster->counters.tensor_flop += 2ull * rows * columns * kDepth;
  return true;
}

// ---- Decoding
bool is_layout(const std::string& name) { return name == "row" || name == "col"; }

// m and n of a shape that exists with k = 16; 0 for another.
uint32_t shape_of(const std::string& name) {
  unsigned m = 0, n = 0, k = 0;
  if (std::sscanf(name.c_str(), "m%un%uk%u", &m, &n, &k) != 3 || k != kDepth) return 0;
  return (m == 16 && n == 16) || (m == 8 && n == 32) || (m == 32 && n == 8) ? m | n << 8 : 0;
}

// 32-bit registers of the fragment of a matrix.
size_t registers_of(uint32_t elements, Cell cell, bool operand) {
  if (operand && cell == Cell::f16) return 8;
  return elements * bytes_of(cell) / 4 / kLanes;
}

// wmma.load.{a,b,c}.sync.aligned.layout.shape{.ss}.type r, [p] {, stride}; wmma.store.d.… [p], r {, stride}
bool bind_access(Instruction& i) {
  const std::vector<std::string>& m = i.modifiers;
  const bool load = m[0] == "load";
  if ((m.size() != 7 && m.size() != 8) || m[2] != "sync" || m[3] != "aligned" || !is_layout(m[4])) return false;
  const uint32_t shape = shape_of(m[5]), rows = shape & 0xff, columns = shape >> 8;
  const std::string& which = m[1];
  const bool operand = which == "a" || which == "b";
  if (!shape || (load ? !operand && which != "c" : which != "d")) return false;
  Space space = Space::generic;
  if (m.size() == 8) {
    if (m[6] != "global" && m[6] != "shared" && m[6] != "shared::cta") return false;
    space = m[6] == "global" ? Space::global : Space::shared;
  }
  const std::string& type = m.back();
  if (type != "f16" && type != (operand ? "bf16" : "f32")) return false;
  const Cell cell = type == "f16" ? Cell::f16 : operand ? Cell::bf16 : Cell::f32;
  const uint32_t matrix_rows = which == "b" ? kDepth : rows, matrix_columns = which == "a" ? kDepth : columns;
  if (i.operands.size() != 2 && i.operands.size() != 3) return false;
  const Operand &fragment = i.operands[load ? 0 : 1], &address = i.operands[load ? 1 : 0];
  if (address.kind != Operand::Kind::address ||
      !is_fragment(fragment, registers_of(matrix_rows * matrix_columns, cell, operand), 32))
    return false;
  i.data[0] = matrix_rows | matrix_columns << 8;
  i.data[1] = static_cast<uint32_t>(cell);
  i.data[2] = static_cast<uint32_t>(space);
  i.data[3] = m[4] == "col";
  i.execute = load ? execute_load : execute_store;
  return true;
}

// wmma.mma.sync.aligned.layout.layout.shape.D.C of f16; ….f32.bf16.bf16.f32
bool bind_product(Instruction& i) {
  const std::vector<std::string>& m = i.modifiers;
  const bool bf16 = m.size() == 10;
  if ((m.size() != 8 && !bf16) || m[1] != "sync" || m[2] != "aligned" || !is_layout(m[3]) || !is_layout(m[4]))
    return false;
  const uint32_t shape = shape_of(m[5]), rows = shape & 0xff, columns = shape >> 8;
  const std::string &d = m[6], &c = m.back();
  if (!shape || i.operands.size() != 4 || (d != "f32" && d != "f16") || (c != "f32" && c != "f16")) return false;
  if (bf16 && (d != "f32" || m[7] != "bf16" || m[8] != "bf16" || c != "f32")) return false;
  const Cell operand = bf16 ? Cell::bf16 : Cell::f16,
             cells[2] = {d == "f32" ? Cell::f32 : Cell::f16, c == "f32" ? Cell::f32 : Cell::f16};
  if (!is_fragment(i.operands[0], registers_of(rows * columns, cells[0], false), 32) ||
      !is_fragment(i.operands[1], registers_of(rows * kDepth, operand, true), 32) ||
      !is_fragment(i.operands[2], registers_of(kDepth * columns, operand, true), 32) ||
      !is_fragment(i.operands[3], registers_of(rows * columns, cells[1], false), 32))
    return false;
  i.data[0] = shape;
  i.data[1] = static_cast<uint32_t>(operand);
  i.data[2] = static_cast<uint32_t>(cells[0]), i.data[3] = static_cast<uint32_t>(cells[1]);
  i.execute = execute_product;
  return true;
}

}  // namespace

bool bind_wmma(Instruction& i) {
  if (i.opcode != "wmma" || i.modifiers.empty()) return false;
  if (i.modifiers[0] == "mma") return bind_product(i);
  return (i.modifiers[0] == "load" || i.modifiers[0] == "store") && bind_access(i);
}

}  // namespace hoppersim
