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

const char* box_problem(uint32_t rank, int element, const uint32_t* box, const uint32_t* element_stride, Swizzle swizzle) {
  for (uint32_t d = 0; d < rank; ++d) {
    if (box[d] == 0 || box[d] > 256) return "a box dimension must be in 1 … 256";
    if (element_stride[d] == 0 || element_stride[d] > 8) return "an element stride must be in 1 … 8";
  }
  const uint32_t inner = box[0] * element;
  if (inner % 16) return "the inner box dimension must be a multiple of 16 bytes";
  if (span_of(swizzle) && inner > static_cast<uint32_t>(span_of(swizzle))) return "the inner box dimension must not exceed the swizzle span";
  return nullptr;
}

}  // namespace

int bytes_of(TensorType type) {
  switch (type) {
    case TensorType::u8: return 1;
    case TensorType::u16: case TensorType::f16: case TensorType::bf16: return 2;
    case TensorType::u64: case TensorType::s64: case TensorType::f64: return 8;
    default: return 4;
  }
}

bool is_float(TensorType type) { return type >= TensorType::f16; }

int span_of(Swizzle swizzle) {
  constexpr int spans[] = {0, 32, 64, 128};
  return spans[static_cast<int>(swizzle)];
}

const char* tensor_map_error() { return last_error; }

int encode_tensor_map(void* map, uint32_t type, uint32_t rank, const void* address, const uint64_t* extent,
                      const uint64_t* stride, const uint32_t* box, const uint32_t* element_stride, uint32_t interleave,
                      uint32_t swizzle, uint32_t promotion, uint32_t fill) {
  if (!map || reinterpret_cast<uint64_t>(map) % 64) return refuse("the map must be aligned to 64 bytes");
  if (rank < 1 || rank > kTensorRank) return refuse("rank must be in 1 … 5");
  if (!extent || !box || !element_stride || (rank > 1 && !stride)) return refuse("an array is missing");
  if (type > static_cast<uint32_t>(TensorType::tf32_ftz)) return refuse("data type not modelled", kNotSupported);
  if (interleave != 0) return refuse("interleaved layouts are not modelled", kNotSupported);
  if (swizzle > static_cast<uint32_t>(Swizzle::b128)) return refuse("swizzle not modelled", kNotSupported);
  if (promotion > 3 || fill > 1) return refuse("unknown L2 promotion or fill");
  const auto kind = static_cast<TensorType>(type);
  if (fill == 1 && !is_float(kind)) return refuse("NaN fill needs a floating-point type");
  const int element = bytes_of(kind);
  if (const char* problem = tensor_problem(rank, address, extent, stride)) return refuse(problem);
  if (const char* problem = box_problem(rank, element, box, element_stride, static_cast<Swizzle>(swizzle))) return refuse(problem);

  TensorMap out{};
  out.magic = kTensorMapMagic;
  out.address = reinterpret_cast<uint64_t>(address);
  for (uint32_t d = 0; d < kTensorRank; ++d) {
    out.extent[d] = d < rank ? extent[d] : 1;
    out.box[d] = static_cast<uint16_t>(d < rank ? box[d] : 1);
    out.element_stride[d] = static_cast<uint8_t>(d < rank && d > 0 ? element_stride[d] : 1);  // without interleave dimension 0 has no stride
    if (d + 1 < kTensorRank) out.stride[d] = d + 1 < rank ? stride[d] : 0;
  }
  out.type = kind;
  out.rank = static_cast<uint8_t>(rank);
  out.swizzle = static_cast<Swizzle>(swizzle);
  out.promotion = static_cast<uint8_t>(promotion);
  out.fill_nan = static_cast<uint8_t>(fill);
  std::memset(map, 0, 128);
  std::memcpy(map, &out, sizeof out);
  last_error = "";
  return 0;
}

}  // namespace hoppersim

// For Python (hoppersim/tensor_map.py), through ctypes.
extern "C" int hoppersim_encode_tensor_map(void* map, uint32_t type, uint32_t rank, const void* address, const uint64_t* extent,
                                           const uint64_t* stride, const uint32_t* box, const uint32_t* element_stride,
                                           uint32_t swizzle, uint32_t fill) {
  return hoppersim::encode_tensor_map(map, type, rank, address, extent, stride, box, element_stride, 0, swizzle, 0, fill);
}
extern "C" const char* hoppersim_tensor_map_error() { return hoppersim::tensor_map_error(); }
