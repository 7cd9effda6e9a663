// Thread block clusters.
#pragma once

#include <cute/arch/cluster_sm90.hpp>

#include "csrc/hopper/barrier.h"

namespace jet::hopper {

// %cluster_ctarank: which CTA of the cluster this is.
__device__ inline int cluster_rank() { return static_cast<int>(cute::block_rank_in_cluster()); }

// barrier.cluster.arrive (release) and barrier.cluster.wait (acquire): all threads of all CTAs of the cluster.
__device__ inline void cluster_sync() {
  compiler_fence();
  cute::cluster_sync();
  compiler_fence();
}

}  // namespace jet::hopper
