// The simulator's encoding of a CUtensorMap: 128 bytes that only it reads, with a magic number.
#pragma once

#include <cstddef>
#include <cstdint>

namespace hoppersim {

constexpr uint64_t kTensorMapMagic = 0x70616d726f736e74ull;  // "tnsormap"
constexpr int kTensorRank = 5, kSpatialRank = 3;

// Numbers of the driver's enumerations (cuda.h: CUtensorMapDataType, …Interleave, …Swizzle, …FloatOOBfill).
enum class TensorType : uint8_t { u8, u16, u32, s32, u64, s64, f16, f32, f64, bf16, f32_ftz, tf32, tf32_ftz };
enum class Swizzle : uint8_t { none, b32, b64, b128 };
enum class TensorMode : uint8_t { tile, im2col };

struct TensorMap {
  uint64_t magic;
  TensorType type;
  uint8_t rank;
  // CuTe clears bit 21 of the second 8 bytes, for drivers older than CUDA 13.2 that set it wrongly: nothing lies there.
  uint8_t unused;
  uint8_t interleave;
  Swizzle swizzle;
  uint8_t promotion;
  uint8_t fill_nan;
  TensorMode mode;
  uint64_t address;
  uint64_t extent[kTensorRank];      // elements; dimension 0 is contiguous
  uint64_t stride[kTensorRank - 1];  // bytes, of dimensions 1 …
  uint16_t box[kTensorRank];         // elements of the tensor the box spans
  uint8_t element_stride[kTensorRank];
  // im2col: box[0] is the channels of a pixel. The bounding box of the pixels' positions spans lower … extent - 1 +
  // upper in each spatial dimension (W, H, D).
  uint16_t pixels;
  int16_t lower[kSpatialRank], upper[kSpatialRank];
};
static_assert(offsetof(TensorMap, unused) == 8 + 21 / 8, "where CuTe clears a bit");
static_assert(sizeof(TensorMap) <= 128, "a CUtensorMap has 128 bytes");

int bytes_of(TensorType type);
bool is_float(TensorType type);
// Bytes after which the pattern of a swizzle repeats in a row: 0 (none), 32, 64, 128.
int span_of(Swizzle swizzle);
// Where the copy engine puts the byte that belongs at shared `offset`: 16-byte chunks are exchanged by the offset's own
// bits.
inline uint32_t swizzled(Swizzle swizzle, uint32_t offset) {
  switch (swizzle) {
    case Swizzle::none: return offset;
    case Swizzle::b32: return offset ^ ((offset >> 3) & 0x10);
    case Swizzle::b64: return offset ^ ((offset >> 3) & 0x30);
    case Swizzle::b128: return offset ^ ((offset >> 3) & 0x70);
  }
  return offset;
}

// cuTensorMapEncodeTiled: the arguments and checks of the driver, its CUresult (0: success, 1: invalid value, 801: not
// modelled here). `map` must be aligned to 64 bytes.
int encode_tensor_map(void* map, uint32_t type, uint32_t rank, const void* address, const uint64_t* extent,
                      const uint64_t* stride, const uint32_t* box, const uint32_t* element_stride, uint32_t interleave,
                      uint32_t swizzle, uint32_t promotion, uint32_t fill);
// cuTensorMapEncodeIm2col, likewise. The corners have rank - 2 values, in the order W, H, D.
int encode_im2col_map(void* map, uint32_t type, uint32_t rank, const void* address, const uint64_t* extent,
                      const uint64_t* stride, const int* lower, const int* upper, uint32_t channels, uint32_t pixels,
                      const uint32_t* element_stride, uint32_t interleave, uint32_t swizzle, uint32_t promotion,
                      uint32_t fill);
// What a copy would trip over in a map that a kernel has modified; nullptr when all is well.
const char* map_problem(const TensorMap& map);
// Why the last encode of this thread returned an error.
const char* tensor_map_error();

}  // namespace hoppersim
