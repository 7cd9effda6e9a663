// Tensor maps (CUtensorMap, TMA descriptors): built and checked on the host for the copies of tma.h.
#pragma once

#include <cuda.h>
#include <cudaTypedefs.h>
#include <cuda_runtime.h>

#include <string>

#include "csrc/hopper/error.h"
#include "csrc/hopper/layout.h"

namespace jet::hopper {

// Arguments of cuTensorMapEncodeTiled: a tensor of up to 5 dimensions, dimension 0 contiguous, and the box that one
// copy moves. Elements of a box that lie outside the tensor are read as zero and not written.
struct TensorMapPlan {
  const char* name;          // for errors
  const void* data;          // 16-byte aligned
  Dtype dtype;               // f32, bf16 or f16
  int rank;                  // 1..5
  uint64_t extent[5];        // globalDim: elements, >= 1
  uint64_t stride_bytes[5];  // globalStrides; [0] is not read (it is the element size); multiples of 16, below 2^40
  uint32_t box[5];  // boxDim: elements, 1..256; box[0] * element size is a multiple of 16, at most the swizzle's row
  Swizzle swizzle;
  uint32_t step[5] = {1, 1, 1, 1, 1};  // elementStrides: the box has every step[d]-th element of dimension d, box[d] /
                                       // step[d] of them rounded up; [0] is not read
};

inline PFN_cuTensorMapEncodeTiled_v12000 tensor_map_encoder() {
  // Asked of the driver at run time, so that the library links without libcuda.
  static const PFN_cuTensorMapEncodeTiled_v12000 encoder = [] {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult found = cudaDriverEntryPointSymbolNotFound;
    check(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &found),
          "tensor map");
    require(found == cudaDriverEntryPointSuccess, "tensor map", "driver",
            "one that knows cuTensorMapEncodeTiled (CUDA 12.0)", found);
    return reinterpret_cast<PFN_cuTensorMapEncodeTiled_v12000>(function);
  }();
  return encoder;
}

inline void check_tensor_map(const TensorMapPlan& p, int element_bytes) {
  const auto need = [&](bool holds, const std::string& argument, const char* expected, uint64_t got) {
    require(holds, "tensor map", std::string(p.name) + " " + argument, expected, static_cast<long long>(got));
  };
  need(p.rank >= 1 && p.rank <= 5, "rank", "1..5", p.rank);
  need(reinterpret_cast<uintptr_t>(p.data) % 16 == 0, "address", "a multiple of 16",
       reinterpret_cast<uintptr_t>(p.data));
  for (int d = 0; d < p.rank; ++d) {
    const std::string at = "[" + std::to_string(d) + "]";
    need(p.extent[d] >= 1 && p.extent[d] <= (1ull << 32), "extent" + at, "1..2^32", p.extent[d]);
    need(p.box[d] >= 1 && p.box[d] <= 256, "box" + at, "1..256", p.box[d]);
    if (d == 0) continue;
    need(p.step[d] >= 1 && p.step[d] <= 8, "step" + at, "1..8", p.step[d]);
    const uint64_t stride = p.stride_bytes[d];
    need(stride % 16 == 0 && stride < (1ull << 40), "stride" + at, "a multiple of 16 below 2^40 bytes", stride);
  }
  const uint64_t row = uint64_t{p.box[0]} * element_bytes;
  need(row % 16 == 0, "box[0]", "a multiple of 16 bytes", row);
  need(p.swizzle == Swizzle::none || row <= static_cast<uint64_t>(p.swizzle), "box[0]",
       "at most the swizzle's row, in bytes", row);
}

inline CUtensorMap make_tensor_map(const TensorMapPlan& p) {
  const int element_bytes = p.dtype == Dtype::f32 ? 4 : 2;
  require(p.dtype != Dtype::f64, "tensor map", std::string(p.name) + " dtype", "f32, bf16 or f16",
          static_cast<int>(p.dtype));
  check_tensor_map(p, element_bytes);
  const CUtensorMapDataType type = p.dtype == Dtype::f32    ? CU_TENSOR_MAP_DATA_TYPE_FLOAT32
                                   : p.dtype == Dtype::bf16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16
                                                            : CU_TENSOR_MAP_DATA_TYPE_FLOAT16;
  const CUtensorMapSwizzle swizzle = p.swizzle == Swizzle::b128  ? CU_TENSOR_MAP_SWIZZLE_128B
                                     : p.swizzle == Swizzle::b64 ? CU_TENSOR_MAP_SWIZZLE_64B
                                     : p.swizzle == Swizzle::b32 ? CU_TENSOR_MAP_SWIZZLE_32B
                                                                 : CU_TENSOR_MAP_SWIZZLE_NONE;
  // Not the result itself: GCC 12 has put that at addresses that are no multiple of 64, as the driver wants them.
  struct {
    CUtensorMap map;
  } encoded;
  const CUresult status = tensor_map_encoder()(
      &encoded.map, type, p.rank, const_cast<void*>(p.data), p.extent, p.stride_bytes + 1, p.box, p.step,
      CU_TENSOR_MAP_INTERLEAVE_NONE, swizzle, CU_TENSOR_MAP_L2_PROMOTION_L2_128B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  require(status == CUDA_SUCCESS, "tensor map", std::string(p.name) + " cuTensorMapEncodeTiled", "CUDA_SUCCESS (0)",
          status);
  return encoded.map;
}

// The map of a matrix [rows, columns] (row stride in elements) whose boxes fill the panels of `Tile` (layout.h).
template <class Tile>
CUtensorMap make_operand_map(const char* name, const void* data, Dtype dtype, uint64_t rows, uint64_t columns,
                             uint64_t row_stride, uint32_t box_rows = Tile::rows) {
  const uint64_t element_bytes = dtype == Dtype::f32 ? 4 : 2;
  const uint32_t box_columns = Tile::panel_width;
  return make_tensor_map(
      {name, data, dtype, 2, {columns, rows}, {0, row_stride * element_bytes}, {box_columns, box_rows}, Tile::swizzle});
}

}  // namespace jet::hopper
