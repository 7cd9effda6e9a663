// jet::recurrent_gated_delta_rule: checks, allocation, dispatch.
#include "csrc/gated_delta_rule/recurrent/recurrent_gated_delta_rule.h"

#include <vector>

#include "bindings/backend.h"
#include "bindings/launch_scope.h"
#include "bindings/recurrent_inputs.h"
#include "bindings/registration.h"
#include "bindings/torch_parallel.h"

namespace jet::bindings {

namespace {

Tensor recurrent_gated_delta_rule(Tokens x, PoolArguments pool, Scaling scaling) {
  Checks checks("recurrent_gated_delta_rule");
  check_tokens(checks, "N", x);
  const std::vector<int64_t> rows = check_pool(checks, pool, "q", x.q);
  checks.written({{"state", pool.state}}, x.named(), {{"state_indices", pool.state_indices}});
  pool.state_indices = dense(pool.state_indices);
  RecurrentGatedDeltaRuleParams p{
      .in = inputs(x, scaling), .pool = state_pool(pool.state, index_vector(pool.state_indices)), .o = nullptr};
  const int device = launch_device(x.q);
  if (const auto reason = plain_reason_of_call(device, recurrent_kernel_takes(p)))
    return call_plain<Tensor>("jet_plain::recurrent_gated_delta_rule", *reason, x, pool, scaling);
  const Tensor o = allocate(x.v, x.v.sizes());
  p.o = o.mutable_data_ptr();
  if (device != kHost) {
    if constexpr (kWithCuda) recurrent_gated_delta_rule_hopper(p, LaunchScope(x.q).stream());
    return o;
  }
  make_gates_real(x, p.in);
  p.pool.rows = index_vector(rows);
  recurrent_gated_delta_rule_cpu(p, torch_parallel());
  return o;
}

}  // namespace

JET_REGISTER(recurrent_gated_delta_rule, recurrent_gated_delta_rule)

}  // namespace jet::bindings
