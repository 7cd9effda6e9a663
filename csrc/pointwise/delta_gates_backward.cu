// The backward of delta_gates, bound by memory: every element is read once and written once, neighbouring threads
// access neighbouring addresses. A thread has one head and walks over tokens, so it adds up its terms of dA_log and
// ddt_bias in registers; a CTA's threads of a head add up theirs in a tree, and the CTAs' sums are a row each of a
// workspace.
#include <algorithm>
#include <numeric>

#include "csrc/hopper/convert.h"
#include "csrc/hopper/device.h"
#include "csrc/hopper/launch.h"
#include "csrc/hopper/partial_sums.h"
#include "csrc/hopper/sigmoid.h"
#include "csrc/pointwise/delta_gates.h"

namespace jet {
namespace hopper {
namespace {

constexpr int kThreads = 256;           // of a CTA, and one a head of more heads
constexpr int kResidentThreads = 1024;  // of all CTAs that a multiprocessor has at a time
constexpr int kTokens = 4;              // whose elements a thread loads together

constexpr int kSector = 16;  // 16-bit elements of a sector of 32 bytes

struct GateSums {
  float dA_log = 0, ddt_bias = 0;
};

// Tokens first, first + stride, ... of one head, kTokens of them.
__device__ void tokens_backward(const DeltaGatesBackwardParams& p, uint32_t first, uint32_t stride, uint32_t head,
                                float rate, float bias, GateSums& sums) {
  const DeltaGatesInputs& in = p.in;
  float a[kTokens], b[kTokens], dg[kTokens], dbeta[kTokens];
#pragma unroll
  for (int j = 0; j < kTokens; ++j) {
    const uint32_t token = first + j * stride;
    if (token >= in.tokens) break;
    a[j] = load_as_float(in.a, in.dtype, token, head);
    dg[j] = load_as_float(p.grad_g, Dtype::f32, token, head);
    if (p.grad_beta.data == nullptr) continue;
    b[j] = load_as_float(in.b, in.dtype, token, head);
    dbeta[j] = load_as_float(p.grad_beta, Dtype::f32, token, head);
  }
#pragma unroll
  for (int j = 0; j < kTokens; ++j) {
    const uint32_t token = first + j * stride;
    if (token >= in.tokens) break;
    const float x = a[j] + bias, scaled = -dg[j] * rate, dx = scaled * sigmoid(x);
    sums.dA_log += scaled * softplus(x);
    sums.ddt_bias += dx;
    const int64_t at = int64_t{token} * in.H + head;
    store_from_float(p.da, in.dtype, at, dx);
    // 1 - sigmoid(b) would cancel
    store_from_float(p.db, in.dtype, at, p.grad_beta.data == nullptr ? 0 : dbeta[j] * sigmoid(b[j]) * sigmoid(-b[j]));
  }
}

__global__ void __launch_bounds__(kMaxGateHeads)
    delta_gates_backward_kernel(const __grid_constant__ DeltaGatesBackwardParams p, uint32_t groups, float* partials) {
  __shared__ float dA_log[kMaxGateHeads], ddt_bias[kMaxGateHeads];
  const auto H = static_cast<uint32_t>(p.in.H);
  const uint32_t head = threadIdx.x % H, group = threadIdx.x / H;
  griddepcontrol_wait();
  griddepcontrol_launch_dependents();
  GateSums sums;
  if (group < groups) {
    const float rate = expf(static_cast<const float*>(p.in.A_log)[head]);
    const float bias = static_cast<const float*>(p.in.dt_bias)[head];
    for (uint32_t first = blockIdx.x * groups * kTokens + group; first < p.in.tokens;
         first += gridDim.x * groups * kTokens)
      tokens_backward(p, first, groups, head, rate, bias, sums);
  }
  dA_log[threadIdx.x] = sums.dA_log, ddt_bias[threadIdx.x] = sums.ddt_bias;
  __syncthreads();
  for (uint32_t left = groups; left > 1;) {
    const uint32_t half = (left + 1) / 2;
    if (group + half < left) {
      dA_log[threadIdx.x] += dA_log[threadIdx.x + half * H];
      ddt_bias[threadIdx.x] += ddt_bias[threadIdx.x + half * H];
    }
    left = half;
    __syncthreads();
  }
  if (group > 0) return;
  float* mine = partials + 2 * int64_t{blockIdx.x} * H;  // [2, H]
  mine[head] = dA_log[head], mine[H + head] = ddt_bias[head];
}

struct GateGrid {
  int threads, ctas;
  uint32_t groups;  // tokens that a CTA has at a time
};

// Groups whose elements fill sectors if they can, so that no two warps share one: 20 of 12 heads.
GateGrid choose_grid(const DeltaGatesInputs& in) {
  if (in.tokens * in.H == 0) return {};
  const int H = static_cast<int>(in.H), threads = H <= kThreads ? kThreads : (H + 31) / 32 * 32;
  const int whole = kSector / std::gcd(H, kSector), fit = threads / H,
            groups = fit >= whole ? fit / whole * whole : fit;
  const int64_t tokens = groups * kTokens, needed = (in.tokens + tokens - 1) / tokens;
  const int64_t resident = int64_t{current_device_properties().multiprocessors} * (kResidentThreads / threads);
  return {.threads = threads,
          .ctas = static_cast<int>(std::min(needed, resident)),
          .groups = static_cast<uint32_t>(groups)};
}

}  // namespace
}  // namespace hopper

int64_t delta_gates_backward_workspace(const DeltaGatesInputs& in) { return hopper::choose_grid(in).ctas * 2 * in.H; }

void delta_gates_backward_hopper(const DeltaGatesBackwardParams& p, float* workspace, void* stream) {
  using namespace hopper;
  const auto on = static_cast<cudaStream_t>(stream);
  const GateGrid grid = choose_grid(p.in);
  if (grid.ctas > 0)
    launch("delta_gates_backward",
           {.grid = dim3(static_cast<unsigned>(grid.ctas)), .threads = grid.threads, .programmatic = true}, on,
           delta_gates_backward_kernel, p, grid.groups, workspace);
  add_up("delta_gates_backward",
         {.partials = workspace,
          .rows = grid.ctas,
          .count = 2,
          .columns = static_cast<int>(p.in.H),
          .dtype = Dtype::f32,
          .outputs = {p.dA_log, p.ddt_bias}},
         on);
}

}  // namespace jet
