// CUTLASS's wrappers of barriers, clusters, register counts and thread-to-shared copies, each called once or more.
// The results are words that test_cutlass_wrappers.py knows.
#define CUTLASS_ENABLE_GDC_FOR_SM90 1
#include <cutlass/arch/barrier.h>
#include <cutlass/arch/grid_dependency_control.h>
#include <cutlass/arch/reg_reconfig.h>
#include <cute/arch/cluster_sm90.hpp>
#include <cute/arch/copy_sm50.hpp>
#include <cute/arch/copy_sm75.hpp>
#include <cute/arch/copy_sm80.hpp>
#include <cute/arch/copy_sm90.hpp>

using namespace cute;
using namespace cutlass::arch;

// ---- Named barriers: 128 threads
// Everybody writes, `barrier` orders, everybody reads another warp's word.
template <class Barrier>
__device__ void exchange(uint32_t* values, uint32_t*& out, uint32_t step, Barrier barrier) {
  values[threadIdx.x] = threadIdx.x + 1000 * step;
  barrier();
  *out = values[threadIdx.x ^ 96];
  out += 128;
  __syncthreads();
}

// The first two warps write and arrive, the others wait and read.
template <class Arrive>
__device__ void hand_over(uint32_t* values, uint32_t*& out, uint32_t step, uint32_t id, Arrive arrive) {
  if (threadIdx.x < 64) {
    values[threadIdx.x] = threadIdx.x + 1000 * step;
    arrive();
  } else {
    asm volatile("bar.sync %0, 128;" ::"r"(id));
    *out = values[threadIdx.x - 64];
  }
  out += 128;
  __syncthreads();
}

__global__ void named_barriers(uint32_t* results) {
  __shared__ uint32_t values[128];
  uint32_t* out = results + threadIdx.x;
  constexpr auto reserved = ReservedNamedBarriers::EpilogueBarrier;
  NamedBarrier first(128, 0u), own(128, reserved);
  exchange(values, out, 0, [&] { first.arrive_and_wait(); });
  exchange(values, out, 1, [&] { own.sync(); });
  exchange(values, out, 2, [&] { first.arrive_and_wait_unaligned(); });
  exchange(values, out, 3, [&] { NamedBarrier::arrive_and_wait(128, 1u); });
  exchange(values, out, 4, [&] { NamedBarrier::arrive_and_wait(128, reserved); });
  exchange(values, out, 5, [&] { NamedBarrier::sync(128, 2u); });
  exchange(values, out, 6, [&] { NamedBarrier::sync(128, reserved); });
  constexpr uint32_t user = NamedBarrier::ReservedNamedBarrierCount;
  hand_over(values, out, 7, user, [&] { first.arrive(); });
  hand_over(values, out, 8, user, [&] { first.arrive_unaligned(); });
  hand_over(values, out, 9, user + 3, [&] { NamedBarrier::arrive(128, 3u); });
  hand_over(values, out, 10, 1, [&] { NamedBarrier::arrive(128, reserved); });
}

// ---- mbarriers in a cluster of two CTAs of 64 threads
struct ClusterShared {
  alignas(16) uint64_t bars[16];
  uint32_t values[64], mailbox[64], copied[2][64];
};

__device__ ClusterBarrier& plain(ClusterShared& s, int n) { return reinterpret_cast<ClusterBarrier&>(s.bars[n]); }
__device__ ClusterTransactionBarrier& counting(ClusterShared& s, int n) {
  return reinterpret_cast<ClusterTransactionBarrier&>(s.bars[n]);
}

