#include "tensor_map.h"

#include <cstring>

namespace hoppersim {
namespace {

constexpr int kInvalidValue = 1, kNotSupported = 801;
thread_local const char* last_error = "";

int refuse(const char* reason, int code = kInvalidValue) {
  last_error = reason;
  return code;
}

// The rules of cuTensorMapEncodeTiled for the tensor itself; nullptr when all hold.
const char* tensor_problem(uint32_t rank, const void* address, const uint64_t* extent, const uint64_t* stride) {
  const auto base = reinterpret_cast<uint64_t>(address);
  if (!address || base % 16) return "the tensor's address must be a multiple of 16";
  for (uint32_t d = 0; d < rank; ++d)
    if (extent[d] == 0 || extent[d] > 1ull << 32) return "an extent must be in 1 … 2^32";
  // Strides may overlap or be permuted: the driver accepts both.
  for (uint32_t d = 0; d + 1 < rank; ++d)
    if (stride[d] % 16 || stride[d] >= 1ull << 40) return "a stride must be a multiple of 16 below 2^40";
  return nullptr;
}

const char* box_problem(uint32_t rank, int element, const uint32_t* box, const uint32_t* element_stride,
                        Swizzle swizzle) {
  for (uint32_t d = 0; d < rank; ++d) {
    if (box[d] == 0 || box[d] > 256) return "a box dimension must be in 1 … 256";
    if (element_stride[d] == 0 || element_stride[d] > 8) return "an element stride must be in 1 … 8";
  }
  const uint32_t inner = box[0] * element;
  if (inner % 16) return "the inner box dimension must be a multiple of 16 bytes";
  if (span_of(swizzle) && inner > static_cast<uint32_t>(span_of(swizzle)))
    return "the inner box dimension must not exceed the swizzle span";
  return nullptr;
}

}  // namespace

int bytes_of(TensorType type) {
  switch (type) {
    case TensorType::u8: return 1;
    case TensorType::u16:
    case TensorType::f16:
    case TensorType::bf16: return 2;
    case TensorType::u64:
    case TensorType::s64:
    case TensorType::f64: return 8;
    default: return 4;
  }
}

bool is_float(TensorType type) { return type >= TensorType::f16; }

int span_of(Swizzle swizzle) {
  constexpr int spans[] = {0, 32, 64, 128};
  return spans[static_cast<int>(swizzle)];
}

const char* tensor_map_error() { return last_error; }

namespace {

// What both encodings have in common: arguments that are no box.
struct Arguments {
  void* map;
  uint32_t type, rank;
  const void* address;
  const uint64_t *extent, *stride;
  const uint32_t* element_stride;
  uint32_t interleave, swizzle, promotion, fill;
};

// 0, or the error that `last_error` explains.
int check(const Arguments& a, uint32_t least_rank) {
  if (!a.map || reinterpret_cast<uint64_t>(a.map) % 64) return refuse("the map must be aligned to 64 bytes");
  if (a.rank < least_rank || a.rank > kTensorRank)
    return refuse(least_rank == 1 ? "rank must be in 1 … 5" : "rank must be in 3 … 5");
  if (!a.extent || !a.element_stride || (a.rank > 1 && !a.stride)) return refuse("an array is missing");
  if (a.type > static_cast<uint32_t>(TensorType::tf32_ftz)) return refuse("data type not modelled", kNotSupported);
  if (a.interleave != 0) return refuse("interleaved layouts are not modelled", kNotSupported);
  if (a.swizzle > static_cast<uint32_t>(Swizzle::b128)) return refuse("swizzle not modelled", kNotSupported);
  if (a.promotion > 3 || a.fill > 1) return refuse("unknown L2 promotion or fill");
  if (a.fill == 1 && !is_float(static_cast<TensorType>(a.type))) return refuse("NaN fill needs a floating-point type");
  if (const char* problem = tensor_problem(a.rank, a.address, a.extent, a.stride)) return refuse(problem);
  return 0;
}

TensorMap map_of(const Arguments& a) {
  TensorMap out{};
  out.magic = kTensorMapMagic;
  out.address = reinterpret_cast<uint64_t>(a.address);
  for (uint32_t d = 0; d < kTensorRank; ++d) {
    out.extent[d] = d < a.rank ? a.extent[d] : 1;
    out.box[d] = 1;
    out.element_stride[d] = static_cast<uint8_t>(
        d < a.rank && d > 0 ? a.element_stride[d] : 1);  // without interleave dimension 0 has no stride
    if (d + 1 < kTensorRank) out.stride[d] = d + 1 < a.rank ? a.stride[d] : 0;
  }
  out.type = static_cast<TensorType>(a.type);
  out.rank = static_cast<uint8_t>(a.rank);
  out.swizzle = static_cast<Swizzle>(a.swizzle);
  out.promotion = static_cast<uint8_t>(a.promotion);
  out.fill_nan = static_cast<uint8_t>(a.fill);
  return out;
}

int put(void* map, const TensorMap& out) {
  std::memset(map, 0, 128);
  std::memcpy(map, &out, sizeof out);
  last_error = "";
  return 0;
}

// The bounding box of an im2col map.
const char* corner_problem(uint32_t rank, const uint64_t* extent, const int* lower, const int* upper) {
  constexpr int largest[] = {32767, 127, 15};  // ranks 3, 4, 5
  const int limit = largest[rank - 3];
  for (uint32_t d = 0; d < rank - 2; ++d) {
    if (lower[d] < -limit - 1 || lower[d] > limit || upper[d] < -limit - 1 || upper[d] > limit)
      return "a corner is out of the range of its rank";
    if (static_cast<int64_t>(extent[d + 1]) - 1 + upper[d] < lower[d]) return "the bounding box is empty";
  }
  return nullptr;
}

}  // namespace

int encode_tensor_map(void* map, uint32_t type, uint32_t rank, const void* address, const uint64_t* extent,
                      const uint64_t* stride, const uint32_t* box, const uint32_t* element_stride, uint32_t interleave,
                      uint32_t swizzle, uint32_t promotion, uint32_t fill) {
  const Arguments arguments{map,        type,    rank,      address, extent, stride, element_stride,
                            interleave, swizzle, promotion, fill};
  if (!box) return refuse("an array is missing");
  if (const int error = check(arguments, 1)) return error;
  const int element = bytes_of(static_cast<TensorType>(type));
  if (const char* problem = box_problem(rank, element, box, element_stride, static_cast<Swizzle>(swizzle)))
    return refuse(problem);
  TensorMap out = map_of(arguments);
  for (uint32_t d = 0; d < rank; ++d) out.box[d] = static_cast<uint16_t>(box[d]);
  return put(map, out);
}

int encode_im2col_map(void* map, uint32_t type, uint32_t rank, const void* address, const uint64_t* extent,
                      const uint64_t* stride, const int* lower, const int* upper, uint32_t channels, uint32_t pixels,
                      const uint32_t* element_stride, uint32_t interleave, uint32_t swizzle, uint32_t promotion,
                      uint32_t fill) {
  const Arguments arguments{map,        type,    rank,      address, extent, stride, element_stride,
                            interleave, swizzle, promotion, fill};
  if (!lower || !upper) return refuse("an array is missing");
  if (const int error = check(arguments, 3)) return error;
  if (const char* problem = corner_problem(rank, extent, lower, upper)) return refuse(problem);
  if (pixels == 0 || pixels > 1024) return refuse("the pixels of a column must be in 1 … 1024");
  const int element = bytes_of(static_cast<TensorType>(type));
  uint32_t box[kTensorRank] = {channels, 1, 1, 1, 1};
  if (const char* problem = box_problem(rank, element, box, element_stride, static_cast<Swizzle>(swizzle)))
    return refuse(problem);
  TensorMap out = map_of(arguments);
  out.mode = TensorMode::im2col;
  out.box[0] = static_cast<uint16_t>(channels);
  out.pixels = static_cast<uint16_t>(pixels);
  for (uint32_t d = 0; d < rank - 2; ++d) {
    out.lower[d] = static_cast<int16_t>(lower[d]);
    out.upper[d] = static_cast<int16_t>(upper[d]);
  }
  return put(map, out);
}

const char* map_problem(const TensorMap& map) {
  if (map.rank < 1 || map.rank > kTensorRank) return "its rank is not in 1 … 5";
  return tensor_problem(map.rank, reinterpret_cast<const void*>(map.address), map.extent, map.stride);
}

}  // namespace hoppersim

// For Python (hoppersim/tensor_map.py), through ctypes.
extern "C" int hoppersim_encode_tensor_map(void* map, uint32_t type, uint32_t rank, const void* address,
                                           const uint64_t* extent, const uint64_t* stride, const uint32_t* box,
                                           const uint32_t* element_stride, uint32_t swizzle, uint32_t fill) {
  return hoppersim::encode_tensor_map(map, type, rank, address, extent, stride, box, element_stride, 0, swizzle, 0,
                                      fill);
}
extern "C" int hoppersim_encode_im2col_map(void* map, uint32_t type, uint32_t rank, const void* address,
                                           const uint64_t* extent, const uint64_t* stride, const int* lower,
                                           const int* upper, uint32_t channels, uint32_t pixels,
                                           const uint32_t* element_stride, uint32_t swizzle, uint32_t fill) {
  return hoppersim::encode_im2col_map(map, type, rank, address, extent, stride, lower, upper, channels, pixels,
                                      element_stride, 0, swizzle, 0, fill);
}
extern "C" const char* hoppersim_tensor_map_error() { return hoppersim::tensor_map_error(); }
