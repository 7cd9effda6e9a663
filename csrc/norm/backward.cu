// The launch of the backward of the norms.
#include "csrc/norm/backward.cuh"

#include <algorithm>

#include "csrc/hopper/device.h"
#include "csrc/hopper/launch.h"
#include "csrc/hopper/partial_sums.h"

namespace jet {
namespace hopper {
namespace {

struct NormBackwardTeams {
  int lanes, threads, ctas;
};

// As many teams as a CTA has threads for, and a CTA a multiprocessor, which walk over the rows: a CTA costs a row of
// partial sums. A lane asks for 32 bytes of each tensor ahead, so that of 512 threads some 32 KB are under way.
NormBackwardTeams choose_teams(const NormInputs& in) {
  const int64_t unit = norm_unit(in.dtype, in.C), columns = unit * units_of_backward_lane(unit);
  const auto needed = static_cast<int>((in.C + columns - 1) / columns);
  int lanes = (needed + 31) / 32 * 32;
  if (needed <= 32) {
    lanes = 1;
    while (lanes < needed) lanes *= 2;
  }
  const int teams = kNormBackwardThreads / lanes;
  const int64_t ctas = std::min<int64_t>((in.rows + teams - 1) / teams, current_device_properties().multiprocessors);
  return {.lanes = lanes, .threads = teams * lanes, .ctas = static_cast<int>(ctas)};
}

template <class Element, NormKind kind>
void launch_backward(const RmsNormBackwardParams& p, const NormRows& other, float* workspace, const char* op,
                     cudaStream_t stream) {
  const NormInputs& in = p.in;
  const NormBackwardTeams teams = choose_teams(in);
  const NormArguments arguments{.rows = static_cast<uint32_t>(in.rows),
                                .inner = static_cast<uint32_t>(in.inner),
                                .C = static_cast<int>(in.C),
                                .lanes = teams.lanes,
                                .eps = static_cast<float>(in.eps),
                                .x = in.x,
                                .other = other,
                                .weight = in.weight,
                                .wide_weight = in.weight_dtype == Dtype::f32};
  const NormGradients gradients{.grad_y = p.grad_y,
                                .grad_sum = p.grad_sum,
                                .dx = p.dx,
                                .dresidual = p.dresidual,
                                .dgate = p.dgate,
                                .partial_dweight = workspace};
  const LaunchShape shape{.grid = static_cast<unsigned>(teams.ctas), .threads = teams.threads, .programmatic = true};
  constexpr int unit = 16 / sizeof(Element);
  if (teams.ctas == 0) {
    // no rows: dweight is a sum of nothing
  } else if (norm_unit(in.dtype, in.C) == 1) {
    launch(op, shape, stream, norm_backward_kernel<Element, 1, units_of_backward_lane(1), kind>, arguments, gradients);
  } else {
    launch(op, shape, stream, norm_backward_kernel<Element, unit, units_of_backward_lane(unit), kind>, arguments,
           gradients);
  }
  add_up(op,
         {.partials = workspace,
          .rows = teams.ctas,
          .count = 1,
          .columns = static_cast<int>(in.C),
          .dtype = in.weight_dtype,
          .outputs = {p.dweight}},
         stream);
}

template <class Element>
void launch_backward(const RmsNormBackwardParams& p, float* workspace, cudaStream_t stream) {
  if (p.dgate != nullptr)
    return launch_backward<Element, NormKind::gated>(p, p.in.gate, workspace, "gated_rms_norm_backward", stream);
  if (p.dresidual != nullptr)
    return launch_backward<Element, NormKind::add>(p, p.in.residual, workspace, "add_rms_norm_backward", stream);
  launch_backward<Element, NormKind::alone>(p, {}, workspace, "rms_norm_backward", stream);
}

}  // namespace
}  // namespace hopper

int64_t rms_norm_backward_workspace(const NormInputs& in) {
  return in.C == 0 ? 0 : hopper::choose_teams(in).ctas * in.C;
}

void rms_norm_backward_hopper(const RmsNormBackwardParams& p, float* workspace, void* stream) {
  using namespace hopper;
  const auto on = static_cast<cudaStream_t>(stream);
  if (p.in.C == 0) return;
  switch (p.in.dtype) {
    case Dtype::f32: return launch_backward<float>(p, workspace, on);
    case Dtype::bf16: return launch_backward<bf16>(p, workspace, on);
    case Dtype::f16: return launch_backward<f16>(p, workspace, on);
    case Dtype::f64: return;  // rms_norm_kernel_takes refuses it
  }
}

}  // namespace jet
