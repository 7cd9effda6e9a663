// The two launches of attention_step.
#include "csrc/attention/kernel.cuh"

namespace jet {
namespace hopper {
namespace {

template <class Config>
void launch_attention_step(const AttentionArguments& a, cudaStream_t stream) {
  const char* const op = "attention_step";
  const auto dim = [](int64_t n) { return static_cast<unsigned>(n); };
  launch(op,
         {.grid = dim3(dim(a.splits), dim(a.p.Hkv), dim(a.p.N)),
          .threads = kAttentionWarps * 32,
          .shared_bytes = Config::shared_bytes,
          .programmatic = true},
         stream, attention_step_kernel<Config>, a);
  launch(op, {.grid = dim3(dim(a.p.H), dim(a.p.N)), .threads = kCombineThreads, .programmatic = true}, stream,
         attention_combine_kernel<Config>, a);
}

template <class Element, int D>
void launch_for_group(const AttentionArguments& a, cudaStream_t stream) {
  if (a.group > 8) return launch_attention_step<AttentionConfig<Element, D, true>>(a, stream);
  launch_attention_step<AttentionConfig<Element, D, false>>(a, stream);
}

template <class Element>
void launch_for_head(const AttentionArguments& a, cudaStream_t stream) {
  if (a.p.D == 64) return launch_for_group<Element, 64>(a, stream);
  if (a.p.D == 128) return launch_for_group<Element, 128>(a, stream);
  launch_for_group<Element, 256>(a, stream);
}

int64_t split_of(const AttentionStepParams& p) {
  return attention_split(p.N, p.Hkv, p.L, current_device_properties().multiprocessors);
}

}  // namespace
}  // namespace hopper

int64_t attention_step_workspace(const AttentionStepParams& p) {
  if (p.N * p.H == 0) return 0;
  const int64_t split = hopper::split_of(p);
  return p.N * p.H * ((p.L + split - 1) / split) * (p.D + 2);
}

void attention_step_hopper(const AttentionStepParams& p, float* workspace, void* stream) {
  using namespace hopper;
  if (p.N * p.H == 0) return;
  const int64_t split = split_of(p), splits = (p.L + split - 1) / split;
  require(p.N < 65536, "attention_step", "N", "below 65536", p.N);
  require(p.Hkv < 65536, "attention_step", "Hkv", "below 65536", p.Hkv);
  const AttentionArguments a{.p = p,
                             .split = split,
                             .splits = static_cast<int>(splits),
                             .group = static_cast<int>(p.H / p.Hkv),
                             .scale = static_cast<float>(p.scale * 1.4426950408889634),
                             .o = workspace,
                             .sums = reinterpret_cast<float2*>(workspace + p.N * p.H * splits * p.D)};
  const auto on = static_cast<cudaStream_t>(stream);
  if (p.dtype == Dtype::bf16) return launch_for_head<bf16>(a, on);
  launch_for_head<f16>(a, on);
}

}  // namespace jet
