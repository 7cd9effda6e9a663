// What the parts of the simulated CUDA runtime share: loaded modules, kernels, launch rules, the record of launches.
#pragma once

#include <cuda_runtime_api.h>

#include <deque>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <vector>

#include "machine.h"
#include "ptx.h"

namespace hoppersim {

// Limits of an H200 (sm_90) that launches are held to.
constexpr int kMaxThreadsPerBlock = 1024;
constexpr int kMultiprocessors = 132;
constexpr int kRegistersPerMultiprocessor = 65536;
constexpr int kThreadsPerMultiprocessor = 2048;
constexpr int kBlocksPerMultiprocessor = 32;
constexpr int kSharedPerMultiprocessor = 228 * 1024;
constexpr int kSharedReservedPerBlock = 1024;
constexpr int kSharedWithoutOptIn = 48 * 1024;
constexpr int kMultiprocessorsPerCluster = 16;  // of a GPC: bounds how many CTAs of a cluster can be resident
constexpr uint32_t kPortableCluster = 8, kLargestCluster = 16;

// PTX text of one fat binary; parsed when first needed, because registration runs in static constructors.
struct LoadedModule {
  explicit LoadedModule(std::string ptx) : text(std::move(ptx)) {}
  ~LoadedModule();
  const Module& parsed();
  const Function& function(const std::string& name);  // throws Fault("unknown kernel")
  std::vector<uint8_t>* global(const std::string& name);

  std::string text;
  std::mutex mutex;
  std::unique_ptr<Module> module;
};

struct Kernel {
  LoadedModule* module = nullptr;
  std::string name;
  int largest_dynamic_shared = -1;  // cudaFuncAttributeMaxDynamicSharedMemorySize; -1: never set
  bool non_portable_cluster = false;
  int registers = 0;  // per thread, from the compiler's report; 0: not known

  const Function& function() { return module->function(name); }
  int dynamic_shared_limit();
  int threads_limit();
  int registers_assumed();  // known ones, else the most that the launch bound and .maxnreg let the compiler use
};

struct LaunchShape {
  Dim3 grid, block;
  std::optional<Dim3> cluster;  // from a launch attribute
  size_t dynamic_shared = 0;
};

// What the hardware's launch would say. On success sets the cluster dimensions that the launch will have.
cudaError_t check_launch(Kernel& kernel, const LaunchShape& shape, Dim3* cluster);

// Runs the kernel to its end; parameters are laid out as the PTX .param list. Keeps the record; throws Fault.
void run_kernel(Kernel& kernel, const LaunchShape& shape, Dim3 cluster, std::vector<uint8_t> parameters);

// Resident CTAs per multiprocessor.
int occupancy(Kernel& kernel, int threads, size_t dynamic_shared);

struct LaunchRecord {
  std::string kernel;
  Dim3 grid, block, cluster;
  uint32_t static_shared = 0, dynamic_shared = 0;
  Counters counters;
};

struct Runtime {
  std::mutex mutex;  // one launch at a time: streams are in order, and so is everything else
  Options options;
  std::deque<LaunchRecord> launches;  // since the last clear, the oldest dropped
  Reports reports;                    // of the launches since the last clear
  std::optional<Fault> fault;         // the first since Python took one
  std::string fault_text;             // storage of what cudaGetErrorString returns for it
};
Runtime& runtime();

void keep_fault(const Fault& fault);
// Adds a launch's reports, and the fault that ended it if any, to the runtime's; the caller holds its mutex.
void keep_reports(Reports& from, Fault* fault);
cudaError_t set_last_error(cudaError_t error);  // returns its argument; success leaves the last error alone

// The kernel behind a host stub (as nvcc's host code registers it) or a cudaKernel_t; null if there is none.
Kernel* find_kernel(const void* stub_or_handle);
// Every registered kernel of that mangled name (a test may compile one source twice).
std::vector<Kernel*> kernels_named(const std::string& name);

// Device variable behind the host's shadow; null if there is none.
std::vector<uint8_t>* find_variable(const void* shadow);

void* driver_entry(const char* name);  // of the driver, by name; null if it is not modelled

}  // namespace hoppersim
