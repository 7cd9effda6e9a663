// Element types shared by the CPU and CUDA code.
#pragma once

#include <cstdint>

namespace jet {

enum class Dtype : int32_t { f32, f64, bf16, f16 };

struct bf16 {
  uint16_t bits;
};

struct f16 {
  uint16_t bits;
};

}  // namespace jet