// 4, 6, 8, 10, 12 and 14 count one arrival, the others 64.
__device__ void initialise(ClusterShared& s) {
  using Plain = ClusterBarrier;
  using Counting = ClusterTransactionBarrier;
  if (threadIdx.x == 0) {
    plain(s, 8).init(1);
    ClusterBarrier::init(&s.bars[10], 1);
    cutlass::arch::detail::initialize_barrier_array<Plain*, 2>(&plain(s, 0), 64);
    cutlass::arch::detail::initialize_barrier_array<Plain, 2>(&s.bars[2], 64);
    cutlass::arch::detail::initialize_barrier_array_pair<Counting*, Plain*, 1>(&counting(s, 4), &plain(s, 5), 1, 64);
    cutlass::arch::detail::initialize_barrier_array_pair<Counting, Plain, 1>(&s.bars[6], &s.bars[7], 1, 64);
  }
  if (threadIdx.x < 32) {
    cutlass::arch::detail::initialize_barrier_array_aligned<Plain*, 1>(&plain(s, 9), 64);
    cutlass::arch::detail::initialize_barrier_array_aligned<Plain, 1>(&s.bars[11], 64);
    cutlass::arch::detail::initialize_barrier_array_pair_aligned<Counting*, Plain*, 1>(&counting(s, 12), &plain(s, 13),
                                                                                       1, 64);
    cutlass::arch::detail::initialize_barrier_array_pair_aligned<Counting, Plain, 1>(&s.bars[14], &s.bars[15], 1, 64);
  }
  fence_barrier_init();
  cluster_arrive_relaxed();
  cluster_wait();
}

template <class Barrier>
__device__ void reverse(ClusterShared& s, uint32_t*& out, uint32_t step, Barrier barrier) {
  s.values[threadIdx.x] = threadIdx.x + 1000 * step;
  barrier();
  *out = s.values[63 - threadIdx.x];
  out += 64;
  __syncthreads();
}

__device__ void local_arrivals(ClusterShared& s, uint32_t*& out) {
  reverse(s, out, 0, [&] { plain(s, 0).arrive(), plain(s, 0).wait(0); });
  reverse(s, out, 1, [&] {
    ClusterBarrier::arrive(&s.bars[2]);
    while (!ClusterBarrier::test_wait(&s.bars[2], 0, 1)) {}
  });
  reverse(s, out, 2, [&] {
    plain(s, 9).arrive();
    while (!plain(s, 9).try_wait(0)) {}
  });
  reverse(s, out, 3, [&] {
    plain(s, 11).arrive();
    while (!plain(s, 11).test_wait(0)) {}
  });
}

__device__ void remote_arrivals(ClusterShared& s, uint32_t*& out, uint32_t rank) {
  const uint32_t peer = rank ^ 1;
  plain(s, 1).arrive(peer);
  plain(s, 1).wait(0);
  ClusterBarrier::arrive(&s.bars[3], peer, 1);
  while (!ClusterBarrier::try_wait(&s.bars[3], 0)) {}
  if (threadIdx.x == 0) counting(s, 4).arrive_and_expect_tx(sizeof s.mailbox);
  store_shared_remote(threadIdx.x + 5000 + rank, cast_smem_ptr_to_uint(&s.mailbox[threadIdx.x]),
                      cast_smem_ptr_to_uint(&s.bars[4]), peer);
  ClusterBarrier::wait(&s.bars[4], 0);
  *out = s.mailbox[threadIdx.x];
  out += 64;
}

// Transactions that no copy makes: what one thread expects, it or the other CTA completes.
__device__ void transactions(ClusterShared& s, uint32_t*& out, uint32_t rank) {
  const uint32_t peer = rank ^ 1;
  if (threadIdx.x == 0) {
    ClusterTransactionBarrier::arrive_and_expect_tx(&s.bars[6], 16, peer, 1);
    ClusterTransactionBarrier::complete_transaction(&s.bars[6], rank, 16, 1);
    counting(s, 12).expect_transaction(8);
    ClusterTransactionBarrier::arrive_and_expect_tx(&s.bars[12], 24);
    counting(s, 12).complete_transaction(32u);
    ClusterTransactionBarrier::expect_transaction(&s.bars[14], 8);
    counting(s, 14).arrive_and_expect_tx(8, peer);
    counting(s, 14).complete_transaction(rank, 16u, 1u);
  }
  for (int n : {6, 12, 14}) plain(s, n).wait(0);
  *out = 1;
  out += 64;
}

