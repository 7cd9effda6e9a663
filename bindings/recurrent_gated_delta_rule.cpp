// jet::recurrent_gated_delta_rule: checks, allocation, dispatch.
#include "csrc/gated_delta_rule/recurrent/recurrent_gated_delta_rule.h"

#include <vector>

#include "bindings/backend.h"
#include "bindings/launch.h"
#include "bindings/parallel.h"
#include "bindings/recurrent_inputs.h"
#include "bindings/registration.h"

namespace jet::bindings {

namespace {

Tensor recurrent_gated_delta_rule(Tensor q, Tensor k, Tensor v, Tensor g, Tensor beta, Tensor state,
                                  std::optional<Tensor> state_indices, double scale, bool l2norm_qk) {
  Checks checks("recurrent_gated_delta_rule");
  check_tokens(checks, "N", q, k, v, g, beta);
  const std::vector<int64_t> rows = check_pool(checks, state, state_indices, "q", q);
  checks.written({{"state", state}},
                 {{"q", q}, {"k", k}, {"v", v}, {"g", g}, {"beta", beta}, {"state_indices", state_indices}});
  state_indices = dense(state_indices);
  RecurrentGatedDeltaRuleParams p = recurrent_params(checks, q, k, v, g, beta, scale, l2norm_qk);
  p.pool = device_pool(state, state_indices);
  const int device = launch_device(q);
  if (const auto reason = plain_reason_of_call(device, recurrent_kernel_takes(p)))
    return call_plain<Tensor>("jet_plain::recurrent_gated_delta_rule", *reason, q, k, v, g, beta, state, state_indices,
                              scale, l2norm_qk);
  const Tensor o = allocate(v, v.sizes());
  p.o = o.mutable_data_ptr();
  if (device != kHost) {
    if constexpr (kWithCuda) recurrent_gated_delta_rule_hopper(p, LaunchScope(q).stream());
    return o;
  }
  const RealGates gates(p, q, g, beta);
  p.pool = host_pool(state, state_indices, rows);
  recurrent_gated_delta_rule_cpu(p, torch_parallel());
  return o;
}

const HasHopperKernel has_kernel("recurrent_gated_delta_rule");

}  // namespace

JET_REGISTER(recurrent_gated_delta_rule, recurrent_gated_delta_rule)

}  // namespace jet::bindings
