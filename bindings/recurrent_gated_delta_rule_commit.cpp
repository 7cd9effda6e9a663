// jet::recurrent_gated_delta_rule_commit: checks, dispatch.
#include "csrc/gated_delta_rule/recurrent/recurrent_gated_delta_rule_commit.h"

#include <vector>

#include "bindings/backend.h"
#include "bindings/launch.h"
#include "bindings/parallel.h"
#include "bindings/recurrent_inputs.h"
#include "bindings/registration.h"

namespace jet::bindings {

namespace {

void recurrent_gated_delta_rule_commit(Tensor keys, Tensor updates, Tensor g, Tensor num_accepted, Tensor state,
                                       std::optional<Tensor> state_indices) {
  Checks checks("recurrent_gated_delta_rule_commit");
  check_drafts(checks, keys, updates, {ScalarType::Float, ScalarType::Double});
  check_heads(checks, "updates", "keys");
  checks.shape("g", g, {"N", "T", "H"});
  checks.floating("g", g);
  checks.device("updates", updates, "keys", keys);
  checks.device("g", g, "keys", keys);
  checks.decay("g", g);
  const std::vector<int64_t> accepted = checks.counts("num_accepted", num_accepted, "T", "keys", keys);
  const std::vector<int64_t> rows = check_pool(checks, state, state_indices, "keys", keys);
  checks.written({{"state", state}}, {{"keys", keys},
                                      {"updates", updates},
                                      {"g", g},
                                      {"num_accepted", num_accepted},
                                      {"state_indices", state_indices}});
  state_indices = dense(state_indices), num_accepted = dense(num_accepted);
  RecurrentGatedDeltaRuleCommitParams p{};
  p.g_dtype = kernel_dtype(g);
  p.N = checks.size("N"), p.T = checks.size("T");
  p.H = checks.size("H"), p.Hk = checks.size("Hk"), p.K = checks.size("K"), p.V = checks.size("V");
  p.keys = keys.const_data_ptr(), p.updates = updates.const_data_ptr();
  p.g = g.const_data_ptr(), p.g_strides = token_strides(g);
  p.num_accepted = num_accepted.const_data_ptr(), p.num_accepted_dtype = index_type(num_accepted);
  p.pool = device_pool(state, state_indices);
  const int device = launch_device(keys);
  if (const auto reason = plain_reason_of_call(device, recurrent_kernel_takes(p)))
    return call_plain<void>("jet_plain::recurrent_gated_delta_rule_commit", *reason, keys, updates, g, num_accepted,
                            state, state_indices);
  if (device != kHost) {
    if constexpr (kWithCuda) recurrent_gated_delta_rule_commit_hopper(p, LaunchScope(keys).stream());
    return;
  }
  const Tensor real_g = in_dtype(g, keys.scalar_type());
  p.g = real_g.const_data_ptr(), p.g_strides = token_strides(real_g), p.g_dtype = kernel_dtype(real_g);
  p.num_accepted = accepted.data(), p.num_accepted_dtype = IndexType::i64;
  p.pool = host_pool(state, state_indices, rows);
  recurrent_gated_delta_rule_commit_cpu(p, torch_parallel());
}

const HasHopperKernel has_kernel("recurrent_gated_delta_rule_commit");

}  // namespace

JET_REGISTER(recurrent_gated_delta_rule_commit, recurrent_gated_delta_rule_commit)

}  // namespace jet::bindings
