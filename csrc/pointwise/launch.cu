// The kernels of swiglu and delta_gates, bound by memory: every element is read once and written once, neighbouring
// threads access neighbouring addresses.
#include <algorithm>
#include <type_traits>

#include "csrc/hopper/launch.h"
#include "csrc/hopper/packed_elements.h"
#include "csrc/hopper/sigmoid.h"
#include "csrc/pointwise/delta_gates.h"
#include "csrc/pointwise/swiglu.h"

namespace jet {
namespace hopper {
namespace {

// 8,960 columns of bf16, the 2B model's MLP, are 8.75 CTAs.
constexpr int kSwigluThreads = 128;
constexpr int kMaxGridY = 65535;

// ---- P elements of a row: 16 bytes, or one element where it is not known that 16 bytes lie together

template <class T>
constexpr int kWide = 16 / int(sizeof(T));

template <class T, int P>
__device__ void load_as_floats(float (&x)[P], const StridedRows& from, int64_t row, int64_t column) {
  const T* p = static_cast<const T*>(from.data) + row * from.row + column * from.column;
  if constexpr (P == 1 && sizeof(T) == 4) {
    x[0] = *reinterpret_cast<const float*>(p);
  } else if constexpr (P == 1) {
    x[0] = unpack<T>(*reinterpret_cast<const uint16_t*>(p)).x;
  } else if constexpr (sizeof(T) == 4) {
    const float4 four = *reinterpret_cast<const float4*>(p);
    x[0] = four.x, x[1] = four.y, x[2] = four.z, x[3] = four.w;
  } else {
    unpack_elements<T>(x, load_elements<P>(p));
  }
}

template <class T, int P>
__device__ void store_floats(void* to, int64_t i, const float (&x)[P]) {
  T* p = static_cast<T*>(to) + i;
  if constexpr (P == 1 && sizeof(T) == 4) {
    *reinterpret_cast<float*>(p) = x[0];
  } else if constexpr (P == 1) {
    *reinterpret_cast<uint16_t*>(p) = static_cast<uint16_t>(pack<T>(x[0], 0.0f));
  } else if constexpr (sizeof(T) == 4) {
    __stcg(reinterpret_cast<float4*>(p), make_float4(x[0], x[1], x[2], x[3]));
  } else {
    Elements<P> packed;
#pragma unroll
    for (int j = 0; j < P / 2; ++j) packed.words[j] = pack<T>(x[2 * j], x[2 * j + 1]);
    store_elements(p, packed);
  }
}

// Whether all of `x` may be read 16 bytes at a time.
template <class T>
bool is_wide(const StridedRows& x, int64_t rows) {
  return x.column == 1 && (rows == 1 || x.row % kWide<T> == 0) && reinterpret_cast<uintptr_t>(x.data) % 16 == 0;
}

// ---- SwiGLU

template <class T, int P>
__global__ void __launch_bounds__(kSwigluThreads) swiglu_kernel(const __grid_constant__ SwigluParams p) {
  const int64_t column = (int64_t{blockIdx.x} * kSwigluThreads + threadIdx.x) * P;
  griddepcontrol_wait();
  griddepcontrol_launch_dependents();
  if (column >= p.C) return;
  for (int64_t row = blockIdx.y; row < p.rows; row += gridDim.y) {
    float gate[P], up[P], y[P];
    load_as_floats<T>(gate, p.gate, row, column);
    load_as_floats<T>(up, p.up, row, column);
#pragma unroll
    for (int i = 0; i < P; ++i) y[i] = gate[i] * fast_sigmoid(gate[i]) * up[i];
    store_floats<T>(p.y, row * p.C + column, y);
  }
}

template <class T, int P>
__global__ void __launch_bounds__(kSwigluThreads)
    swiglu_backward_kernel(const __grid_constant__ SwigluBackwardParams p) {
  const int64_t column = (int64_t{blockIdx.x} * kSwigluThreads + threadIdx.x) * P;
  griddepcontrol_wait();
  griddepcontrol_launch_dependents();
  if (column >= p.C) return;
  for (int64_t row = blockIdx.y; row < p.rows; row += gridDim.y) {
    float dy[P], gate[P], up[P], dgate[P], dup[P];
    load_as_floats<T>(dy, p.grad_y, row, column);
    load_as_floats<T>(gate, p.gate, row, column);
    load_as_floats<T>(up, p.up, row, column);
#pragma unroll
    for (int i = 0; i < P; ++i) {
      const float s = fast_sigmoid(gate[i]);
      dgate[i] = dy[i] * up[i] * (s * (1 + gate[i] * (1 - s)));
      dup[i] = dy[i] * (gate[i] * s);
    }
    store_floats<T>(p.dgate, row * p.C + column, dgate);
    store_floats<T>(p.dup, row * p.C + column, dup);
  }
}

template <class Params>
void launch_swiglu(const char* op, const Params& p, int per_thread, cudaStream_t stream, void (*kernel)(Params)) {
  const int64_t threads = (p.C + per_thread - 1) / per_thread;
  const dim3 grid(static_cast<unsigned>((threads + kSwigluThreads - 1) / kSwigluThreads),
                  static_cast<unsigned>(std::min<int64_t>(p.rows, kMaxGridY)));
  launch(op, {.grid = grid, .threads = kSwigluThreads, .programmatic = true}, stream, kernel, p);
}

// ---- Gates

constexpr int kGateThreads = 256;
constexpr int kGatesPerThread = 4;  // exp(A_log) and dt_bias of 12 heads are 96 of a CTA's 12,384 bytes

__global__ void __launch_bounds__(kGateThreads) delta_gates_kernel(const __grid_constant__ DeltaGatesParams p) {
  __shared__ float rate[kMaxGateHeads], bias[kMaxGateHeads];
  const DeltaGatesInputs& in = p.in;
  const auto H = static_cast<uint32_t>(in.H), elements = static_cast<uint32_t>(in.tokens * in.H);
  griddepcontrol_wait();
  griddepcontrol_launch_dependents();
  for (uint32_t h = threadIdx.x; h < H; h += kGateThreads) {
    rate[h] = expf(static_cast<const float*>(in.A_log)[h]);
    bias[h] = static_cast<const float*>(in.dt_bias)[h];
  }
  float a[kGatesPerThread] = {}, b[kGatesPerThread] = {};
  const uint32_t first = blockIdx.x * (kGateThreads * kGatesPerThread) + threadIdx.x;
#pragma unroll
  for (int j = 0; j < kGatesPerThread; ++j) {
    const uint32_t i = first + j * kGateThreads;
    if (i < elements) {
      a[j] = load_as_float(in.a, in.dtype, i / H, i % H);
      b[j] = load_as_float(in.b, in.dtype, i / H, i % H);
    }
  }
  __syncthreads();
#pragma unroll
  for (int j = 0; j < kGatesPerThread; ++j) {
    const uint32_t i = first + j * kGateThreads;
    if (i >= elements) return;
    static_cast<float*>(p.g)[i] = -rate[i % H] * softplus(a[j] + bias[i % H]);
    static_cast<float*>(p.beta)[i] = sigmoid(b[j]);
  }
}

// f(T(), std::integral_constant<int, P>()): P elements at a time, as the layout of `rows` allows.
template <class Params, class... Rows, class F>
void with_access(const Params& p, const F& f, const Rows&... rows) {
  const auto with_element = [&](auto element) {
    using T = decltype(element);
    if (p.C % kWide<T> == 0 && (is_wide<T>(rows, p.rows) && ...))
      f(element, std::integral_constant<int, kWide<T>>());
    else
      f(element, std::integral_constant<int, 1>());
  };
  switch (p.dtype) {
    case Dtype::bf16: return with_element(bf16());
    case Dtype::f16: return with_element(f16());
    default: return with_element(float());
  }
}

}  // namespace
}  // namespace hopper

void swiglu_hopper(const SwigluParams& p, void* stream) {
  using namespace hopper;
  if (p.rows * p.C == 0) return;
  with_access(
      p,
      [&](auto element, auto P) {
        launch_swiglu("swiglu", p, P, static_cast<cudaStream_t>(stream), swiglu_kernel<decltype(element), P>);
      },
      p.gate, p.up);
}

void swiglu_backward_hopper(const SwigluBackwardParams& p, void* stream) {
  using namespace hopper;
  if (p.rows * p.C == 0) return;
  with_access(
      p,
      [&](auto element, auto P) {
        launch_swiglu("swiglu_backward", p, P, static_cast<cudaStream_t>(stream),
                      swiglu_backward_kernel<decltype(element), P>);
      },
      p.grad_y, p.gate, p.up);
}

void delta_gates_hopper(const DeltaGatesParams& p, void* stream) {
  using namespace hopper;
  const int64_t elements = p.in.tokens * p.in.H, per_cta = kGateThreads * kGatesPerThread;
  if (elements == 0) return;
  launch("delta_gates",
         {.grid = dim3(static_cast<unsigned>((elements + per_cta - 1) / per_cta)),
          .threads = kGateThreads,
          .programmatic = true},
         static_cast<cudaStream_t>(stream), delta_gates_kernel, p);
}

}  // namespace jet
