// CUTLASS's wrappers of the copy engine: boxes of 1 to 5 dimensions, columns of pixels, bulk copies, and tensor maps
// that a kernel modifies. Every kernel loads into shared memory, dumps it as it lies there, and stores it elsewhere.
#include <cutlass/arch/barrier.h>
#include <cute/arch/cluster_sm90.hpp>
#include <cute/arch/copy_sm90_desc.hpp>
#include <cute/arch/copy_sm90_tma.hpp>

#include <utility>

using namespace cute;

struct Place {
  int at[5];       // coordinates of the first element, dimension 0 first
  int offsets[3];  // im2col: W, H, D
  int bytes;
};

struct alignas(128) TmaShared {
  char data[16 * 1024];
  TmaDescriptor map;
  uint64_t loaded;
};

template <int rank>
using Dimensions = std::make_integer_sequence<int, rank>;
constexpr uint64_t kHint = static_cast<uint64_t>(TMA::CacheHintSm90::EVICT_NORMAL);
constexpr uint16_t kBothCtas = 3;

// ---- The wrappers by rank
template <int rank>
struct Ops;
template <>
struct Ops<1> {
  using Load = SM90_TMA_LOAD_1D;
  using Multicast = SM90_TMA_LOAD_MULTICAST_1D;
  using Store = SM90_TMA_STORE_1D;
  using Add = SM90_TMA_REDUCE_ADD_1D;
};
template <>
struct Ops<2> {
  using Load = SM90_TMA_LOAD_2D;
  using Multicast = SM90_TMA_LOAD_MULTICAST_2D;
  using Store = SM90_TMA_STORE_2D;
  using Add = SM90_TMA_REDUCE_ADD_2D;
};
template <>
struct Ops<3> {
  using Load = SM90_TMA_LOAD_3D;
  using Multicast = SM90_TMA_LOAD_MULTICAST_3D;
  using Store = SM90_TMA_STORE_3D;
  using Add = SM90_TMA_REDUCE_ADD_3D;
};
template <>
struct Ops<4> {
  using Load = SM90_TMA_LOAD_4D;
  using Multicast = SM90_TMA_LOAD_MULTICAST_4D;
  using Store = SM90_TMA_STORE_4D;
  using Add = SM90_TMA_REDUCE_ADD_4D;
};
template <>
struct Ops<5> {
  using Load = SM90_TMA_LOAD_5D;
  using Multicast = SM90_TMA_LOAD_MULTICAST_5D;
  using Store = SM90_TMA_STORE_5D;
  using Add = SM90_TMA_REDUCE_ADD_5D;
};
struct AnyRank {
  using Load = SM90_TMA_LOAD;
  using Multicast = SM90_TMA_LOAD_MULTICAST;
  using Store = SM90_TMA_STORE;
  using Add = SM90_TMA_REDUCE_ADD;
};

template <int rank>
struct Columns;
template <>
struct Columns<3> {
  using Load = SM90_TMA_LOAD_IM2COL_3D;
  using Multicast = SM90_TMA_LOAD_IM2COL_MULTICAST_3D;
  using Store = SM90_TMA_STORE_IM2COL_3D;
};
template <>
struct Columns<4> {
  using Load = SM90_TMA_LOAD_IM2COL_4D;
  using Multicast = SM90_TMA_LOAD_IM2COL_MULTICAST_4D;
  using Store = SM90_TMA_STORE_IM2COL_4D;
};
template <>
struct Columns<5> {
  using Load = SM90_TMA_LOAD_IM2COL_5D;
  using Multicast = SM90_TMA_LOAD_IM2COL_MULTICAST_5D;
  using Store = SM90_TMA_STORE_IM2COL_5D;
};
struct AnyColumns {
  using Load = SM90_TMA_LOAD_IM2COL;
  using Multicast = SM90_TMA_LOAD_IM2COL_MULTICAST;
  using Store = SM90_TMA_STORE_IM2COL;
};

// ---- Calls
template <class Set, bool multicast, int... d>
__device__ void load_box(const TmaDescriptor& map, TmaShared& s, const Place& p, std::integer_sequence<int, d...>) {
  Set::Load::PREFETCH::copy(&map, p.at[d]...);
  if constexpr (multicast) {
    if (block_rank_in_cluster() == 0) Set::Multicast::copy(&map, &s.loaded, kBothCtas, kHint, s.data, p.at[d]...);
  } else {
    Set::Load::copy(&map, &s.loaded, kHint, s.data, p.at[d]...);
  }
}

