// The launches of the backward that are files of their own, so that they compile at the same time.
#pragma once

#include "csrc/gated_delta_rule/chunk/backward/gradients_shared.cuh"
#include "csrc/gated_delta_rule/chunk/sweep_shared.cuh"

namespace jet::hopper {

// S0 and U' of every chunk.
void launch_states(const SweepArguments& p, const SweepMaps& maps, cudaStream_t stream);

// The gradients of states and values; without `chunk_states` of the states at cuts alone. dO stands in v's place and
// dV in o's.
void launch_reverse_bf16(const SweepArguments& p, const SweepMaps& maps, cudaStream_t stream);
void launch_reverse_f16(const SweepArguments& p, const SweepMaps& maps, cudaStream_t stream);

// The other gradients.
void launch_gradients_bf16(int64_t K, const GradientArguments& p, const GradientMaps& maps, int ctas,
                           cudaStream_t stream);
void launch_gradients_f16(int64_t K, const GradientArguments& p, const GradientMaps& maps, int ctas,
                          cudaStream_t stream);

}  // namespace jet::hopper
