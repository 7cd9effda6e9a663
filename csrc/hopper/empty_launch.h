// An empty kernel: the floor that every launch pays. Benchmarks subtract it.
#pragma once

namespace jet::hopper {

// Launches `<<<1, 32>>>` on `stream` (a cudaStream_t) and returns the launch's cudaError_t.
int empty_launch(void* stream);

}  // namespace jet::hopper
