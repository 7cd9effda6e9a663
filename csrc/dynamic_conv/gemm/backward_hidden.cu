// The launch of the second pass.
#include "csrc/dynamic_conv/gemm/backward_hidden.cuh"
#include "csrc/dynamic_conv/gemm/backward_maps.cuh"

namespace jet::hopper {
namespace {

template <class Config>
void launch_config(const DynamicConvBackwardCall& call) {
  const DynamicConvBackwardParams& p = call.p;
  const Dtype dtype = p.in.x.dtype;
  const int64_t M = call.tokens(), R = p.generator.R, D = p.in.D;
  constexpr int pair = Config::M * Config::cluster;  // tokens of a cluster
  const HiddenGradientMaps maps{
      .weight = weight_map(p, Config::box_j),
      .x = matrix_map("x", p.in.x.data, dtype, M, D, row_stride(p.in, p.in.x), Config::x_rows, Config::channels,
                      Swizzle::none),
      .dz = matrix_map("dz", call.dz(), dtype, M, D, D, Config::M, Config::channels, Swizzle::none)};
  const HiddenGradientArguments arguments{.sequences = sequences_of(p.in),
                                          .states = states_of(p.in, nullptr),
                                          .D = D,
                                          .R = R,
                                          .tiles = static_cast<int>((D + Config::channels - 1) / Config::channels),
                                          .dhidden = p.dhidden};
  const LaunchShape shape{
      .grid = dim3(static_cast<unsigned>((M + pair - 1) / pair * Config::cluster),
                   static_cast<unsigned>((R + Config::N - 1) / Config::N)),
      .threads = Config::threads,
      .shared_bytes = sizeof(HiddenGradientShared<Config>),
      .cluster = Config::cluster,
      .programmatic = true,
  };
  launch(call.op, shape, call.stream, hidden_gradient_kernel<Config>, maps, arguments);
}

}  // namespace

void launch_hidden_gradient(const DynamicConvBackwardCall& call) {
  const DynamicConvBackwardParams& p = call.p;
  const int columns = hidden_gradient_columns(call.tokens(), p.generator.R, p.in.W, call.multiprocessors);
  with_gradient_columns(p, columns, [&](auto element, auto taps, auto N) {
    launch_config<HiddenGradientConfig<decltype(element), taps, N>>(call);
  });
}

}  // namespace jet::hopper
