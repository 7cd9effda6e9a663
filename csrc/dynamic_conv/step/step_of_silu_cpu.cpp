// The step with taps from silu(hidden), which is made first: in AMX tiles where there are, else as the step.
#include "csrc/cpu/isa.h"
#include "csrc/dynamic_conv/step/step_tiles_cpu.h"

namespace jet::cpu::JET_CPU_ISA {

void dynamic_conv_step_cpu(const DynamicConvStepParams& params, const Parallel& parallel);

namespace {

template <class T>
void step_of_silu(const DynamicConvStepParams& p, const Parallel& parallel) {
  constexpr long L = kLanes<T>;
  const long N = p.in.N, R = p.generator.R, stride = p.generator.hidden.strides.d;
  Buffer<T> activated(N * R);
  for (long n = 0; n < N; ++n) {
    const T* hidden = at<T>(p.generator.hidden, n, 0);
    T* to = activated.get() + n * R;
    for (long r = 0; r < R; r += L) store_some(to + r, 1, R - r, silu(load_some(hidden + r * stride, stride, R - r)));
  }
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 2)
    if (tile_step_takes(p))
      return with_taps(p.in.W, [&](auto taps) {
        const double work = double(N) * p.in.D * p.in.W * (R + kCopy);
        const auto* hidden = reinterpret_cast<const bf16*>(activated.get());
        TileStep<taps>(p, hidden).run(for_work(parallel, work));
      });
#endif
  DynamicConvStepParams of_silu = p;
  of_silu.generator.hidden.data = activated.get();
  of_silu.generator.hidden.strides = {.b = R, .t = 0, .h = 0, .d = 1};
  JET_CPU_ISA::dynamic_conv_step_cpu(of_silu, parallel);
}

}  // namespace

void dynamic_conv_step_of_silu_cpu(const DynamicConvStepParams& p, const Parallel& parallel) {
  switch (p.in.x.dtype) {
    case Dtype::f32: return step_of_silu<float>(p, parallel);
    case Dtype::f64: JET_CPU_FP64(step_of_silu<double>(p, parallel));
    case Dtype::bf16: return step_of_silu<bf16>(p, parallel);
    case Dtype::f16: return step_of_silu<f16>(p, parallel);
  }
}

}  // namespace jet::cpu::JET_CPU_ISA

JET_CPU_LAUNCHER(dynamic_conv_step_of_silu_cpu, DynamicConvStepParams, params.in.x.dtype)
