// jet::recurrent_gated_delta_rule_verify: checks, allocation, dispatch.
#include "csrc/gated_delta_rule/recurrent/recurrent_gated_delta_rule_verify.h"

#include <vector>

#include "bindings/backend.h"
#include "bindings/launch.h"
#include "bindings/parallel.h"
#include "bindings/recurrent_inputs.h"
#include "bindings/registration.h"

namespace jet::bindings {

namespace {

Tensor recurrent_gated_delta_rule_verify(Tensor q, Tensor k, Tensor v, Tensor g, Tensor beta, Tensor state,
                                         std::optional<Tensor> state_indices, Tensor keys, Tensor updates, double scale,
                                         bool l2norm_qk) {
  Checks checks("recurrent_gated_delta_rule_verify");
  check_tokens(checks, "N", q, k, v, g, beta);
  const std::vector<int64_t> rows = check_pool(checks, state, state_indices, "q", q);
  check_drafts(checks, keys, updates, {real_dtype(q)});
  checks.device("keys", keys, "q", q);
  checks.device("updates", updates, "q", q);
  checks.written(
      {{"keys", keys}, {"updates", updates}},
      {{"q", q}, {"k", k}, {"v", v}, {"g", g}, {"beta", beta}, {"state", state}, {"state_indices", state_indices}});
  state_indices = dense(state_indices);
  RecurrentGatedDeltaRuleVerifyParams p{recurrent_params(checks, q, k, v, g, beta, scale, l2norm_qk), nullptr, nullptr};
  p.forward.pool = device_pool(state, state_indices);
  const int device = launch_device(q);
  // the kernels go by value heads; without any, k still goes to `keys`
  const bool only_keys = checks.size("H") == 0 && keys.numel() != 0;
  if (const auto reason = only_keys ? PlainReason::shape : plain_reason_of_call(device, recurrent_kernel_takes(p)))
    return call_plain<Tensor>("jet_plain::recurrent_gated_delta_rule_verify", *reason, q, k, v, g, beta, state,
                              state_indices, keys, updates, scale, l2norm_qk);
  const Tensor o = allocate(v, v.sizes());
  p.forward.o = o.mutable_data_ptr(), p.keys = keys.mutable_data_ptr(), p.updates = updates.mutable_data_ptr();
  if (device != kHost) {
    if constexpr (kWithCuda) recurrent_gated_delta_rule_verify_hopper(p, LaunchScope(q).stream());
    return o;
  }
  const RealGates gates(p.forward, q, g, beta);
  p.forward.pool = host_pool(state, state_indices, rows);
  recurrent_gated_delta_rule_verify_cpu(p, torch_parallel());
  return o;
}

const HasHopperKernel has_kernel("recurrent_gated_delta_rule_verify");

}  // namespace

JET_REGISTER(recurrent_gated_delta_rule_verify, recurrent_gated_delta_rule_verify)

}  // namespace jet::bindings
