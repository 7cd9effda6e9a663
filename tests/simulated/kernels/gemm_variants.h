// The GEMM variants of one element type and one source of A, chosen at run time; each .cu that includes this makes one
// launcher.
#pragma once

#include "tests/simulated/kernels/gemm.h"
#include "tests/simulated/kernels/guarded.h"

namespace jet::hopper::test {

template <class Element, bool registers_a, Swizzle swizzle, Major major_a>
void run_major_b(bool b_is_mn, const GemmProblem& p) {
  if (b_is_mn)
    run_gemm<GemmConfig<Element, registers_a, swizzle, major_a, Major::mn>>(p, nullptr);
  else
    run_gemm<GemmConfig<Element, registers_a, swizzle, major_a, Major::k>>(p, nullptr);
}

template <class Element, bool registers_a, Swizzle swizzle>
void run_swizzle(bool a_is_mn, bool b_is_mn, const GemmProblem& p) {
  if constexpr (!registers_a) {
    if (a_is_mn) return run_major_b<Element, registers_a, swizzle, Major::mn>(b_is_mn, p);
  }
  require(!registers_a || !a_is_mn, "gemm", "A", "K-major when it goes through registers", 1);
  run_major_b<Element, registers_a, swizzle, Major::k>(b_is_mn, p);
}

// `swizzle` is the row of a panel in bytes: 16 (none), 32, 64, 128.
template <class Element, bool registers_a>
void run_variant(int swizzle, bool a_is_mn, bool b_is_mn, const GemmProblem& p) {
  switch (swizzle) {
    case 16: return run_swizzle<Element, registers_a, Swizzle::none>(a_is_mn, b_is_mn, p);
    case 32: return run_swizzle<Element, registers_a, Swizzle::b32>(a_is_mn, b_is_mn, p);
    case 64: return run_swizzle<Element, registers_a, Swizzle::b64>(a_is_mn, b_is_mn, p);
    case 128: return run_swizzle<Element, registers_a, Swizzle::b128>(a_is_mn, b_is_mn, p);
    default: require(false, "gemm", "swizzle", "16, 32, 64 or 128", swizzle);
  }
}

}  // namespace jet::hopper::test
