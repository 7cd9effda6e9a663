// Argument checks of the ops: every wrong argument is refused here, before anything is allocated or launched, with
// one line that names the op, the argument, the dimension, what it got and what it needs.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <initializer_list>
#include <optional>
#include <span>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#include "bindings/torch_tensors.h"

namespace jet::bindings {

inline const char* dtype_name(ScalarType type) {
  switch (type) {
    case ScalarType::Float: return "float32";
    case ScalarType::Double: return "float64";
    case ScalarType::BFloat16: return "bfloat16";
    case ScalarType::Half: return "float16";
    case ScalarType::Int: return "int32";
    case ScalarType::Long: return "int64";
    case ScalarType::Bool: return "bool";
    case ScalarType::Byte: return "uint8";
    case ScalarType::Char: return "int8";
    case ScalarType::Short: return "int16";
    default: return "another dtype";
  }
}

// The dtype of `t`; Undefined for one that the stable interface of torch does not know.
inline ScalarType scalar_type(const Tensor& t) {
  try {
    return t.scalar_type();
  } catch (const std::exception&) {
    return ScalarType::Undefined;
  }
}

inline std::string device_name(const torch::stable::Device& device) {
  std::string name = device.is_cuda() ? "cuda" : device.is_cpu() ? "cpu" : "another device";
  if (device.is_cuda() && device.has_index()) name += ":" + std::to_string(static_cast<int>(device.index()));
  return name;
}

template <class Numbers>
std::string list_text(const Numbers& numbers) {
  std::string text = "[";
  for (const auto number : numbers) text += (text.size() > 1 ? "," : "") + std::to_string(number);
  return text + "]";
}

inline std::string shape_text(const Tensor& t) { return list_text(t.sizes()); }

class Checks {
 public:
  explicit Checks(const char* op) : op_(op) { bounds_.reserve(12); }

  template <class... Parts>
  [[noreturn]] void fail(const Parts&... parts) const {
    std::ostringstream message;
    message << op_ << ": ";
    (message << ... << parts);
    throw std::runtime_error(message.str());
  }

  // Checks the rank against `dims` (symbols as in the schema, e.g. {"B", "T", "Hk", "K"}), and every symbol against
  // the size it had where it was first seen. `size` reads a bound symbol. It is the first check of every argument: None
  // arrives as a Tensor that is not defined.
  void shape(const char* name, const Tensor& t, std::initializer_list<const char*> dims) {
    if (!t.defined()) fail(name, " must be a Tensor, got None");
    if (t.dim() != static_cast<int64_t>(dims.size()))
      fail(name, " must have ", dims.size(), " dimensions ", list(dims), ", got ", t.dim(), " with shape ",
           shape_text(t));
    const auto sizes = t.sizes();
    std::size_t i = 0;
    for (const char* symbol : dims) {
      const int64_t got = sizes[i];
      if (const Bound* bound = find(symbol)) {
        if (bound->size != got)
          fail(name, " ", list(dims), " dimension ", i, " must be ", symbol, " = ", bound->size, " (", bound->how,
               bound->name, "), got ", got);
      } else {
        bind(symbol, got, "as in ", name);
      }
      ++i;
    }
  }

  // Checks that `t` is [.., C], of a rank that `allocate` makes.
  void rows(const char* name, const Tensor& t) const {
    if (!t.defined()) fail(name, " must be a Tensor, got None");
    if (t.dim() < 1 || t.dim() > 8)
      fail(name, " must have 1 to 8 dimensions, got ", t.dim(), " with shape ", shape_text(t));
  }

  void shape_like(const char* name, const Tensor& t, const char* like_name, const Tensor& like) const {
    if (!t.defined()) fail(name, " must be a Tensor, got None");
    const auto got = t.sizes(), need = like.sizes();
    if (got.size() != need.size() || !std::equal(got.begin(), got.end(), need.begin()))
      fail(name, " must have the shape ", list_text(need), " of ", like_name, ", got ", list_text(got));
  }

  // Shape, dtype and device.
  void same(const char* name, const Tensor& t, const char* like_name, const Tensor& like) const {
    shape_like(name, t, like_name, like);
    dtype_like(name, t, like_name, like);
    device(name, t, like_name, like);
  }

