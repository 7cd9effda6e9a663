#include "csrc/hopper/partial_sums.h"

#include "csrc/hopper/convert.h"
#include "csrc/hopper/launch.h"

namespace jet::hopper {
namespace {

constexpr int kColumns = 32;  // of a CTA: a warp reads a line of 128 bytes
constexpr int kWarps = 8;     // of 132 rows, one for each multiprocessor, a thread adds up 17

__global__ void __launch_bounds__(32 * kWarps) partial_sums_kernel(const __grid_constant__ PartialSums p) {
  __shared__ float sums[kWarps][kColumns];
  const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
  const int column = static_cast<int>(blockIdx.x) * kColumns + lane;
  griddepcontrol_wait();
  griddepcontrol_launch_dependents();
  float sum = 0;
  if (column < p.columns) {
    const float* from = p.partials + int64_t{blockIdx.y} * p.columns + column;
    const int64_t row_size = int64_t{p.count} * p.columns;
#pragma unroll 8
    for (int row = warp; row < p.rows; row += kWarps) sum += __ldcg(from + row * row_size);
  }
  sums[warp][lane] = sum;
  __syncthreads();
  if (warp > 0 || column >= p.columns) return;
#pragma unroll
  for (int i = 1; i < kWarps; ++i) sum += sums[i][lane];
  store_from_float(p.outputs[blockIdx.y], p.dtype, column, sum);
}

}  // namespace

void add_up(const char* op, const PartialSums& p, cudaStream_t stream) {
  if (p.columns == 0) return;
  const auto ctas = static_cast<unsigned>((p.columns + kColumns - 1) / kColumns);
  launch(op, {.grid = dim3(ctas, static_cast<unsigned>(p.count)), .threads = 32 * kWarps, .programmatic = true}, stream,
         partial_sums_kernel, p);
}

}  // namespace jet::hopper