template <class Set, bool multicast, int... d, int... o>
__device__ void load_column(const TmaDescriptor& map, TmaShared& s, const Place& p, std::integer_sequence<int, d...>,
                            std::integer_sequence<int, o...>) {
  Set::Load::PREFETCH::copy(&map, p.at[d]..., uint16_t(p.offsets[o])...);
  if constexpr (multicast) {
    if (block_rank_in_cluster() == 0)
      Set::Multicast::copy(&map, &s.loaded, kBothCtas, s.data, p.at[d]..., uint16_t(p.offsets[o])...);
  } else {
    Set::Load::copy(&map, &s.loaded, s.data, p.at[d]..., uint16_t(p.offsets[o])...);
  }
}

template <class Store, int... d>
__device__ void store_box(const TmaDescriptor& map, TmaShared& s, const Place& p, std::integer_sequence<int, d...>) {
  Store::copy(&map, s.data, p.at[d]...);
}

// Once the barrier is ready in every CTA of the cluster.
__device__ void expect(TmaShared& s, int bytes) {
  if (threadIdx.x == 0) {
    initialize_barrier(s.loaded, 2);
    cutlass::arch::fence_barrier_init();
    arrive_barrier(s.loaded);
    set_barrier_transaction_bytes(s.loaded, bytes);
  }
  cluster_sync();
}

__device__ void dump(TmaShared& s, int bytes, float* out) {
  wait_barrier(s.loaded, 0);
  out += blockIdx.x * bytes / 4;
  for (int n = threadIdx.x; n < bytes / 4; n += blockDim.x) out[n] = reinterpret_cast<const float*>(s.data)[n];
}

template <class Set, int rank, bool multicast>
__global__ void boxes(const __grid_constant__ TmaDescriptor from, const __grid_constant__ TmaDescriptor to,
                      const Place p, bool add, float* out) {
  __shared__ TmaShared s;
  if (threadIdx.x == 0) prefetch_tma_descriptor(&from);
  expect(s, p.bytes);
  if (threadIdx.x == 0) load_box<Set, multicast>(from, s, p, Dimensions<rank>());
  dump(s, p.bytes, out);
  if (threadIdx.x == 0 && blockIdx.x == 0) {
    if (add)
      store_box<typename Set::Add>(to, s, p, Dimensions<rank>());
    else
      store_box<typename Set::Store>(to, s, p, Dimensions<rank>());
    tma_store_arrive();
    tma_store_wait<0>();
  }
  cluster_sync();
}

template <class Set, int rank, bool multicast>
__global__ void columns(const __grid_constant__ TmaDescriptor from, const __grid_constant__ TmaDescriptor to,
                        const Place p, float* out) {
  __shared__ TmaShared s;
  expect(s, p.bytes);
  if (threadIdx.x == 0) load_column<Set, multicast>(from, s, p, Dimensions<rank>(), Dimensions<rank - 2>());
  dump(s, p.bytes, out);
  if (threadIdx.x == 0 && blockIdx.x == 0) {
    store_box<typename Set::Store>(to, s, p, Dimensions<rank>());
    tma_store_arrive();
    tma_store_wait<0>();
  }
  cluster_sync();
}

// out[i] = in[i] + 1
__global__ void bulk(const float* in, float* out, int bytes) {
  __shared__ TmaShared s;
  expect(s, bytes);
  if (threadIdx.x == 0) {
    SM90_BULK_COPY_G2S::PREFETCH::copy(in, bytes);
    SM90_BULK_COPY_G2S::copy(in, &s.loaded, s.data, bytes);
  }
  wait_barrier(s.loaded, 0);
  for (int n = threadIdx.x; n < bytes / 4; n += blockDim.x) reinterpret_cast<float*>(s.data)[n] += 1;
  tma_store_fence();
  __syncthreads();
  if (threadIdx.x == 0) {
    SM90_BULK_COPY_S2G::copy(s.data, out, bytes);
    tma_store_arrive();
    tma_store_wait<0>();
  }
}

// ---- Tensor maps that the kernel makes
enum class Make : int { in_shared, in_global, without_acquire, without_release, plain_copy };

