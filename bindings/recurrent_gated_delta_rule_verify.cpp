// jet::recurrent_gated_delta_rule_verify: checks, allocation, dispatch.
#include "csrc/gated_delta_rule/recurrent/recurrent_gated_delta_rule_verify.h"

#include <vector>

#include "bindings/backend.h"
#include "bindings/launch_scope.h"
#include "bindings/recurrent_inputs.h"
#include "bindings/registration.h"
#include "bindings/torch_parallel.h"

namespace jet::bindings {

namespace {

Tensor recurrent_gated_delta_rule_verify(Tokens x, PoolArguments pool, Drafts drafts, Scaling scaling) {
  Checks checks("recurrent_gated_delta_rule_verify");
  check_tokens(checks, "N", x);
  const std::vector<int64_t> rows = check_pool(checks, pool, "q", x.q);
  check_drafts(checks, drafts, {real_dtype(x.q)});
  checks.device("keys", drafts.keys, "q", x.q);
  checks.device("updates", drafts.updates, "q", x.q);
  checks.written({{"keys", drafts.keys}, {"updates", drafts.updates}}, x.named(),
                 {{"state", pool.state}, {"state_indices", pool.state_indices}});
  pool.state_indices = dense(pool.state_indices);
  RecurrentGatedDeltaRuleVerifyParams p{.forward = {.in = inputs(x, scaling),
                                                    .pool = state_pool(pool.state, index_vector(pool.state_indices)),
                                                    .o = nullptr},
                                        .keys = nullptr,
                                        .updates = nullptr};
  const int device = launch_device(x.q);
  // the kernels go by value heads; without any, k still goes to `keys`
  const bool only_keys = checks.size("H") == 0 && drafts.keys.numel() != 0;
  if (const auto reason = plain_reason_of_call(device, !only_keys && recurrent_kernel_takes(p), !only_keys))
    return call_plain<Tensor>("jet_plain::recurrent_gated_delta_rule_verify", *reason, x, pool, drafts, scaling);
  const Tensor o = allocate(x.v, x.v.sizes());
  p.forward.o = o.mutable_data_ptr();
  p.keys = drafts.keys.mutable_data_ptr(), p.updates = drafts.updates.mutable_data_ptr();
  if (device != kHost) {
    if constexpr (kWithCuda) recurrent_gated_delta_rule_verify_hopper(p, LaunchScope(x.q).stream());
    return o;
  }
  make_gates_real(x, p.forward.in);
  p.forward.pool.rows = index_vector(rows);
  recurrent_gated_delta_rule_verify_cpu(p, torch_parallel());
  return o;
}

}  // namespace

JET_REGISTER(recurrent_gated_delta_rule_verify, recurrent_gated_delta_rule_verify)

}  // namespace jet::bindings
