// What the parts of the simulated CUDA runtime share: loaded modules, kernels, launch rules, the record of launches.
#pragma once

#include <cuda_runtime_api.h>

#include <deque>
#include <map>
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
constexpr size_t kMemoryBytes = 141ull * 1000 * 1000 * 1000;
constexpr uint32_t kPortableCluster = 8, kLargestCluster = 16;

// The driver that is simulated: of CUDA 13.2, the first for which CuTe has no workaround.
constexpr int kDriverVersion = 13020;

// PTX text, or an image that holds it; read when first needed, because registration runs in static constructors.
struct LoadedModule {
  explicit LoadedModule(std::string ptx) : text(std::move(ptx)) {}
  explicit LoadedModule(const void* image) : image(image) {}
  ~LoadedModule();
  const Module& parsed();
  const Function& function(const std::string& name);  // throws Fault("unknown kernel")
  VariableBytes* global(const std::string& name);
  // Launches take the kernel of this text, until restore(); variables stay where they are.
  void replace(const std::string& name, const std::string& changed_text);
  void restore(const std::string& name);

  const void* image = nullptr;
  std::string text;
  std::mutex mutex;
  std::unique_ptr<Module> module;
  std::map<std::string, std::unique_ptr<Function>> replaced;
};

// The PTX text for this device of a fat binary, of its wrapper, or of PTX text; throws Fault("no ptx").
std::string ptx_of_image(const void* image);

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
  bool cooperative = false;
};

// What the hardware's launch would say. On success sets the cluster dimensions that the launch will have.
cudaError_t check_launch(Kernel& kernel, const LaunchShape& shape, Dim3* cluster);

// The effect of a launch's attributes on its shape; an error for those not modelled.
cudaError_t apply_attributes(const cudaLaunchAttribute* attributes, unsigned count, LaunchShape* shape);

// Checks and runs with the arguments as the host passes them; keeps the Fault.
cudaError_t launch_kernel(Kernel& kernel, const LaunchShape& shape, void** arguments);

// cudaFuncSetAttribute
cudaError_t set_attribute(Kernel& kernel, cudaFuncAttribute attribute, int value);

// Runs the kernel to its end; parameters are laid out as the PTX .param list. Keeps the record; throws Fault.
void run_kernel(Kernel& kernel, const LaunchShape& shape, Dim3 cluster, std::vector<uint8_t> parameters);

// Resident CTAs per multiprocessor.
int occupancy(Kernel& kernel, int threads, size_t dynamic_shared);
// CTAs that the device may hold at once; where the registers are not known, what the rest allows.
uint64_t most_resident(Kernel& kernel, const LaunchShape& shape);

struct LaunchRecord {
  std::string kernel, mangled;
  Dim3 grid, block, cluster;
  uint32_t static_shared = 0, dynamic_shared = 0;
  int occupancy = 0, registers = 0;  // resident CTAs per multiprocessor; registers per thread, 0: not known
  Counters counters;
};

struct Runtime {
  std::mutex mutex;  // one launch at a time: streams are in order, and so is everything else
  Options options;
  std::deque<LaunchRecord> launches;  // since the last clear, the oldest dropped
  Reports reports;                    // of the launches since the last clear
  std::optional<Fault> fault;         // the first since Python took one
  std::string fault_text;             // storage of what cudaGetErrorString returns for it
  std::string report_path;            // of runtime_file.cpp; empty: none is wanted
};
Runtime& runtime();

// runtime_environment.cpp; a value that cannot be used ends the process with a message and status 2.
void read_environment(Options& options, std::string& report_path);

// runtime_file.cpp
void tell_module();
void tell_launch(const LaunchRecord& record, bool finished);
void tell_refusal(const std::string& kernel, const std::string& error);  // a launch that hardware would refuse
void tell(const Report& report);

// Kept until Python asks. The first wins, but a finding wins over a call that is not modelled.
void keep_fault(const Fault& fault);
// Adds a launch's reports, and the fault that ended it if any, to the runtime's; the caller holds its mutex.
void keep_reports(Reports& from, Fault* fault);
cudaError_t set_last_error(cudaError_t error);  // returns its argument; success leaves the last error alone

// The kernel behind a host stub (as nvcc's host code registers it) or a cudaKernel_t; null if there is none.
Kernel* find_kernel(const void* stub_or_handle);
// Every registered kernel of that mangled name (a test may compile one source twice).
std::vector<Kernel*> kernels_named(const std::string& name);

// Device variable behind the host's shadow; null if there is none.
VariableBytes* find_variable(const void* shadow);

void* driver_entry(const char* name);  // of the driver, by name; null if there is no such function

// What a call that is not modelled returns: 801, in the runtime's numbers and the driver's. `what` is kept as a Fault.
constexpr const char* kUnsupportedCall = "unsupported runtime call";
int unsupported_runtime_call(const char* what);
int unsupported_driver_call(const char* what);
inline cudaError_t unsupported_call(const char* what, int number) {
  return static_cast<cudaError_t>(unsupported_runtime_call((what + (" " + std::to_string(number))).c_str()));
}

}  // namespace hoppersim
