#include "bindings/checks.h"

#include <cstdlib>
#include <cstring>

namespace jet::bindings {

namespace {

bool host_may_read(const Tensor& t) {
  static const bool check_cuda = [] {
    const char* value = std::getenv("JETKERNELS_CHECK");
    return value != nullptr && std::strcmp(value, "1") == 0;
  }();
  return t.device().is_cpu() || check_cuda;
}

std::vector<int64_t> host_values(const Tensor& t) {
  const torch::stable::Device cpu(torch::headeronly::DeviceType::CPU);
  const Tensor host = torch::stable::contiguous(torch::stable::to(t, cpu));
  std::vector<int64_t> values(static_cast<std::size_t>(host.numel()));
  for (std::size_t i = 0; i < values.size(); ++i)
    values[i] = host.scalar_type() == ScalarType::Int ? static_cast<const int32_t*>(host.const_data_ptr())[i]
                                                      : static_cast<const int64_t*>(host.const_data_ptr())[i];
  return values;
}

}  // namespace

std::vector<int64_t> Checks::sequences(const std::optional<Tensor>& cu_seqlens, const char* like_name, const Tensor& like) {
  const int64_t B = size("B"), T = size("T");
  if (!cu_seqlens) {
    bind("N", B, "as B");
    return {};
  }
  const Tensor& t = *cu_seqlens;
  if (t.dim() != 1 || t.size(0) < 1) fail("cu_seqlens must have 1 dimension [N+1] with N >= 0, got shape ", shape_text(t));
  dtype("cu_seqlens", t, {ScalarType::Int, ScalarType::Long});
  device("cu_seqlens", t, like_name, like);
  if (B != 1) fail(like_name, " dimension 0 (B) must be 1 with cu_seqlens, got ", B);
  bind("N", t.size(0) - 1, "from cu_seqlens");
  if (!host_may_read(t)) return {};
  std::vector<int64_t> offsets = host_values(t);
  if (offsets.front() != 0) fail("cu_seqlens[0] must be 0, got ", offsets.front());
  for (std::size_t i = 1; i < offsets.size(); ++i)
    if (offsets[i] < offsets[i - 1])
      fail("cu_seqlens must not decrease, got cu_seqlens[", i, "] = ", offsets[i], " after ", offsets[i - 1]);
  if (offsets.back() != T) fail("cu_seqlens[", offsets.size() - 1, "] must be T = ", T, ", got ", offsets.back());
  return offsets;
}

std::vector<int64_t> Checks::state_rows(const std::optional<Tensor>& state_indices, const char* like_name, const Tensor& like) {
  const int64_t N = size("N"), P = size("P");
  if (!state_indices) {
    if (P < N) fail("the state pool must have at least N = ", N, " rows without state_indices, got P = ", P);
    return {};
  }
  const Tensor& t = *state_indices;
  shape("state_indices", t, {"N"});
  dtype("state_indices", t, {ScalarType::Int, ScalarType::Long});
  device("state_indices", t, like_name, like);
  if (!host_may_read(t)) return {};
  std::vector<int64_t> rows = host_values(t);
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

std::vector<int64_t> Checks::counts(const char* name, const Tensor& t, const char* most, const char* like_name,
                                    const Tensor& like) {
  shape(name, t, {"N"});
  dtype(name, t, {ScalarType::Int, ScalarType::Long});
  device(name, t, like_name, like);
  if (!host_may_read(t)) return {};
  std::vector<int64_t> values = host_values(t);
  for (std::size_t n = 0; n < values.size(); ++n)
    if (values[n] < 0 || values[n] > size(most))
      fail(name, "[", n, "] must be in 0..", most, " = ", size(most), ", got ", values[n]);
  return values;
}

}  // namespace jet::bindings
