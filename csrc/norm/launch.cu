// The launch of the norms.
#include "csrc/hopper/device.h"
#include "csrc/hopper/launch.h"
#include "csrc/norm/kernel.cuh"

namespace jet {
namespace hopper {
namespace {

// Threads of all CTAs that a multiprocessor has at a time: what the registers of norm_kernel leave.
constexpr int kResidentThreads = 1024;
constexpr int kNarrowThreads = 128;  // of a CTA whose rows are a part of a warp each

struct NormTeams {
  int lanes, threads;
  unsigned ctas;
};

// Few rows: a team each, so that all multiprocessors work. Many: as many teams as fit, which walk over the rows.
NormTeams choose_teams(const NormInputs& in) {
  const int64_t unit = norm_unit(in.dtype, in.C);
  const auto needed = static_cast<int>((in.C + unit * units_of_lane(unit) - 1) / (unit * units_of_lane(unit)));
  NormTeams teams{.lanes = (needed + 31) / 32 * 32, .threads = (needed + 31) / 32 * 32, .ctas = 0};
  if (needed <= 32) {
    teams.lanes = 1, teams.threads = kNarrowThreads;
    while (teams.lanes < needed) teams.lanes *= 2;
  }
  const int64_t rows_of_cta = teams.threads / teams.lanes, ctas = (in.rows + rows_of_cta - 1) / rows_of_cta;
  const int64_t resident = int64_t{current_device_properties().multiprocessors} * (kResidentThreads / teams.threads);
  teams.ctas = static_cast<unsigned>(ctas < resident ? ctas : resident);
  return teams;
}

template <class Element, NormKind kind>
void launch_norm(const RmsNormParams& p, const NormRows& other, const char* op, cudaStream_t stream) {
  const NormInputs& in = p.in;
  const NormTeams teams = choose_teams(in);
  const NormArguments arguments{.rows = static_cast<uint32_t>(in.rows),
                                .inner = static_cast<uint32_t>(in.inner),
                                .C = static_cast<int>(in.C),
                                .lanes = teams.lanes,
                                .eps = static_cast<float>(in.eps),
                                .x = in.x,
                                .other = other,
                                .weight = in.weight,
                                .wide_weight = in.weight_dtype == Dtype::f32};
  const LaunchShape shape{.grid = teams.ctas, .threads = teams.threads, .programmatic = true};
  constexpr int unit = 16 / sizeof(Element);
  if (norm_unit(in.dtype, in.C) == 1)
    launch(op, shape, stream, norm_kernel<Element, 1, units_of_lane(1), kind>, arguments, p.y, p.sum);
  else
    launch(op, shape, stream, norm_kernel<Element, unit, units_of_lane(unit), kind>, arguments, p.y, p.sum);
}

template <class Element>
void launch_norm(const RmsNormParams& p, cudaStream_t stream) {
  if (p.in.gate.data != nullptr) return launch_norm<Element, NormKind::gated>(p, p.in.gate, "gated_rms_norm", stream);
  if (p.in.residual.data != nullptr)
    return launch_norm<Element, NormKind::add>(p, p.in.residual, "add_rms_norm", stream);
  launch_norm<Element, NormKind::alone>(p, {}, "rms_norm", stream);
}

}  // namespace
}  // namespace hopper

void rms_norm_hopper(const RmsNormParams& p, void* stream) {
  using namespace hopper;
  const auto on = static_cast<cudaStream_t>(stream);
  if (p.in.rows == 0 || p.in.C == 0) return;
  switch (p.in.dtype) {
    case Dtype::f32: return launch_norm<float>(p, on);
    case Dtype::bf16: return launch_norm<bf16>(p, on);
    case Dtype::f16: return launch_norm<f16>(p, on);
    case Dtype::f64: return;  // rms_norm_kernel_takes refuses it
  }
}

}  // namespace jet
