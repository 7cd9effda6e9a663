#include "bindings/checks.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <utility>

namespace jet::bindings {

namespace {

bool host_may_read(const Tensor& t) {
  static const bool check_cuda = [] {
    const char* value = std::getenv("JETKERNELS_CHECK");
    return value != nullptr && std::strcmp(value, "1") == 0;
  }();
  return t.device().is_cpu() || check_cuda;
}

Tensor on_host(const Tensor& t) {
  return t.device().is_cpu() ? t : torch::stable::to(t, torch::stable::Device(torch::headeronly::DeviceType::CPU));
}

std::vector<int64_t> host_values(const Tensor& t) {
  const Tensor host = dense(on_host(t));
  std::vector<int64_t> values(static_cast<std::size_t>(host.numel()));
  for (std::size_t i = 0; i < values.size(); ++i)
    values[i] = host.scalar_type() == ScalarType::Int ? static_cast<const int32_t*>(host.const_data_ptr())[i]
                                                      : static_cast<const int64_t*>(host.const_data_ptr())[i];
  return values;
}

int64_t item_size(const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Double:
    case ScalarType::Long: return 8;
    case ScalarType::Float:
    case ScalarType::Int: return 4;
    case ScalarType::Bool: return 1;
    default: return 2;  // bfloat16, float16: the checks before let nothing else through
  }
}

// The bytes that a tensor with elements occupies: `rows` blocks of `span` bytes, `pitch` apart. What dimension 0 does
// not lay out in blocks one after the other is one block.
struct Footprint {
  explicit Footprint(const Tensor& t) : begin(reinterpret_cast<uintptr_t>(t.const_data_ptr())) {
    const int64_t item = item_size(t);
    const auto sizes = t.sizes(), strides = t.strides();
    for (std::size_t i = 1; i < sizes.size(); ++i) span += (sizes[i] - 1) * strides[i];
    span *= item;
    if (sizes[0] > 1 && strides[0] * item >= span)
      rows = sizes[0], pitch = strides[0] * item;
    else
      span += (sizes[0] - 1) * strides[0] * item;
  }

  uintptr_t row(int64_t i) const { return begin + static_cast<uintptr_t>(i * pitch); }
  uintptr_t end() const { return row(rows - 1) + static_cast<uintptr_t>(span); }

  bool meets(const Footprint& other) const {
    if (end() <= other.begin || other.end() <= begin) return false;
    for (int64_t i = 0; i < other.rows; ++i)
      if (meets(other.row(i), other.span)) return true;
    return false;
  }

  uintptr_t begin;
  int64_t rows = 1, pitch = 0, span = 1;

 private:
  bool meets(uintptr_t block, int64_t bytes) const {
    if (end() <= block || block + static_cast<uintptr_t>(bytes) <= begin) return false;
    // the first row that ends after the block begins
    const int64_t before = static_cast<int64_t>(block - begin) - span;
    const int64_t first = pitch == 0 || before < 0 ? 0 : before / pitch + 1;
    return first < rows && row(first) < block + static_cast<uintptr_t>(bytes);
  }
};

using Dims = std::vector<std::pair<int64_t, int64_t>>;  // stride, size

bool overlap(Dims dims) {
  std::sort(dims.begin(), dims.end());
  int64_t inner = 0;  // offset of the last element of the dimensions so far
  for (const auto& [stride, size] : dims) {
    if (size <= 1) continue;
    if (stride <= inner) return true;
    inner += stride * (size - 1);
  }
  return false;
}

bool overlaps_itself(const Tensor& t) {
  Dims dims;
  for (int64_t i = 0; i < t.dim(); ++i) dims.emplace_back(t.stride(i), t.size(i));
  return overlap(std::move(dims));
}

// Whether tensors of the same strides lie in each other's gaps, as keys and values of one tensor do: the distance
// between them is one more dimension, of size 2.
bool are_interleaved(const Tensor& a, const Tensor& b) {
  const int64_t item = item_size(a);
  const int64_t bytes = static_cast<const char*>(b.const_data_ptr()) - static_cast<const char*>(a.const_data_ptr());
  if (a.dim() != b.dim() || item_size(b) != item || bytes % item != 0) return false;
  Dims dims{{std::abs(bytes / item), 2}};
  for (int64_t i = 0; i < a.dim(); ++i) {
    if (a.size(i) > 1 && b.size(i) > 1 && a.stride(i) != b.stride(i)) return false;
    dims.emplace_back(a.size(i) > 1 ? a.stride(i) : b.stride(i), std::max(a.size(i), b.size(i)));
  }
  return !overlap(std::move(dims));
}

// The place of an element of g [B,T,H] above 0, or nothing. `Bits` is the signed integer of the element's size,
// `infinity` the bits of inf: in between lie the positive numbers, above it the NaNs.
template <class Bits>
std::vector<int64_t> positive_place(const Tensor& g, Bits infinity) {
  const Bits* p = static_cast<const Bits*>(g.const_data_ptr());
  const int64_t B = g.size(0), T = g.size(1), H = g.size(2), b_stride = g.stride(0), t_stride = g.stride(1),
                h_stride = g.stride(2);
  for (int64_t b = 0; b < B; ++b)
    for (int64_t t = 0; t < T; ++t) {
      const Bits* row = p + b * b_stride + t * t_stride;
      for (int64_t h = 0; h < H; ++h)
        if (const Bits bits = row[h * h_stride]; bits > 0 && bits <= infinity) return {b, t, h};
    }
  return {};
}

std::vector<int64_t> positive_place(const Tensor& g) {
  switch (g.scalar_type()) {
    case ScalarType::Double: return positive_place<int64_t>(g, 0x7ff0000000000000);
    case ScalarType::Float: return positive_place<int32_t>(g, 0x7f800000);
    case ScalarType::BFloat16: return positive_place<int16_t>(g, 0x7f80);
    default: return positive_place<int16_t>(g, 0x7c00);
  }
}

}  // namespace

