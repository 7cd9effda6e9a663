// jet::prefill_gated_delta_rule: checks, allocation, dispatch.
#include "csrc/gated_delta_rule/chunk/prefill_gated_delta_rule.h"

#include <algorithm>
#include <tuple>
#include <vector>

#include "bindings/backend.h"
#include "bindings/launch_scope.h"
#include "bindings/recurrent_inputs.h"
#include "bindings/registration.h"
#include "bindings/torch_parallel.h"

namespace jet::bindings {

namespace {

struct Prefill {
  Tensor cu_seqlens;
  OptionalTensor has_initial_state;

  auto tie() const { return std::tie(cu_seqlens, has_initial_state); }
};

struct Marks {
  OptionalTensor tokens, rows;

  auto tie() const { return std::tie(tokens, rows); }
};

// What the host may read of a call; empty: not given, or on a device.
struct HostValues {
  std::vector<int64_t> offsets, rows, mark_tokens, mark_rows;
};

// That each mark is behind a whole chunk or at the end of its sequence, and has a row of its own.
void check_marks(const Checks& checks, const HostValues& values) {
  const auto& [offsets, state_rows, tokens, rows] = values;
  const int64_t P = checks.size("P"), T = checks.size("T");
  std::vector<bool> row_is_used(static_cast<std::size_t>(P)), token_is_marked(static_cast<std::size_t>(T + 1));
  for (int64_t n = 0; n < checks.size("N"); ++n)
    if (const int64_t row = state_rows.empty() ? n : state_rows[n]; row >= 0) row_is_used[row] = true;
  for (std::size_t m = 0; m < rows.size(); ++m) {
    const int64_t row = rows[m], token = tokens[m];
    if (row < 0) continue;
    if (row >= P) checks.fail("mark_indices[", m, "] must be below P = ", P, ", got ", row);
    if (row_is_used[row])
      checks.fail("mark_indices[", m, "] must be a row that no sequence and no other mark has, got ", row);
    if (token < 1 || token > T) checks.fail("mark_tokens[", m, "] must be in 1..T = ", T, ", got ", token);
    if (token_is_marked[token]) checks.fail("mark_tokens must name each token once, got ", token, " again at ", m);
    const auto end = std::lower_bound(offsets.begin(), offsets.end(), token);
    if (*end != token && (token - *(end - 1)) % kChunk != 0)
      checks.fail("mark_tokens[", m, "] must be a multiple of ", kChunk,
                  " tokens behind the beginning of its sequence, or its end, got ", token, " in a sequence of ",
                  *(end - 1), "..", *end);
    row_is_used[row] = token_is_marked[token] = true;
  }
}

HostValues check(Checks& checks, const Tokens& x, const Prefill& prefill, const PoolArguments& pool,
                 const Marks& marks) {
  HostValues values;
  check_tokens(checks, "B", x);
  if (!prefill.cu_seqlens.defined()) checks.fail("cu_seqlens must be a Tensor, got None");
  values.offsets = checks.sequences(prefill.cu_seqlens, "q", x.q);
  values.rows = check_pool(checks, pool, "q", x.q);
  if (const OptionalTensor& has = prefill.has_initial_state) {
    checks.shape("has_initial_state", *has, {"N"});
    checks.dtype("has_initial_state", *has, {ScalarType::Bool});
    checks.device("has_initial_state", *has, "q", x.q);
  }
  if (marks.tokens.has_value() != marks.rows.has_value())
    checks.fail("mark_tokens and mark_indices go together, got only ", marks.tokens ? "mark_tokens" : "mark_indices");
  if (marks.tokens) {
    values.mark_tokens = checks.indices("mark_tokens", *marks.tokens, "M", "q", x.q);
    values.mark_rows = checks.indices("mark_indices", *marks.rows, "M", "q", x.q);
    if (!values.mark_rows.empty()) check_marks(checks, values);
  }
  checks.written({{"state", pool.state}}, x.named(),
                 {{"state_indices", pool.state_indices},
                  {"cu_seqlens", prefill.cu_seqlens},
                  {"has_initial_state", prefill.has_initial_state},
                  {"mark_tokens", marks.tokens},
                  {"mark_indices", marks.rows}});
  return values;
}

Tensor prefill_gated_delta_rule(Tokens x, PoolArguments pool, Prefill prefill, Marks marks, Scaling scaling) {
  Checks checks("prefill_gated_delta_rule");
  const HostValues values = check(checks, x, prefill, pool, marks);
  PrefillGatedDeltaRuleParams p{.forward = {.in = inputs(x, scaling),
                                            .N = checks.size("N"),
                                            .initial_state = {},
                                            .cu_seqlens = index_vector(values.offsets),
                                            .o = nullptr,
                                            .final_state = nullptr},
                                .states = {.pool = state_pool(pool.state, index_vector(values.rows)),
                                           .has_initial_state = nullptr,
                                           .M = marks.tokens ? checks.size("M") : 0,
                                           .mark_tokens = index_vector(values.mark_tokens),
                                           .mark_rows = index_vector(values.mark_rows)}};
  const int device = launch_device(x.q);
  if (const auto reason = plain_reason_of_call(device, chunk_kernel_takes(p.forward)))
    return call_plain<Tensor>("jet_plain::prefill_gated_delta_rule", *reason, x, pool, prefill, marks, scaling);
  make_gates_real(x, p.forward.in);
  const OptionalTensor has_initial_state = dense(prefill.has_initial_state);
  if (has_initial_state) p.states.has_initial_state = static_cast<const uint8_t*>(has_initial_state->const_data_ptr());
  const Tensor o = allocate(x.v, x.v.sizes());
  p.forward.o = o.mutable_data_ptr();
  if (device == kHost) {
    prefill_gated_delta_rule_cpu(p, torch_parallel());
    return o;
  }
  const Tensor q = readable(x.q), k = readable(x.k), v = readable(x.v), cu_seqlens = dense(prefill.cu_seqlens);
  const OptionalTensor rows = dense(pool.state_indices), mark_tokens = dense(marks.tokens),
                       mark_rows = dense(marks.rows);
  GatedDeltaRuleInputs& in = p.forward.in;
  in.q = token_tensor(q), in.k = token_tensor(k), in.v = token_tensor(v);
  p.forward.cu_seqlens = index_vector(cu_seqlens), p.states.pool.rows = index_vector(rows);
  p.states.mark_tokens = index_vector(mark_tokens), p.states.mark_rows = index_vector(mark_rows);
  if constexpr (kWithCuda) {
    const LaunchScope scope(q);
    const Tensor workspace = allocate(q, {prefill_gated_delta_rule_workspace(p)}, ScalarType::Byte);
    prefill_gated_delta_rule_hopper(p, workspace.mutable_data_ptr(), scope.stream());
  }
  return o;
}

}  // namespace

JET_REGISTER(prefill_gated_delta_rule, prefill_gated_delta_rule)

}  // namespace jet::bindings
