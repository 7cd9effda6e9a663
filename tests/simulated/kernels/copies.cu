// One box of a tensor of 1 to 5 dimensions: loaded by TMA, dumped as it lies in shared memory, stored (or added) by TMA
// elsewhere. And contiguous bytes there and back by bulk copies.
#include "csrc/hopper/launch.h"
#include "csrc/hopper/tensor_map.h"
#include "csrc/hopper/tma.h"
#include "tests/simulated/kernels/guarded.h"

namespace jet::hopper::test {

struct Box {
  int at[5];  // coordinates of its first element; may lie outside the tensor
  int bytes;
};

struct CopyShared {
  alignas(kTileAlign) char data[64 * 1024];
  Mbarrier loaded;
};

template <int... d>
__device__ void load_box(CopyShared& shared, const CUtensorMap& map, const Box& box, std::integer_sequence<int, d...>) {
  tma_load(shared.data, map, shared.loaded, CacheHint::evict_first, box.at[d]...);
}

// cp.reduce.async.bulk.tensor.Nd.global.shared::cta.add.bulk_group
template <class... Coordinates>
__device__ void tma_reduce_add(const CUtensorMap& map, const void* shared, Coordinates... coordinates) {
  cute::SM90_TMA_REDUCE_ADD::copy(&map, shared, coordinates...);
}

template <int... d>
__device__ void store_box(const CUtensorMap& map, const CopyShared& shared, const Box& box, bool add,
                          std::integer_sequence<int, d...>) {
  if (add)
    tma_reduce_add(map, shared.data, box.at[d]...);
  else
    tma_store(map, shared.data, box.at[d]...);
}

template <int rank>
__global__ void copy_box(const __grid_constant__ CUtensorMap from, const __grid_constant__ CUtensorMap to,
                         const Box box, bool add, float* dump) {
  extern __shared__ __align__(kTileAlign) char memory[];
  auto& shared = *reinterpret_cast<CopyShared*>(memory);
  if (threadIdx.x == 0) {
    prefetch_tensormap(from);
    shared.loaded.init(1);
    fence_mbarrier_init();
    shared.loaded.arrive_expect_tx(box.bytes);
    load_box(shared, from, box, std::make_integer_sequence<int, rank>());
  }
  __syncthreads();
  shared.loaded.wait(PhaseParity::first());
  for (int at = threadIdx.x; at < box.bytes / 4; at += blockDim.x)
    dump[at] = reinterpret_cast<const float*>(shared.data)[at];
  if (threadIdx.x != 0) return;
  store_box(to, shared, box, add, std::make_integer_sequence<int, rank>());
  cp_async_bulk_commit_group();
  cp_async_bulk_wait_group<0>();
}

// out[i] = in[i] + 1 for `count` floats, a multiple of 4. The additions are ordinary writes, so fence.proxy.async
// stands between them and the store.
__global__ void copy_bytes(const float* in, float* out, int count) {
  extern __shared__ __align__(kTileAlign) char memory[];
  auto& shared = *reinterpret_cast<CopyShared*>(memory);
  if (threadIdx.x == 0) {
    shared.loaded.init(1);
    fence_mbarrier_init();
    shared.loaded.arrive_expect_tx(count * 4);
    cp_async_bulk_load(shared.data, in, count * 4, shared.loaded);
  }
  __syncthreads();
  shared.loaded.wait(PhaseParity::first());
  for (int at = threadIdx.x; at < count; at += blockDim.x) reinterpret_cast<float*>(shared.data)[at] += 1;
  fence_proxy_async();
  __syncthreads();
  if (threadIdx.x != 0) return;
  cp_async_bulk_store(out, shared.data, count * 4);
  cp_async_bulk_commit_group();
  cp_async_bulk_wait_group_read<0>();
}

struct CopyProblem {
  const float* from;
  float *to, *dump;
  int rank, swizzle, add;
  int extent[5], box[5], at[5];  // elements; tensors are contiguous, dimension 0 first
};

inline CUtensorMap map_of(const CopyProblem& p, const char* name, const void* data) {
  TensorMapPlan plan = {name, data, Dtype::f32, p.rank, {}, {}, {}, static_cast<Swizzle>(p.swizzle)};
  uint64_t stride = 4;
  for (int d = 0; d < p.rank; ++d) {
    plan.extent[d] = p.extent[d], plan.box[d] = p.box[d], plan.stride_bytes[d] = stride;
    stride *= p.extent[d];
  }
  return make_tensor_map(plan);
}

}  // namespace jet::hopper::test

extern "C" int copy_box(const jet::hopper::test::CopyProblem* problem, char* message) {
  using namespace jet::hopper::test;
  const CopyProblem& p = *problem;
  return guarded(message, [&] {
    const CUtensorMap from = map_of(p, "from", p.from), to = map_of(p, "to", p.to);
    Box box = {{p.at[0], p.at[1], p.at[2], p.at[3], p.at[4]}, 4};
    for (int d = 0; d < p.rank; ++d) box.bytes *= p.box[d];
    void (*const kernels[])(CUtensorMap, CUtensorMap, Box, bool, float*) = {copy_box<1>, copy_box<2>, copy_box<3>,
                                                                            copy_box<4>, copy_box<5>};
    jet::hopper::launch("copy_box", {dim3(1), 64, sizeof(CopyShared)}, nullptr, kernels[p.rank - 1], from, to, box,
                        p.add != 0, p.dump);
  });
}

extern "C" int copy_bytes(const float* in, float* out, int count, char* message) {
  using namespace jet::hopper::test;
  return guarded(message, [&] {
    jet::hopper::launch("copy_bytes", {dim3(1), 64, sizeof(CopyShared)}, nullptr, copy_bytes, in, out, count);
  });
}