// Warp 0 makes, at `work`, a map like `from` of the tensor at `address`, of shape and strides given.
__device__ void make_map(const TmaDescriptor& from, TmaDescriptor* work, TmaShared& s, const void* address,
                         array<uint32_t, 5> shape, array<uint64_t, 5> stride, Make how) {
  const int lane = threadIdx.x;
  const bool in_shared = how == Make::in_shared || how == Make::without_acquire;
  auto* to = reinterpret_cast<uint32_t*>(in_shared ? &s.map : work);
  to[lane] = reinterpret_cast<const uint32_t*>(&from)[lane];
  __syncwarp();
  if (in_shared) {
    if (lane == 0) {
      tma_descriptor_replace_addr_in_shared_mem(s.map, address);
      tma_descriptor_replace_dims_strides_in_shared_mem(s.map, shape, stride);
    }
    __syncwarp();
    tma_descriptor_cp_fence_release(work, s.map);
  } else {
    if (lane == 0 && how != Make::plain_copy) tma_descriptor_replace_addr_in_global_mem(work, address);
    __syncwarp();
    if (how == Make::in_global) tma_descriptor_fence_release();
  }
  tma_desc_commit_group();
  tma_desc_wait_group();
  __syncwarp();
  if (how != Make::without_acquire) tma_descriptor_fence_acquire(work);
}

__global__ void made_map(const __grid_constant__ TmaDescriptor from, TmaDescriptor* work, const void* address,
                         array<uint32_t, 5> shape, array<uint64_t, 5> stride, Place p, Make how, float* out) {
  __shared__ TmaShared s;
  expect(s, p.bytes);
  make_map(from, work, s, address, shape, stride, how);
  if (threadIdx.x == 0) SM90_TMA_LOAD_2D::copy(work, &s.loaded, kHint, s.data, p.at[0], p.at[1]);
  dump(s, p.bytes, out);
}

// ---- Host
struct Problem {
  CUtensorMap from, to;
  Place place;
  int rank, any_rank, multicast, add;
  float* dump;
};

template <class... Parameters, class... Arguments>
static int launch(void (*kernel)(Parameters...), int ctas, Arguments... arguments) {
  cudaLaunchConfig_t config{};
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim.x = ctas, attribute.val.clusterDim.y = 1, attribute.val.clusterDim.z = 1;
  config.gridDim = ctas, config.blockDim = 32, config.attrs = &attribute, config.numAttrs = 1;
  return cudaLaunchKernelEx(&config, kernel, arguments...);
}

template <class Set, int rank>
static int run_box(const Problem& p) {
  if (p.multicast) return launch(boxes<Set, rank, true>, 2, p.from, p.to, p.place, p.add != 0, p.dump);
  return launch(boxes<Set, rank, false>, 1, p.from, p.to, p.place, p.add != 0, p.dump);
}

template <class Set, int rank>
static int run_column(const Problem& p) {
  if (p.multicast) return launch(columns<Set, rank, true>, 2, p.from, p.to, p.place, p.dump);
  return launch(columns<Set, rank, false>, 1, p.from, p.to, p.place, p.dump);
}

extern "C" int run_boxes(const Problem* p) {
  int (*const direct[])(const Problem&) = {run_box<Ops<1>, 1>, run_box<Ops<2>, 2>, run_box<Ops<3>, 3>,
                                           run_box<Ops<4>, 4>, run_box<Ops<5>, 5>};
  int (*const any[])(const Problem&) = {run_box<AnyRank, 1>, run_box<AnyRank, 2>, run_box<AnyRank, 3>,
                                        run_box<AnyRank, 4>, run_box<AnyRank, 5>};
  return (p->any_rank ? any : direct)[p->rank - 1](*p);
}

extern "C" int run_columns(const Problem* p) {
  int (*const direct[])(const Problem&) = {run_column<Columns<3>, 3>, run_column<Columns<4>, 4>,
                                           run_column<Columns<5>, 5>};
  int (*const any[])(const Problem&) = {run_column<AnyColumns, 3>, run_column<AnyColumns, 4>,
                                        run_column<AnyColumns, 5>};
  return (p->any_rank ? any : direct)[p->rank - 3](*p);
}

extern "C" int run_bulk(const float* in, float* out, int64_t bytes) { return launch(bulk, 1, in, out, int(bytes)); }

extern "C" int run_made_map(const Problem* p, TmaDescriptor* work, const void* address, const uint32_t* shape,
                            const uint64_t* stride, int64_t how) {
  array<uint32_t, 5> dims{};
  array<uint64_t, 5> strides{};
  for (int d = 0; d < 5; ++d) dims[d] = shape[d], strides[d] = stride[d];
  return launch(made_map, 1, p->from, work, address, dims, strides, p->place, static_cast<Make>(how), p->dump);
}
