#include "tests/simulated/kernels/gemm_variants.h"

// Clusters of 2 CTAs that share B by multicast; both operands K-major, 128-byte swizzle.
extern "C" int gemm_multicast(const jet::hopper::test::GemmProblem* problem, char* message) {
  using namespace jet::hopper;
  using namespace jet::hopper::test;
  return guarded(message, [&] {
    run_gemm<GemmConfig<jet::bf16, false, Swizzle::b128, Major::k, Major::k, 2>>(*problem, nullptr);
  });
}
