// Element types shared by the CPU and CUDA code.
#pragma once

#include <cstdint>

namespace jet {

enum class Dtype : int32_t { f32, f64, bf16, f16 };
enum class IndexType : int32_t { i32, i64 };

struct bf16 {
  uint16_t bits;
};

struct f16 {
  uint16_t bits;
};

}  // namespace jet