__device__ void copies_that_arrive(ClusterShared& s, const uint32_t* in, uint32_t*& out) {
  SM80_CP_ASYNC_CACHEALWAYS<uint32_t>::copy(in[threadIdx.x], s.copied[0][threadIdx.x]);
  cpasync_barrier_arrive_noinc(&s.bars[5]);
  plain(s, 5).wait(0);
  *out = s.copied[0][63 - threadIdx.x];
  out += 64;
  SM80_CP_ASYNC_CACHEALWAYS<uint32_t>::copy(in[64 + threadIdx.x], s.copied[1][threadIdx.x]);
  cpasync_barrier_arrive(&s.bars[7]);
  plain(s, 7).arrive();
  plain(s, 7).wait(0);
  *out = s.copied[1][63 - threadIdx.x];
  out += 64;
}

__global__ void cluster_barriers(const uint32_t* in, uint32_t* results) {
  __shared__ ClusterShared s;
  const uint32_t rank = block_rank_in_cluster();
  uint32_t* out = results + blockIdx.x * 64 * 8 + threadIdx.x;
  initialise(s);
  local_arrivals(s, out);
  remote_arrivals(s, out, rank);
  transactions(s, out, rank);
  copies_that_arrive(s, in, out);
  cluster_sync();
  if (threadIdx.x == 0) ClusterBarrier::invalidate(&s.bars[0]);
}

// ---- Where in the grid; which thread is elected; registers; dependent launches
__global__ void __launch_bounds__(128) places(uint32_t* results) {
  wait_on_dependent_grids();
  warpgroup_reg_dealloc<40>();
  warpgroup_reg_alloc<232>();
  const uint32_t block = blockIdx.x + gridDim.x * (blockIdx.y + gridDim.y * blockIdx.z);
  uint32_t* out = results + (block * 128 + threadIdx.x) * 16;
  const dim3 shapes[] = {cluster_grid_dims(), cluster_id_in_grid(), block_id_in_cluster(), cluster_shape()};
  for (const dim3& shape : shapes) *out++ = shape.x, *out++ = shape.y, *out++ = shape.z;
  *out++ = elect_one_sync();
  const ElectOneLaneIdReturnType leader = elect_one_leader_sync();
  *out++ = leader.is_leader;
  *out++ = leader.leader_lane_id;
  __shared__ uint32_t word;
  const uint32_t rank = block_rank_in_cluster();
  if (threadIdx.x == 0) word = 100 + rank;
  cluster_arrive();
  cluster_wait();
  uint32_t of_peer;
  asm volatile("ld.shared::cluster.u32 %0, [%1];"
               : "=r"(of_peer)
               : "r"(set_block_rank(cast_smem_ptr_to_uint(&word), rank ^ 1)));
  *out++ = of_peer;
  cluster_sync();
  launch_dependent_grids();
}

// ---- Matrix moves: 32 threads
__global__ void matrix_moves(const uint32_t* in, uint32_t* out) {
  __shared__ alignas(128) uint4 memory[2][32];
  auto *from = reinterpret_cast<uint128_t*>(memory[0]), *to = reinterpret_cast<uint128_t*>(memory[1]);
  const int lane = threadIdx.x;
  for (int w = 0; w < 4; ++w) reinterpret_cast<uint32_t*>(&from[lane])[w] = in[4 * lane + w];
  __syncwarp();
  uint32_t r[20] = {};
  SM75_U32x1_LDSM_N::copy(from[lane], r[0]);
  SM75_U32x2_LDSM_N::copy(from[lane], r[1], r[2]);
  SM75_U32x4_LDSM_N::copy(from[lane], r[3], r[4], r[5], r[6]);
  SM75_U16x2_LDSM_T::copy(from[lane], r[7]);
  SM75_U16x4_LDSM_T::copy(from[lane], r[8], r[9]);
  SM75_U16x8_LDSM_T::copy(from[lane], r[10], r[11], r[12], r[13]);
  SM75_U32x1_MOVM_T::copy(r[0], r[14]);
  uint2 legacy[2];
  copy_ldsm(&from[lane], &legacy[0]);
  copy_ldsm_trans(&from[lane], &legacy[1]);
  r[15] = legacy[0].x, r[16] = legacy[0].y, r[17] = legacy[1].x, r[18] = legacy[1].y;
  for (int n = 0; n < 19; ++n) out[n * 32 + lane] = r[n];
  out += 19 * 32;
  auto dump = [&] {
    __syncwarp();
    for (int w = 0; w < 4; ++w) *(out + 4 * lane + w) = reinterpret_cast<uint32_t*>(&to[lane])[w];
    out += 128;
    to[lane] = uint128_t{};
    __syncwarp();
  };
  to[lane] = uint128_t{};
  __syncwarp();
  SM90_U32x1_STSM_N::copy(r[3], to[lane]), dump();
  SM90_U32x2_STSM_N::copy(r[3], r[4], to[lane]), dump();
  SM90_U32x4_STSM_N::copy(r[3], r[4], r[5], r[6], to[lane]), dump();
  SM90_U16x2_STSM_T::copy(r[3], to[lane]), dump();
  SM90_U16x4_STSM_T::copy(r[3], r[4], to[lane]), dump();
  SM90_U16x8_STSM_T::copy(r[3], r[4], r[5], r[6], to[lane]), dump();
  copy_stsm(reinterpret_cast<uint2*>(&r[3]), &to[lane]), dump();
  copy_stsm_trans(reinterpret_cast<uint2*>(&r[3]), &to[lane]), dump();
}

