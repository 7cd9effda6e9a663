// A whole program for `hoppersim run`: its first argument says what it does.
#include <cstdio>
#include <cstdlib>
#include <cstring>

__device__ __forceinline__ float twice(const float* x) {
  return *x * 2;  // line 7
}

template <int N>
__global__ void __launch_bounds__(N) shift(float* x, int missing) {
  __shared__ float s[N];
  const int i = threadIdx.x;
  if (i != missing) s[i] = x[i];
  __syncthreads();
  x[i] = twice(&s[(i + 1) % N]);  // line 16
}

__global__ void spin(volatile int* x) {
  while (*x == 0) {}
}

int main(int count, char** arguments) {
  const char* what = count > 1 ? arguments[1] : "clean";
  auto is = [&](const char* name) { return std::strcmp(what, name) == 0; };
  if (is("no_launch")) return 5;
  float* x;
  cudaMalloc(&x, 64 * sizeof(float));
  cudaMemset(x, 0, 64 * sizeof(float));
  if (is("spin")) spin<<<1, 32>>>(reinterpret_cast<int*>(x));
  shift<64><<<is("empty") ? 0 : 2 - 1, 64>>>(x, is("bug") || is("bug_then_abort") ? 7 : -1);
  if (is("twice")) shift<64><<<1, 64>>>(x, -1);
  const cudaError_t error = cudaGetLastError();
  std::printf("%s: %s\n", what, cudaGetErrorName(error));
  if (is("bug_then_abort")) std::abort();
  if (is("fails")) return 3;
  if (is("fails_late")) return std::strcmp(std::getenv("HOPPERSIM_TIMING"), "late") == 0 ? 4 : 0;
  cudaFree(x);
  return 0;
}
