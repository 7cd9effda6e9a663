// jet::recurrent_gated_delta_rule_commit: checks, dispatch.
#include "csrc/gated_delta_rule/recurrent/recurrent_gated_delta_rule_commit.h"

#include <vector>

#include "bindings/backend.h"
#include "bindings/launch_scope.h"
#include "bindings/recurrent_inputs.h"
#include "bindings/registration.h"
#include "bindings/torch_parallel.h"

namespace jet::bindings {

namespace {

void recurrent_gated_delta_rule_commit(Drafts drafts, Tensor g, Tensor num_accepted, PoolArguments pool) {
  Checks checks("recurrent_gated_delta_rule_commit");
  const Tensor &keys = drafts.keys, &updates = drafts.updates;
  check_drafts(checks, drafts, {ScalarType::Float, ScalarType::Double});
  check_heads(checks, "updates", "keys");
  checks.shape("g", g, {"N", "T", "H"});
  checks.floating("g", g);
  checks.device("updates", updates, "keys", keys);
  checks.device("g", g, "keys", keys);
  checks.decay("g", g);
  const std::vector<int64_t> accepted = checks.counts("num_accepted", num_accepted, "T", "keys", keys);
  const std::vector<int64_t> rows = check_pool(checks, pool, "keys", keys);
  checks.written({{"state", pool.state}}, {{"keys", keys},
                                           {"updates", updates},
                                           {"g", g},
                                           {"num_accepted", num_accepted},
                                           {"state_indices", pool.state_indices}});
  pool.state_indices = dense(pool.state_indices), num_accepted = dense(num_accepted);
  RecurrentGatedDeltaRuleCommitParams p{.N = checks.size("N"),
                                        .T = checks.size("T"),
                                        .H = checks.size("H"),
                                        .Hk = checks.size("Hk"),
                                        .K = checks.size("K"),
                                        .V = checks.size("V"),
                                        .keys = keys.const_data_ptr(),
                                        .updates = updates.const_data_ptr(),
                                        .g = gate_tensor(g),
                                        .num_accepted = index_vector(num_accepted),
                                        .pool = state_pool(pool.state, index_vector(pool.state_indices))};
  const int device = launch_device(keys);
  if (const auto reason = plain_reason_of_call(device, recurrent_kernel_takes(p)))
    return call_plain<void>("jet_plain::recurrent_gated_delta_rule_commit", *reason, drafts, g, num_accepted, pool);
  if (device != kHost) {
    if constexpr (kWithCuda) recurrent_gated_delta_rule_commit_hopper(p, LaunchScope(keys).stream());
    return;
  }
  const Tensor real_g = in_dtype(g, keys.scalar_type());
  p.g = gate_tensor(real_g);
  p.num_accepted = index_vector(accepted);
  p.pool.rows = index_vector(rows);
  recurrent_gated_delta_rule_commit_cpu(p, torch_parallel());
}

}  // namespace

JET_REGISTER(recurrent_gated_delta_rule_commit, recurrent_gated_delta_rule_commit)

}  // namespace jet::bindings
