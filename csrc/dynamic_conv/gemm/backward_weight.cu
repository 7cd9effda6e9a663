// The launches of the third pass.
#include "csrc/dynamic_conv/gemm/backward_maps.cuh"
#include "csrc/dynamic_conv/gemm/backward_weight.cuh"

namespace jet::hopper {
namespace {

template <class Element>
void launch_reduce(const DynamicConvBackwardCall& call, const WeightGradientArguments& p) {
  const int64_t rows = call.p.in.D * call.p.in.W;
  const ReduceArguments weight{
      .sums = p.weight_sums, .splits = call.at.split.splits, .count = rows * p.R, .out = p.dweight};
  const ReduceArguments bias{.sums = p.bias_sums, .splits = call.at.split.splits, .count = rows, .out = p.dbias};
  const int64_t threads = (weight.count + bias.count) / 8;
  launch(call.op,
         {.grid = static_cast<unsigned>((threads + kReduceThreads - 1) / kReduceThreads),
          .threads = kReduceThreads,
          .programmatic = true},
         call.stream, reduce_kernel<Element>, weight, bias);
}

template <class Config>
void launch_config(const DynamicConvBackwardCall& call) {
  static_assert(Config::K == 64);
  const DynamicConvBackwardParams& p = call.p;
  const Dtype dtype = p.in.x.dtype;
  const int64_t M = call.tokens(), R = p.generator.R, D = p.in.D;
  const TokenSplit& split = call.at.split;
  constexpr int pair = Config::consumers * Config::channels * Config::cluster;  // channels of a cluster
  const WeightGradientMaps maps{
      .hidden = matrix_map("hidden", p.generator.hidden.data, dtype, M, R, row_stride(p.in, p.generator.hidden),
                           Config::K / Config::cluster, 64, Swizzle::b128),
      .x = matrix_map("x", p.in.x.data, dtype, M, D, row_stride(p.in, p.in.x), Config::x_rows, Config::channels,
                      Config::swizzle),
      .dz = matrix_map("dz", call.dz(), dtype, M, D, D, Config::K, Config::channels, Config::swizzle)};
  const bool sums = split.splits > 1;
  const WeightGradientArguments arguments{
      .sequences = sequences_of(p.in),
      .states = states_of(p.in, nullptr),
      .D = D,
      .R = R,
      .tiles = split.tiles,
      .tiles_per_split = split.per_split,
      .places = reinterpret_cast<const GradientPlace*>(call.workspace + call.at.places),
      .dweight = p.dweight,
      .dbias = p.dbias,
      .weight_sums = sums ? reinterpret_cast<float*>(call.workspace + call.at.weight_sums) : nullptr,
      .bias_sums = sums ? reinterpret_cast<float*>(call.workspace + call.at.bias_sums) : nullptr};
  const LaunchShape shape{
      .grid = dim3(static_cast<unsigned>((D + pair - 1) / pair * Config::cluster),
                   static_cast<unsigned>((R + Config::N - 1) / Config::N), static_cast<unsigned>(split.splits)),
      .threads = Config::threads,
      .shared_bytes = sizeof(WeightGradientShared<Config>),
      .cluster = Config::cluster,
      .programmatic = true,
  };
  launch(call.op, shape, call.stream, weight_gradient_kernel<Config>, maps, arguments);
  if (sums) launch_reduce<typename Config::Element>(call, arguments);
}

}  // namespace

void launch_weight_gradient(const DynamicConvBackwardCall& call) {
  const int columns = weight_gradient_columns(call.p.generator.R, call.p.in.W);
  with_gradient_columns(call.p, columns, [&](auto element, auto taps, auto N) {
    using Config = WeightGradientConfig<decltype(element), taps, N>;
    launch_config<Config>(call);
  });
}

}  // namespace jet::hopper
