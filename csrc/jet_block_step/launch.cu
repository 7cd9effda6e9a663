// A JetBlock's step on a GPU: the convolution's step, the recurrent kernel and the gated norm, launched one after the
// other, each of which may begin before the one in front of it has ended.
#include "csrc/hopper/convert.h"
#include "csrc/hopper/launch.h"
#include "csrc/jet_block_step/jet_block_step.h"

namespace jet {
namespace hopper {
namespace {

// The norm of the head outputs [N, H, V], a warp each. It reads 32 + 16 bytes a lane and iteration and writes 16, so at
// V = 256 everything that a warp needs of memory is on its way at once.
struct GatedNormArguments {
  int64_t heads, N, P;  // heads: N * H
  uint32_t H;
  int V;
  float eps;
  IndexVector rows;
  const float* o;    // [N, H, V]
  TokenTensor gate;  // in rows of V contiguous elements, 16-byte aligned
  NumberVector weight;
  void* y;  // [N, H, V] dtype of gate
};

constexpr int kNormWarps = 4, kNormElements = 8;  // elements of a lane at a time

__device__ bool has_row(const GatedNormArguments& p, uint32_t n) {
  const int64_t row = p.rows.data == nullptr ? n : load_index(p.rows, n);
  return row >= 0 && row < p.P;
}

template <class Element>
__device__ void load_eight(float (&x)[kNormElements], const Element* from) {
  const uint4 words = *reinterpret_cast<const uint4*>(from);
  const uint32_t pairs[4] = {words.x, words.y, words.z, words.w};
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    const float2 pair = unpack<Element>(pairs[j]);
    x[2 * j] = pair.x, x[2 * j + 1] = pair.y;
  }
}

__device__ inline void load_eight(float (&x)[kNormElements], const float* from) {
#pragma unroll
  for (int j = 0; j < 2; ++j) {
    const float4 four = __ldcg(reinterpret_cast<const float4*>(from) + j);
    x[4 * j] = four.x, x[4 * j + 1] = four.y, x[4 * j + 2] = four.z, x[4 * j + 3] = four.w;
  }
}

__device__ inline float sum_over_lanes(float x) {
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) x += __shfl_xor_sync(0xffffffffu, x, offset);
  return x;
}

template <class Element>
__global__ void __launch_bounds__(32 * kNormWarps) gated_norm_kernel(const __grid_constant__ GatedNormArguments p) {
  griddepcontrol_wait();
  griddepcontrol_launch_dependents();
  const int64_t head = int64_t{blockIdx.x} * kNormWarps + threadIdx.x / 32;
  if (head >= p.heads) return;
  const uint32_t n = static_cast<uint32_t>(head) / p.H, h = static_cast<uint32_t>(head) - n * p.H;
  const bool used = has_row(p, n);
  const float* o = p.o + head * p.V;
  const Element* gate = static_cast<const Element*>(p.gate.data) + n * p.gate.strides.b + h * p.gate.strides.h;
  Element* y = static_cast<Element*>(p.y) + head * p.V;
  const int first = threadIdx.x % 32 * kNormElements;
  float squares = 0;
#pragma unroll 1
  for (int c = first; c < p.V; c += 32 * kNormElements) {
    float x[kNormElements];
    load_eight(x, o + c);
#pragma unroll
    for (int j = 0; j < kNormElements; ++j) squares = fmaf(x[j], x[j], squares);
  }
  const float factor = rsqrtf(sum_over_lanes(squares) / static_cast<float>(p.V) + p.eps);
#pragma unroll 1
  for (int c = first; c < p.V; c += 32 * kNormElements) {
    float x[kNormElements], z[kNormElements];
    load_eight(x, o + c);
    load_eight(z, gate + c);
#pragma unroll
    for (int j = 0; j < kNormElements; ++j) {
      const float weight = load_as_float(p.weight.data, p.weight.dtype, c + j);
      const float result = x[j] * factor * weight * (z[j] / (1.0f + expf(-z[j])));
      x[j] = used ? result : 0;
    }
    uint4 words;
    words.x = pack<Element>(x[0], x[1]), words.y = pack<Element>(x[2], x[3]);
    words.z = pack<Element>(x[4], x[5]), words.w = pack<Element>(x[6], x[7]);
    __stcg(reinterpret_cast<uint4*>(y + c), words);
  }
}

void launch_gated_norm(const JetBlockStepParams& p, cudaStream_t stream) {
  const GatedDeltaRuleInputs& in = p.recurrent.in;
  const GatedNormArguments a{.heads = in.B * in.H,
                             .N = in.B,
                             .P = p.recurrent.pool.P,
                             .H = static_cast<uint32_t>(in.H),
                             .V = static_cast<int>(in.V),
                             .eps = static_cast<float>(p.eps),
                             .rows = p.recurrent.pool.rows,
                             .o = static_cast<const float*>(p.recurrent.o),
                             .gate = p.gate,
                             .weight = p.norm_weight,
                             .y = p.y};
  const LaunchShape shape{.grid = dim3(static_cast<unsigned>((a.heads + kNormWarps - 1) / kNormWarps)),
                          .threads = 32 * kNormWarps,
                          .programmatic = true};
  if (p.gate.dtype == Dtype::bf16) return launch("jet_block_step", shape, stream, gated_norm_kernel<bf16>, a);
  launch("jet_block_step", shape, stream, gated_norm_kernel<f16>, a);
}

}  // namespace
}  // namespace hopper

void jet_block_step_hopper(const JetBlockStepParams& p, void* stream) {
  if (p.recurrent.in.B == 0) return;
  dynamic_conv_step_of_silu_hopper(p.conv, stream);
  recurrent_jet_block_step_hopper(p.recurrent, p.gates, stream);
  hopper::launch_gated_norm(p, static_cast<cudaStream_t>(stream));
}

}  // namespace jet