// ---- cp.async and shuffles: 32 threads
__global__ void thread_copies(const uint4* in, uint32_t* out) {
  __shared__ uint4 to[4][32];
  const int lane = threadIdx.x;
  SM80_CP_ASYNC_CACHEALWAYS<uint4>::copy(in[lane], to[0][lane]);
  cp_async_fence();
  SM80_CP_ASYNC_CACHEGLOBAL<uint4>::copy(in[lane], to[1][lane]);
  cp_async_fence();
  cp_async_wait<1>();
  out[lane] = to[0][lane].y;
  SM80_CP_ASYNC_CACHEALWAYS_ZFILL<uint4>::copy(in[lane], to[2][lane], lane % 2 == 0);
  SM80_CP_ASYNC_CACHEGLOBAL_ZFILL<uint4>::copy(in[lane], to[3][lane], lane % 3 == 0);
  cp_async_wait(Int<0>{});
  out[32 + lane] = to[1][lane].z;
  out[64 + lane] = to[2][lane].z;
  out[96 + lane] = to[3][lane].w;
  uint32_t a = in[lane].x, b = in[lane].y, c = a, d = b;
  SM50_Shuffle_U32_2x2Trans_XOR1::copy(in[lane].x, in[lane].y, a, b);
  SM50_Shuffle_U32_2x2Trans_XOR4::copy(in[lane].x, in[lane].y, c, d);
  out[128 + lane] = a, out[160 + lane] = b, out[192 + lane] = c, out[224 + lane] = d;
}

template <class... Parameters, class... Arguments>
static int launch(void (*kernel)(Parameters...), dim3 grid, int threads, dim3 cluster, Arguments... arguments) {
  cudaLaunchConfig_t config{};
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim.x = cluster.x, attribute.val.clusterDim.y = cluster.y,
  attribute.val.clusterDim.z = cluster.z;
  config.gridDim = grid, config.blockDim = threads, config.attrs = &attribute, config.numAttrs = 1;
  return cudaLaunchKernelEx(&config, kernel, arguments...);
}

extern "C" int run_named_barriers(uint32_t* out) { return launch(named_barriers, 1, 128, 1, out); }
extern "C" int run_cluster_barriers(const uint32_t* in, uint32_t* out) {
  return launch(cluster_barriers, 2, 64, 2, in, out);
}
extern "C" int run_places(uint32_t* out) { return launch(places, dim3(4, 2, 1), 128, dim3(2, 1, 1), out); }
extern "C" int run_matrix_moves(const uint32_t* in, uint32_t* out) { return launch(matrix_moves, 1, 32, 1, in, out); }
extern "C" int run_thread_copies(const uint4* in, uint32_t* out) { return launch(thread_copies, 1, 32, 1, in, out); }
