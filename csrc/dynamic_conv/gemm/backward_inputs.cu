// The launch of the first pass.
#include "csrc/dynamic_conv/gemm/backward_inputs.cuh"
#include "csrc/dynamic_conv/gemm/backward_maps.cuh"

namespace jet::hopper {
namespace {

template <class Config>
void launch_config(const DynamicConvBackwardCall& call) {
  const DynamicConvBackwardParams& p = call.p;
  const Dtype dtype = p.in.x.dtype;
  const int64_t M = call.tokens(), R = p.generator.R, D = p.in.D;
  constexpr int pair = Config::own * Config::cluster;  // tokens of a cluster
  const int64_t token_tiles = (M + pair - 1) / pair * Config::cluster;
  const int tiles = static_cast<int>((D + Config::channels - 1) / Config::channels);
  const ChannelSplit split = choose_channel_split(token_tiles, tiles, call.multiprocessors);
  const InputGradientMaps maps{
      .hidden = matrix_map("hidden", p.generator.hidden.data, dtype, M, R, row_stride(p.in, p.generator.hidden),
                           8 * Config::step, Config::K, Swizzle::b128, Config::step),
      .weight = weight_map(p, 4 / Config::cluster),
      .x = matrix_map("x", p.in.x.data, dtype, M, D, row_stride(p.in, p.in.x), Config::x_box * Config::step,
                      Config::channels, Swizzle::none, Config::step),
      .dy = matrix_map("grad_y", p.grad_y.data, dtype, M, D, row_stride(p.in, p.grad_y), Config::dy_box * Config::step,
                       Config::channels, Swizzle::none, Config::step)};
  const InputGradientArguments arguments{.sequences = sequences_of(p.in),
                                         .states = states_of(p.in, nullptr),
                                         .gradients = {.of_out = p.grad_conv_state_out, .of_in = p.dconv_state},
                                         .D = D,
                                         .panels = static_cast<int>((R + Config::K - 1) / Config::K),
                                         .silu = p.in.silu,
                                         .bias = p.generator.bias,
                                         .dz = call.dz(),
                                         .dx = p.dx,
                                         .places = reinterpret_cast<GradientPlace*>(call.workspace + call.at.places)};
  const int hidden = Config::resident ? arguments.panels * Config::TileA::bytes : 0;
  const LaunchShape shape{
      .grid =
          dim3(static_cast<unsigned>(token_tiles), static_cast<unsigned>((tiles + split.per_cta - 1) / split.per_cta)),
      .threads = Config::threads,
      .shared_bytes = hidden + static_cast<int>(sizeof(InputGradientShared<Config>)),
      .cluster = Config::cluster,
      .programmatic = true,
  };
  launch(call.op, shape, call.stream, input_gradient_kernel<Config>, maps, arguments, split);
}

}  // namespace

void launch_input_gradient(const DynamicConvBackwardCall& call) {
  with_element_and_taps(call.p.in, [&](auto element, auto taps) {
    using Element = decltype(element);
    constexpr int W = taps;
    if (call.p.generator.R <= kResidentR)
      launch_config<InputGradientConfig<Element, W, true>>(call);
    else
      launch_config<InputGradientConfig<Element, W, false>>(call);
  });
}

}  // namespace jet::hopper
