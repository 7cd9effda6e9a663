// A GEMM that is all CUTLASS: collective builders, warp-specialised, TMA in and out, clusters of 2. Nothing of ours but
// the call. C[M, N] = A B^T; A [M, K], B [N, K] f16, C [M, N] f32, all rows contiguous.
#include <cutlass/cutlass.h>
#include <cutlass/gemm/device/gemm_universal_adapter.h>
#include <cutlass/epilogue/collective/collective_builder.hpp>
#include <cutlass/gemm/collective/collective_builder.hpp>
#include <cutlass/gemm/kernel/gemm_universal.hpp>
#include <cutlass/util/packed_stride.hpp>

namespace {

using Tile = cute::Shape<cute::_128, cute::_64, cute::_64>;
using Cluster = cute::Shape<cute::_2, cute::_1, cute::_1>;

template <class Schedule, class EpilogueSchedule>
struct Gemm {
  using Row = cutlass::layout::RowMajor;
  using Column = cutlass::layout::ColumnMajor;
  using Epilogue = typename cutlass::epilogue::collective::CollectiveBuilder<
      cutlass::arch::Sm90, cutlass::arch::OpClassTensorOp, Tile, Cluster,
      cutlass::epilogue::collective::EpilogueTileAuto, float, float, void, Row, 4, float, Row, 4,
      EpilogueSchedule>::CollectiveOp;
  using Mainloop = typename cutlass::gemm::collective::CollectiveBuilder<
      cutlass::arch::Sm90, cutlass::arch::OpClassTensorOp, cutlass::half_t, Row, 8, cutlass::half_t, Column, 8, float,
      Tile, Cluster,
      cutlass::gemm::collective::StageCountAutoCarveout<static_cast<int>(sizeof(typename Epilogue::SharedStorage))>,
      Schedule>::CollectiveOp;
  using Kernel = cutlass::gemm::kernel::GemmUniversal<cute::Shape<int, int, int, int>, Mainloop, Epilogue>;
  using Device = cutlass::gemm::device::GemmUniversalAdapter<Kernel>;

  static int run(const void* a, const void* b, float* c, int m, int n, int k) {
    const auto stride_a = cutlass::make_cute_packed_stride(typename Kernel::StrideA{}, cute::make_shape(m, k, 1));
    const auto stride_b = cutlass::make_cute_packed_stride(typename Kernel::StrideB{}, cute::make_shape(n, k, 1));
    const auto stride_c = cutlass::make_cute_packed_stride(typename Kernel::StrideD{}, cute::make_shape(m, n, 1));
    typename Device::Arguments arguments{
        cutlass::gemm::GemmUniversalMode::kGemm,
        {m, n, k, 1},
        {static_cast<const cutlass::half_t*>(a), stride_a, static_cast<const cutlass::half_t*>(b), stride_b},
        {{1.0f, 0.0f}, nullptr, stride_c, c, stride_c}};
    arguments.hw_info.sm_count = 2;
    Device gemm;
    if (Device::get_workspace_size(arguments) != 0) return -1;
    if (const auto status = gemm.can_implement(arguments); status != cutlass::Status::kSuccess)
      return static_cast<int>(status);
    return static_cast<int>(gemm(arguments));
  }
};

}  // namespace

// Returns the cutlass::Status, 0 is success.
extern "C" int cutlass_cooperative(const void* a, const void* b, float* c, int m, int n, int k) {
  return Gemm<cutlass::gemm::KernelTmaWarpSpecializedCooperative,
              cutlass::epilogue::TmaWarpSpecializedCooperative>::run(a, b, c, m, n, k);
}
extern "C" int cutlass_pingpong(const void* a, const void* b, float* c, int m, int n, int k) {
  return Gemm<cutlass::gemm::KernelTmaWarpSpecializedPingpong, cutlass::epilogue::TmaWarpSpecialized>::run(a, b, c, m,
                                                                                                           n, k);
}
