// wgmma, mma.sync, ldmatrix, stmatrix, movmatrix: what the parser and the interpreter call.
//
// Registers of a wgmma are touched by hardware between its issue and the wait_group that covers it. Checking that on
// every instruction would be slow, so the parser marks, once per function, the instructions that can touch such
// registers:
//
//   parse_ptx, after a function is decoded:      mark_wgmma_registers(function);
//   interpreter, before executing instruction i: if (i.wgmma_registers && check_registers(warp, i, mask)) { next pc }
//   interpreter, when the last lane of a warp exits: check_wgmma_exit(warp, i);
#pragma once

#include "ptx.h"

namespace hoppersim {

// Sets Instruction::wgmma_registers of everything but wgmma itself.
void mark_wgmma_registers(Function& function);

// Faults when the instruction touches a register of an outstanding wgmma; remembers the access for the wgmma.fence
// check. Returns true when the instruction is done: a `mov` of an outstanding accumulator is a renaming made by the
// compiler (PTX is in virtual registers), so it joins the outstanding work instead of reading.
bool check_registers(Warp& warp, const Instruction& instruction, uint32_t mask);

// Faults when a warp ends with wgmma operations that it has not waited for.
void check_wgmma_exit(const Warp& warp, const Instruction& instruction);

// Byte offsets, in shared memory, of the 16-byte units of an operand tile that a matrix descriptor names.
// K-major: rows [first, first + count), `units` of them per row. MN-major: columns of k, count / 8 units of 8 elements
// each with `depth` values of k. Order: [row][unit] and [unit][k]. Throws std::invalid_argument for what is not
// modelled.
struct MatrixDescriptor {
  explicit MatrixDescriptor(uint64_t bits);
  uint32_t start, leading, stride;  // bytes
  int swizzle;                      // 0, 1, 2, 3: none, 32, 64, 128 bytes
  bool aligned() const;             // its tile starts where its swizzle does
  void units_k_major(int first, int count, uint32_t units, std::vector<uint32_t>& out) const;
  void units_mn_major(int first, int count, int depth, std::vector<uint32_t>& out) const;

 private:
  uint32_t swizzled(uint32_t address) const;
};

// tensor_mma.cpp: mma.sync and the matrix moves.
bool bind_mma(Instruction& instruction);
bool bind_matrix_move(Instruction& instruction);
bool bind_wmma(Instruction& instruction);  // tensor_wmma.cpp

}  // namespace hoppersim
