// ldmatrix, stmatrix, movmatrix: synchronous, one warp.
#include "races.h"
#include "tensor.h"
#include "tensor_warp.h"

namespace hoppersim {
namespace {

uint32_t row_lanes(const Instruction& i) { return static_cast<uint32_t>((1ull << 8 * i.data[0]) - 1); }

// data: matrices, transposed, Space. Row r of matrix j is at the address of lane 8 j + r.
void row_addresses(Warp& warp, const Instruction& i, const Operand& operand, uint64_t* addresses) {
  auto space = static_cast<Space>(i.data[2]);
  uint32_t offsets[kLanes] = {}, lanes = row_lanes(i);
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
  require_whole_warp(warp, i, mask);
  uint64_t addresses[kLanes];
  row_addresses(warp, i, i.operands[1], addresses);
  uint16_t matrices[4][8][8];  // all read before any register is written: the address may be among the targets
  for (uint32_t lane = 0; lane < 8 * i.data[0]; ++lane) {
    read_memory(warp, i, static_cast<Space>(i.data[2]), addresses[lane], 16, matrices[lane / 8][lane % 8],
                static_cast<int>(lane));
  }
  note_reads(warp, i, static_cast<Space>(i.data[2]), addresses, row_lanes(i), 16);
  for (uint32_t j = 0; j < i.data[0]; ++j) {
    uint32_t* words = words_of(warp, element_of(i.operands[0], j));
    for (int lane = 0; lane < kLanes; ++lane) {
      words[lane] = element_at(matrices[j], lane, 0, i.data[1]) |
                    static_cast<uint32_t>(element_at(matrices[j], lane, 1, i.data[1])) << 16;
    }
  }
  return true;
}

bool execute_stmatrix(Warp& warp, const Instruction& i, uint32_t mask) {
  require_whole_warp(warp, i, mask);
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
  note_writes(warp, i, static_cast<Space>(i.data[2]), addresses, row_lanes(i), 16);
  return true;
}

bool execute_movmatrix(Warp& warp, const Instruction& i, uint32_t mask) {
  require_whole_warp(warp, i, mask);
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

// ldmatrix.sync.aligned.m8n8.x4{.trans}{.shared}.b16 r, [p]; stmatrix likewise with [p], r; movmatrix.….m8n8.trans.b16
// d, a
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
    if (!i.data[1] || i.data[0] || i.operands[0].kind != Operand::Kind::reg || i.operands[1].kind != Operand::Kind::reg)
      return false;
    i.execute = execute_movmatrix;
    return true;
  }
  const Operand &registers = i.operands[load ? 0 : 1], &address = i.operands[load ? 1 : 0];
  if (i.data[0] == 0 || elements_of(registers) != i.data[0] || address.kind != Operand::Kind::address) return false;
  i.execute = load ? execute_ldmatrix : execute_stmatrix;
  return true;
}

}  // namespace hoppersim