  // Binds a symbol whose size follows from other arguments; `how` and `name` complete "K = 96 (…)".
  void bind(const char* symbol, int64_t size, const char* how, const char* name) {
    bounds_.push_back({symbol, size, how, name});
  }

  int64_t size(const char* symbol) const { return find(symbol)->size; }

  void device(const char* name, const Tensor& t, const char* like_name, const Tensor& like) const {
    if (t.device() != like.device())
      fail(name, " must be on ", device_name(like.device()), " like ", like_name, ", got ", device_name(t.device()));
  }

  void floating(const char* name, const Tensor& t) const {
    dtype(name, t, {ScalarType::Float, ScalarType::BFloat16, ScalarType::Half, ScalarType::Double});
  }

  void dtype(const char* name, const Tensor& t, std::initializer_list<ScalarType> allowed) const {
    std::string names;
    const ScalarType got = scalar_type(t);
    for (ScalarType type : allowed)
      if (got == type) return;
    for (ScalarType type : allowed) names += (names.empty() ? "" : " or ") + std::string(dtype_name(type));
    fail(name, " must be ", names, ", got ", dtype_name(got));
  }

  void dtype_like(const char* name, const Tensor& t, const char* like_name, const Tensor& like) const {
    if (scalar_type(t) != like.scalar_type())
      fail(name, " must be ", dtype_name(like.scalar_type()), " like ", like_name, ", got ",
           dtype_name(scalar_type(t)));
  }

  // For parameters, which may be kept in fp32.
  void dtype_like_or_fp32(const char* name, const Tensor& t, const char* like_name, const Tensor& like) const {
    if (scalar_type(t) != ScalarType::Float) dtype_like(name, t, like_name, like);
  }

  void contiguous(const char* name, const Tensor& t) const {
    if (!t.is_contiguous())
      fail(name, " must be contiguous, got strides ", list_text(t.strides()), " for shape ", shape_text(t));
  }

  // For `tensors`, which are written in place: no two of their elements share memory, and none shares memory with
  // `inputs` or `others`.
  struct Named {
    Named(const char* name, const Tensor& t) : name(name), tensor(&t) {}
    Named(const char* name, const OptionalTensor& t) : name(name), tensor(t ? &*t : nullptr) {}
    const char* name;
    const Tensor* tensor;  // nothing: it was not given
  };
  void written(std::initializer_list<Named> tensors, std::initializer_list<Named> others) const {
    written(tensors, {}, others);
  }
  void written(std::initializer_list<Named> tensors, std::span<const Named> inputs,
               std::initializer_list<Named> others) const;

  // Checks that no g is above 0, where the host may read it. NaN is for the arithmetic to spread.
  void decay(const char* name, const Tensor& g) const;

  // Checks cu_seqlens [N+1] against B = 1 and T, binds N, and returns the offsets where they may be read on the host
  // (on a CPU always, on CUDA under JETKERNELS_CHECK=1; empty otherwise). Without cu_seqlens N is B.
  std::vector<int64_t> sequences(const OptionalTensor& cu_seqlens, const char* like_name, const Tensor& like);

  // Checks state_indices [N] against P rows. Values are read where the host may read them: each must be below P,
  // and no row may be named twice. Returns them (negative: no row); empty when they may not be read or are absent.
  std::vector<int64_t> state_rows(const OptionalTensor& state_indices, const char* like_name, const Tensor& like);

  // Checks `t` [symbol] of int32 or int64. Returns the values where the host may read them, or nothing.
  std::vector<int64_t> indices(const char* name, const Tensor& t, const char* symbol, const char* like_name,
                               const Tensor& like);

  // The same for [N], and that each value is in 0..`most` (a bound symbol).
  std::vector<int64_t> counts(const char* name, const Tensor& t, const char* most, const char* like_name,
                              const Tensor& like);

 private:
  struct Bound {
    const char* symbol;
    int64_t size;
    const char* how;
    const char* name;
  };

  const Bound* find(const char* symbol) const {
    for (const Bound& bound : bounds_)
      if (std::strcmp(bound.symbol, symbol) == 0) return &bound;
    return nullptr;
  }

  static std::string list(std::initializer_list<const char*> dims) {
    std::string text = "[";
    for (const char* symbol : dims) text += (text.size() > 1 ? "," : "") + std::string(symbol);
    return text + "]";
  }

  const char* op_;
  std::vector<Bound> bounds_;
};

}  // namespace jet::bindings
