// Sigmoid and softplus in fp32; device side. NaN stays NaN.
#pragma once

#include <cuda_runtime.h>

namespace jet::hopper {

// 1 / (1 + e^-z) with the hardware's 2^x and 1 / x: relative error about 1e-6 down to z = -87. Below, e^-z or its
// inverse leaves the range of fp32 and this is 0: so silu(z) is -0, where its true value is above -2e-36, and NaN at
// z = -inf, as -inf * 0 is.
__device__ inline float fast_sigmoid(float z) {
  float power, inverse;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(z * -1.442695041f));  // log2(e)
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(inverse) : "f"(1.0f + power));
  return inverse;
}

// 1 / (1 + e^-z), good to 3e-7 everywhere; e^-z may be infinite, its inverse is then 0.
__device__ inline float sigmoid(float z) { return 1.0f / (1.0f + expf(-z)); }

// log(1 + e^z), good to 3e-7: z for a large z, e^z for a very negative one. No exponent is positive.
__device__ inline float softplus(float z) { return fmaxf(z, 0.0f) + log1pf(expf(-fabsf(z))); }

}  // namespace jet::hopper
