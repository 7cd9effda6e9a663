// Driver entry points that host code asks the runtime for.
#include <cuda.h>

#include <cstring>

#include "runtime.h"
#include "tensor_map.h"

namespace hoppersim {

namespace {

CUresult encode_tiled(CUtensorMap* map, CUtensorMapDataType type, cuuint32_t rank, void* address,
                      const cuuint64_t* extent, const cuuint64_t* stride, const cuuint32_t* box,
                      const cuuint32_t* element_stride, CUtensorMapInterleave interleave, CUtensorMapSwizzle swizzle,
                      CUtensorMapL2promotion promotion, CUtensorMapFloatOOBfill fill) {
  return static_cast<CUresult>(encode_tensor_map(map, type, rank, address, extent, stride, box, element_stride,
                                                 interleave, swizzle, promotion, fill));
}

CUresult encode_im2col(CUtensorMap* map, CUtensorMapDataType type, cuuint32_t rank, void* address,
                       const cuuint64_t* extent, const cuuint64_t* stride, const int* lower, const int* upper,
                       cuuint32_t channels, cuuint32_t pixels, const cuuint32_t* element_stride,
                       CUtensorMapInterleave interleave, CUtensorMapSwizzle swizzle, CUtensorMapL2promotion promotion,
                       CUtensorMapFloatOOBfill fill) {
  return static_cast<CUresult>(encode_im2col_map(map, type, rank, address, extent, stride, lower, upper, channels,
                                                 pixels, element_stride, interleave, swizzle, promotion, fill));
}

CUresult error_string(CUresult error, const char** text) {
  switch (error) {
    case CUDA_SUCCESS: *text = "no error"; return CUDA_SUCCESS;
    case CUDA_ERROR_INVALID_VALUE:
    case CUDA_ERROR_NOT_SUPPORTED: *text = tensor_map_error(); return CUDA_SUCCESS;
    default: *text = nullptr; return CUDA_ERROR_INVALID_VALUE;
  }
}

}  // namespace

void* driver_entry(const char* name) {
  if (std::strcmp(name, "cuTensorMapEncodeTiled") == 0) return reinterpret_cast<void*>(&encode_tiled);
  if (std::strcmp(name, "cuTensorMapEncodeIm2col") == 0) return reinterpret_cast<void*>(&encode_im2col);
  if (std::strcmp(name, "cuGetErrorString") == 0) return reinterpret_cast<void*>(&error_string);
  return nullptr;
}

}  // namespace hoppersim

// CUTLASS's host code names the entry point directly where it is linked against the driver.
extern "C" CUresult cuTensorMapEncodeTiled(CUtensorMap* map, CUtensorMapDataType type, cuuint32_t rank, void* address,
                                           const cuuint64_t* extent, const cuuint64_t* stride, const cuuint32_t* box,
                                           const cuuint32_t* element_stride, CUtensorMapInterleave interleave,
                                           CUtensorMapSwizzle swizzle, CUtensorMapL2promotion promotion,
                                           CUtensorMapFloatOOBfill fill) {
  return hoppersim::encode_tiled(map, type, rank, address, extent, stride, box, element_stride, interleave, swizzle,
                                 promotion, fill);
}

extern "C" CUresult cuTensorMapEncodeIm2col(CUtensorMap* map, CUtensorMapDataType type, cuuint32_t rank, void* address,
                                            const cuuint64_t* extent, const cuuint64_t* stride, const int* lower,
                                            const int* upper, cuuint32_t channels, cuuint32_t pixels,
                                            const cuuint32_t* element_stride, CUtensorMapInterleave interleave,
                                            CUtensorMapSwizzle swizzle, CUtensorMapL2promotion promotion,
                                            CUtensorMapFloatOOBfill fill) {
  return hoppersim::encode_im2col(map, type, rank, address, extent, stride, lower, upper, channels, pixels,
                                  element_stride, interleave, swizzle, promotion, fill);
}

extern "C" CUresult cuGetErrorString(CUresult error, const char** text) { return hoppersim::error_string(error, text); }
