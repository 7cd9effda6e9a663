// Launches of the recurrent kernel: recurrent_gated_delta_rule, its verify and its commit. In one file, as most of the
// time to compile one of them would go to what they share.
#include "csrc/gated_delta_rule/recurrent/kernel.cuh"
#include "csrc/hopper/device.h"

namespace jet {
namespace hopper {
namespace {

template <class State, int tile, RecurrentMode mode>
void launch_recurrent(const char* op, RecurrentArguments& p, int slices, cudaStream_t stream) {
  using Config = RecurrentConfig<State, tile, mode>;
  p.tokens = p.T < kMaxTokens ? p.T : kMaxTokens;
  p.columns = slices * tile;
  p.heads = p.columns > p.V && p.V % tile == 0 ? p.columns / p.V : 1;
  p.parts = Divisor((p.V + p.columns - 1) / p.columns), p.head_groups = Divisor(p.H / p.heads);
  p.group = Divisor(p.H / p.Hk), p.width = Divisor(p.V);
  const int64_t ctas = p.N * p.head_groups.d * p.parts.d;
  require(ctas < (int64_t{1} << 31), op, "N * H * V / 32", "below 2^31", ctas);
  LaunchShape shape{dim3(static_cast<unsigned>(ctas)), 2 * p.K, 4 * static_cast<int>(RecurrentShared::floats(p, tile))};
  shape.programmatic = true;
  launch(op, shape, stream, recurrent_kernel<Config>, p);
}

// All of `p` but the tiles is filled in.
template <RecurrentMode mode>
void launch_recurrent(const char* op, RecurrentArguments& p, void* stream) {
  if (p.N * p.H == 0 || p.T == 0) return;
  const RecurrentTiles tiles =
      choose_recurrent_tiles(p.pool.dtype, p.N, p.T, p.H, p.Hk, p.V, current_device_facts().multiprocessors);
  const auto on = [&](auto tile) {
    if (p.pool.dtype == Dtype::f32)
      launch_recurrent<float, tile.value, mode>(op, p, tiles.slices, static_cast<cudaStream_t>(stream));
    else
      launch_recurrent<bf16, tile.value, mode>(op, p, tiles.slices, static_cast<cudaStream_t>(stream));
  };
  if (tiles.tile == 64) return on(std::integral_constant<int, 64>());
  on(std::integral_constant<int, 32>());
}

// The arguments that step and verify share.
RecurrentArguments recurrent_arguments(const RecurrentGatedDeltaRuleParams& p) {
  RecurrentArguments a{};
  a.N = p.N, a.T = static_cast<int>(p.T), a.H = p.H, a.Hk = p.Hk, a.K = static_cast<int>(p.K),
  a.V = static_cast<int>(p.V);
  a.scale = static_cast<float>(p.scale), a.l2norm_qk = p.l2norm_qk;
  a.q = token_tensor(p.q, p.dtype, p.q_strides), a.k = token_tensor(p.k, p.dtype, p.k_strides),
  a.v = token_tensor(p.v, p.dtype, p.v_strides);
  a.g = token_tensor(p.g, p.g_dtype, p.g_strides), a.beta = token_tensor(p.beta, p.beta_dtype, p.beta_strides);
  a.pool = p.pool, a.o = p.o, a.o_dtype = p.dtype;
  return a;
}

}  // namespace
}  // namespace hopper

void recurrent_gated_delta_rule_hopper(const RecurrentGatedDeltaRuleParams& p, void* stream) {
  hopper::RecurrentArguments a = hopper::recurrent_arguments(p);
  hopper::launch_recurrent<hopper::RecurrentMode::step>("recurrent_gated_delta_rule", a, stream);
}

void recurrent_gated_delta_rule_verify_hopper(const RecurrentGatedDeltaRuleVerifyParams& p, void* stream) {
  hopper::RecurrentArguments a = hopper::recurrent_arguments(p.forward);
  a.keys = static_cast<float*>(p.keys), a.updates = static_cast<float*>(p.updates);
  hopper::launch_recurrent<hopper::RecurrentMode::verify>("recurrent_gated_delta_rule_verify", a, stream);
}

void recurrent_gated_delta_rule_commit_hopper(const RecurrentGatedDeltaRuleCommitParams& p, void* stream) {
  hopper::RecurrentArguments a{};
  a.N = p.N, a.T = static_cast<int>(p.T), a.H = p.H, a.Hk = p.Hk, a.K = static_cast<int>(p.K),
  a.V = static_cast<int>(p.V);
  a.k = hopper::token_tensor(p.keys, Dtype::f32, {p.T * p.Hk * p.K, p.Hk * p.K, p.K, 1});
  a.v = hopper::token_tensor(p.updates, Dtype::f32, {p.T * p.H * p.V, p.H * p.V, p.V, 1});
  a.g = hopper::token_tensor(p.g, p.g_dtype, p.g_strides);
  a.num_accepted = p.num_accepted, a.num_accepted_dtype = p.num_accepted_dtype;
  a.pool = p.pool;
  hopper::launch_recurrent<hopper::RecurrentMode::commit>("recurrent_gated_delta_rule_commit", a, stream);
}

}  // namespace jet
