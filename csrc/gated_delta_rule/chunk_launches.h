// What the host passes to prepare and join, and how it launches them. Instantiated for each K in chunk_prepare.cu, so that the launcher
// compiles no kernel of theirs.
#pragma once

#include <cuda.h>

#include "csrc/gated_delta_rule/chunk_plan.cuh"

namespace jet::hopper {

struct PrepareArguments {
  ChunkPlan plan;
  Dtype dtype;
  int64_t H, Hk;
  float scale;
  bool l2norm;
  const float *g, *beta;
  TokenStrides g_strides, beta_strides;
  char* images;  // [chunks, H] of kImageBytes
};

// (K, Hk, T, B), boxes of 64 tokens and a panel of SweepConfig<K>::Rows
struct PrepareMaps {
  CUtensorMap q, k;
};

struct JoinArguments {
  ChunkPlan plan;
  int64_t H, V;
  float* states;           // [cuts, H, K, V]
  const float* transfers;  // [cuts, H, K, K]
};

template <int K>
void launch_prepare(const PrepareArguments& p, const PrepareMaps& maps, cudaStream_t stream);
template <int K>
void launch_join(const JoinArguments& p, cudaStream_t stream);

}  // namespace jet::hopper
