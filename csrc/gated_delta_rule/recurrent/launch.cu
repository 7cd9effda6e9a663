// Launches of the recurrent kernel: recurrent_gated_delta_rule, its verify and its commit. In one file, as most of the
// time to compile one of them would go to what they share.
#include <type_traits>

#include "csrc/gated_delta_rule/recurrent/kernel.cuh"
#include "csrc/hopper/device.h"

namespace jet {
namespace hopper {
namespace {

// All of `p` but the tiles is filled in.
template <RecurrentMode mode>
void launch_recurrent(const char* op, RecurrentArguments& p, void* stream) {
  if (p.N * p.H == 0 || p.T == 0) return;
  require(HopperHeadDims::has(p.K), op, "K", "a head dim of head_dims.h", p.K);
  const StateOrder order = state_order(p.pool);
  const RecurrentTiles tiles = choose_recurrent_tiles(p.pool.dtype, order, p.N, p.T, p.H, p.Hk, p.V,
                                                      current_device_properties().multiprocessors);
  p.tokens = p.T < kMaxTokens ? p.T : kMaxTokens;
  p.slices = tiles.slices, p.columns = tiles.slices * tiles.tile;
  p.heads = p.columns > p.V && p.V % tiles.tile == 0 ? p.columns / p.V : 1;
  p.parts = Divisor((p.V + p.columns - 1) / p.columns), p.head_groups = Divisor(p.H / p.heads);
  p.group = Divisor(p.H / p.Hk), p.width = Divisor(p.V);
  const int64_t ctas = p.N * p.head_groups.d * p.parts.d;
  require(ctas < (int64_t{1} << 31), op, "N * H * V / 32", "below 2^31", ctas);
  const auto launch_kernel = [&](auto state, auto tile) {
    const auto launch_order = [&](auto v_first) {
      using Config = RecurrentConfig<typename decltype(state)::type, tile, mode, v_first>;
      launch(op,
             {.grid = dim3(static_cast<unsigned>(ctas)),
              .threads = 2 * p.K,
              .shared_bytes = 4 * static_cast<int>(RecurrentShared::floats(p, tile)),
              .programmatic = true},
             static_cast<cudaStream_t>(stream), recurrent_kernel<Config>, p);
    };
    if (order == StateOrder::k_first) return launch_order(std::false_type());
    if constexpr (tile == 32 || sizeof(typename decltype(state)::type) == 2) launch_order(std::true_type());
  };
  const auto with_state = [&](auto tile) {
    if (p.pool.dtype == Dtype::f32) return launch_kernel(std::type_identity<float>(), tile);
    launch_kernel(std::type_identity<bf16>(), tile);
  };
  if (tiles.tile == 64) return with_state(std::integral_constant<int, 64>());
  with_state(std::integral_constant<int, 32>());
}

// The arguments that step and verify share.
RecurrentArguments recurrent_arguments(const RecurrentGatedDeltaRuleParams& p) {
  const GatedDeltaRuleInputs& in = p.in;
  return {.N = in.B,
          .H = in.H,
          .Hk = in.Hk,
          .T = static_cast<int>(in.T),
          .K = static_cast<int>(in.K),
          .V = static_cast<int>(in.V),
          .scale = static_cast<float>(in.scale),
          .l2norm_qk = in.l2norm_qk,
          .q = in_bytes(in.q),
          .k = in_bytes(in.k),
          .v = in_bytes(in.v),
          .g = in_bytes(in.g),
          .beta = in_bytes(in.beta),
          .pool = p.pool,
          .o = p.o,
          .o_dtype = in.v.dtype};
}

}  // namespace
}  // namespace hopper

void recurrent_gated_delta_rule_hopper(const RecurrentGatedDeltaRuleParams& p, void* stream) {
  hopper::RecurrentArguments a = hopper::recurrent_arguments(p);
  hopper::launch_recurrent<hopper::RecurrentMode::step>("recurrent_gated_delta_rule", a, stream);
}

void recurrent_jet_block_step_hopper(const RecurrentGatedDeltaRuleParams& p, const GateParameters& gates,
                                     void* stream) {
  hopper::RecurrentArguments a = hopper::recurrent_arguments(p);
  a.o_dtype = Dtype::f32, a.A_log = gates.A_log, a.dt_bias = gates.dt_bias;
  hopper::launch_recurrent<hopper::RecurrentMode::jet_block>("jet_block_step", a, stream);
}

void recurrent_gated_delta_rule_verify_hopper(const RecurrentGatedDeltaRuleVerifyParams& p, void* stream) {
  hopper::RecurrentArguments a = hopper::recurrent_arguments(p.forward);
  a.keys = static_cast<float*>(p.keys), a.updates = static_cast<float*>(p.updates);
  hopper::launch_recurrent<hopper::RecurrentMode::verify>("recurrent_gated_delta_rule_verify", a, stream);
}

void recurrent_gated_delta_rule_commit_hopper(const RecurrentGatedDeltaRuleCommitParams& p, void* stream) {
  using hopper::in_bytes;
  const auto drafts = [&](const void* data, int64_t heads, int64_t D) {  // contiguous
    return in_bytes(
        {.data = data, .dtype = Dtype::f32, .strides = {.b = p.T * heads * D, .t = heads * D, .h = D, .d = 1}});
  };
  hopper::RecurrentArguments a{.N = p.N,
                               .H = p.H,
                               .Hk = p.Hk,
                               .T = static_cast<int>(p.T),
                               .K = static_cast<int>(p.K),
                               .V = static_cast<int>(p.V),
                               .k = drafts(p.keys, p.Hk, p.K),
                               .v = drafts(p.updates, p.H, p.V),
                               .g = in_bytes(p.g),
                               .pool = p.pool,
                               .num_accepted = p.num_accepted.data,
                               .num_accepted_type = p.num_accepted.type};
  hopper::launch_recurrent<hopper::RecurrentMode::commit>("recurrent_gated_delta_rule_commit", a, stream);
}

}  // namespace jet
