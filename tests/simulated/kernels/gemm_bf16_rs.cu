#include "tests/simulated/kernels/gemm_variants.h"

extern "C" int gemm_bf16_rs(int swizzle, int a_is_mn, int b_is_mn, const jet::hopper::test::GemmProblem* problem,
                            char* message) {
  using namespace jet::hopper::test;
  return guarded(message, [&] { run_variant<jet::bf16, true>(swizzle, a_is_mn != 0, b_is_mn != 0, *problem); });
}