void Checks::written(std::initializer_list<Named> tensors, std::span<const Named> inputs,
                     std::initializer_list<Named> others) const {
  for (const Named* here = tensors.begin(); here != tensors.end(); ++here) {
    const Tensor& t = *here->tensor;
    if (t.numel() == 0) continue;
    if (!t.is_contiguous() && overlaps_itself(t))
      fail(here->name, " is written in place and must not overlap itself, got strides ", list_text(t.strides()),
           " for shape ", shape_text(t));
    const Footprint footprint(t);
    const auto apart = [&](const Named& other) {
      if (other.tensor != nullptr && other.tensor->numel() != 0 && footprint.meets(Footprint(*other.tensor)) &&
          !are_interleaved(t, *other.tensor))
        fail(here->name, " is written in place and must not share memory with ", other.name);
    };
    for (const Named* next = here + 1; next != tensors.end(); ++next) apart(*next);
    for (const Named& input : inputs) apart(input);
    for (const Named& other : others) apart(other);
  }
}

void Checks::decay(const char* name, const Tensor& g) const {
  if (!host_may_read(g)) return;
  const Tensor host = on_host(g);
  const std::vector<int64_t> place = positive_place(host);
  if (place.empty()) return;
  const Tensor values = in_dtype(host, ScalarType::Double);
  const auto* value = static_cast<const double*>(values.const_data_ptr());
  for (int64_t i = 0; i < 3; ++i) value += place[i] * values.stride(i);
  fail(name, " must be <= 0 (the logarithm of a decay), got ", *value, " at ", list_text(place));
}

std::vector<int64_t> Checks::sequences(const OptionalTensor& cu_seqlens, const char* like_name, const Tensor& like) {
  const int64_t B = size("B"), T = size("T");
  if (!cu_seqlens) {
    bind("N", B, "as B", "");
    return {};
  }
  const Tensor& t = *cu_seqlens;
  if (t.dim() != 1 || t.size(0) < 1)
    fail("cu_seqlens must have 1 dimension [N+1] with N >= 0, got shape ", shape_text(t));
  dtype("cu_seqlens", t, {ScalarType::Int, ScalarType::Long});
  device("cu_seqlens", t, like_name, like);
  if (B != 1) fail(like_name, " dimension 0 (B) must be 1 with cu_seqlens, got ", B);
  bind("N", t.size(0) - 1, "from ", "cu_seqlens");
  if (!host_may_read(t)) return {};
  std::vector<int64_t> offsets = host_values(t);
  if (offsets.front() != 0) fail("cu_seqlens[0] must be 0, got ", offsets.front());
  for (std::size_t i = 1; i < offsets.size(); ++i)
    if (offsets[i] < offsets[i - 1])
      fail("cu_seqlens must not decrease, got cu_seqlens[", i, "] = ", offsets[i], " after ", offsets[i - 1]);
  if (offsets.back() != T) fail("cu_seqlens[", offsets.size() - 1, "] must be T = ", T, ", got ", offsets.back());
  return offsets;
}

std::vector<int64_t> Checks::state_rows(const OptionalTensor& state_indices, const char* like_name,
                                        const Tensor& like) {
  const int64_t N = size("N"), P = size("P");
  if (!state_indices) {
    if (P < N) fail("the state pool must have at least N = ", N, " rows without state_indices, got P = ", P);
    return {};
  }
  std::vector<int64_t> rows = indices("state_indices", *state_indices, "N", like_name, like);
  std::vector<int64_t> owner(static_cast<std::size_t>(P), -1);
  for (std::size_t n = 0; n < rows.size(); ++n) {
    const int64_t row = rows[n];
    if (row < 0) continue;
    if (row >= P) fail("state_indices[", n, "] must be below P = ", P, ", got ", row);
    if (owner[row] >= 0) fail("state_indices must name each row once, got row ", row, " at ", owner[row], " and ", n);
    owner[row] = static_cast<int64_t>(n);
  }
  return rows;
}

std::vector<int64_t> Checks::indices(const char* name, const Tensor& t, const char* symbol, const char* like_name,
                                     const Tensor& like) {
  shape(name, t, {symbol});
  dtype(name, t, {ScalarType::Int, ScalarType::Long});
  device(name, t, like_name, like);
  return host_may_read(t) ? host_values(t) : std::vector<int64_t>();
}

std::vector<int64_t> Checks::counts(const char* name, const Tensor& t, const char* most, const char* like_name,
                                    const Tensor& like) {
  std::vector<int64_t> values = indices(name, t, "N", like_name, like);
  for (std::size_t n = 0; n < values.size(); ++n)
    if (values[n] < 0 || values[n] > size(most))
      fail(name, "[", n, "] must be in 0..", most, " = ", size(most), ", got ", values[n]);
  return values;
}

}  // namespace jet::bindings
