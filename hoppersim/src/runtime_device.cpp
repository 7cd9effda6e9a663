// The device (an H200), errors, streams and events. Everything runs in order at the call, so streams and events only
// exist.
#include <algorithm>
#include <cstdio>
#include <unordered_map>
#include <utility>

#include "runtime.h"

namespace hoppersim {

namespace {

thread_local cudaError_t last_error = cudaSuccess;

constexpr int kL2Bytes = 50 * 1024 * 1024;
constexpr int kMaxThreadsPerBlockAxis[3] = {1024, 1024, 64};
constexpr int kClockRate = 1'980'000, kMemoryClockRate = 3'201'000;  // kHz
constexpr int kMemoryBusWidth = 6144;
constexpr int kMaxGrid[3] = {2147483647, 65535, 65535};

const std::unordered_map<int, int>& attributes() {
  static const std::unordered_map<int, int> table{
      {cudaDevAttrMaxThreadsPerBlock, kMaxThreadsPerBlock},
      {cudaDevAttrMaxBlockDimX, kMaxThreadsPerBlockAxis[0]},
      {cudaDevAttrMaxBlockDimY, kMaxThreadsPerBlockAxis[1]},
      {cudaDevAttrMaxBlockDimZ, kMaxThreadsPerBlockAxis[2]},
      {cudaDevAttrMaxGridDimX, kMaxGrid[0]},
      {cudaDevAttrMaxGridDimY, kMaxGrid[1]},
      {cudaDevAttrMaxGridDimZ, kMaxGrid[2]},
      {cudaDevAttrMaxSharedMemoryPerBlock, kSharedWithoutOptIn},
      {cudaDevAttrMaxSharedMemoryPerBlockOptin, kSharedLimit},
      {cudaDevAttrMaxSharedMemoryPerMultiprocessor, kSharedPerMultiprocessor},
      {cudaDevAttrReservedSharedMemoryPerBlock, kSharedReservedPerBlock},
      {cudaDevAttrTotalConstantMemory, 64 * 1024},
      {cudaDevAttrWarpSize, kLanes},
      {cudaDevAttrMaxRegistersPerBlock, kRegistersPerMultiprocessor},
      {cudaDevAttrMaxRegistersPerMultiprocessor, kRegistersPerMultiprocessor},
      {cudaDevAttrMultiProcessorCount, kMultiprocessors},
      {cudaDevAttrMaxThreadsPerMultiProcessor, kThreadsPerMultiprocessor},
      {cudaDevAttrMaxBlocksPerMultiprocessor, kBlocksPerMultiprocessor},
      {cudaDevAttrL2CacheSize, kL2Bytes},
      {cudaDevAttrComputeCapabilityMajor, 9},
      {cudaDevAttrComputeCapabilityMinor, 0},
      {cudaDevAttrConcurrentKernels, 1},
      {cudaDevAttrUnifiedAddressing, 1},
      {cudaDevAttrMaxPitch, 2147483647},
      {cudaDevAttrTextureAlignment, 512},
      {cudaDevAttrTexturePitchAlignment, 32},
      {cudaDevAttrSurfaceAlignment, 512},
      {cudaDevAttrGpuOverlap, 1},
      {cudaDevAttrAsyncEngineCount, 3},
      {cudaDevAttrKernelExecTimeout, 0},
      {cudaDevAttrIntegrated, 0},
      {cudaDevAttrCanMapHostMemory, 1},
      {cudaDevAttrComputeMode, 0},
      {cudaDevAttrEccEnabled, 1},
      {cudaDevAttrTccDriver, 0},
      {cudaDevAttrPciBusId, 0},
      {cudaDevAttrPciDeviceId, 0},
      {cudaDevAttrPciDomainId, 0},
      {cudaDevAttrClockRate, kClockRate},
      {cudaDevAttrMemoryClockRate, kMemoryClockRate},
      {cudaDevAttrGlobalMemoryBusWidth, kMemoryBusWidth},
      {cudaDevAttrGlobalL1CacheSupported, 1},
      {cudaDevAttrLocalL1CacheSupported, 1},
      {cudaDevAttrIsMultiGpuBoard, 0},
      {cudaDevAttrHostNativeAtomicSupported, 0},
      {cudaDevAttrSingleToDoublePrecisionPerfRatio, 2},
      {cudaDevAttrPageableMemoryAccess, 0},  // kernels are held to what was allocated or registered
      {cudaDevAttrConcurrentManagedAccess, 1},
      {cudaDevAttrComputePreemptionSupported, 1},
      {cudaDevAttrCanUseHostPointerForRegisteredMem, 1},
      {cudaDevAttrHostRegisterSupported, 1},
      {cudaDevAttrMemoryPoolsSupported, 1},  // of cudaMallocAsync; the pools themselves are not modelled
      {cudaDevAttrClusterLaunch, 1},
      {cudaDevAttrManagedMemory, 1},
      {cudaDevAttrStreamPrioritiesSupported, 1},
      {cudaDevAttrCooperativeLaunch, 1},
  };
  return table;
}

struct ErrorName {
  cudaError_t error;
  const char *name, *text;
};
constexpr ErrorName kErrors[] = {
    {cudaSuccess, "cudaSuccess", "no error"},
    {cudaErrorInvalidValue, "cudaErrorInvalidValue", "invalid argument"},
    {cudaErrorMemoryAllocation, "cudaErrorMemoryAllocation", "out of memory"},
    {cudaErrorInvalidConfiguration, "cudaErrorInvalidConfiguration", "invalid configuration argument"},
    {cudaErrorInvalidPitchValue, "cudaErrorInvalidPitchValue", "invalid pitch argument"},
    {cudaErrorInvalidSymbol, "cudaErrorInvalidSymbol", "invalid device symbol"},
    {cudaErrorMissingConfiguration, "cudaErrorMissingConfiguration", "missing launch configuration"},
    {cudaErrorInvalidDeviceFunction, "cudaErrorInvalidDeviceFunction", "invalid device function"},
    {cudaErrorInvalidDevice, "cudaErrorInvalidDevice", "invalid device ordinal"},
    {cudaErrorInvalidKernelImage, "cudaErrorInvalidKernelImage", "device kernel image is invalid"},
    {cudaErrorSymbolNotFound, "cudaErrorSymbolNotFound", "named symbol not found"},
    {cudaErrorLaunchOutOfResources, "cudaErrorLaunchOutOfResources", "too many resources requested for launch"},
    {cudaErrorHostMemoryAlreadyRegistered, "cudaErrorHostMemoryAlreadyRegistered",
     "part or all of the requested memory range is already mapped"},
    {cudaErrorHostMemoryNotRegistered, "cudaErrorHostMemoryNotRegistered",
     "pointer does not correspond to a registered memory region"},
    {cudaErrorLaunchFailure, "cudaErrorLaunchFailure", "unspecified launch failure"},
    {cudaErrorCooperativeLaunchTooLarge, "cudaErrorCooperativeLaunchTooLarge", "too many blocks in cooperative launch"},
    {cudaErrorNotSupported, "cudaErrorNotSupported", "operation not supported by the simulated runtime"},
    {cudaErrorInvalidClusterSize, "cudaErrorInvalidClusterSize", "invalid cluster size"},
};
const ErrorName* find_error(cudaError_t error) {
  for (const ErrorName& e : kErrors)
    if (e.error == error) return &e;
  return nullptr;
}

struct StreamFacts {
  unsigned flags = 0;
  int priority = 0;
};
constexpr int kLowestPriority = 0, kHighestPriority = -5;
// Of the legacy and the per-thread default stream too, whose handles are small numbers.
StreamFacts facts_of(cudaStream_t stream) {
  const auto* facts = reinterpret_cast<const StreamFacts*>(stream);
  return stream == nullptr || stream == cudaStreamLegacy || stream == cudaStreamPerThread ? StreamFacts{} : *facts;
}

// Handles of events only need to be distinct and not null.
template <class Handle>
cudaError_t new_handle(Handle* handle) {
  *handle = reinterpret_cast<Handle>(new char);
  return cudaSuccess;
}
template <class Handle>
cudaError_t delete_handle(Handle handle) {
  delete reinterpret_cast<char*>(handle);
  return cudaSuccess;
}

cudaError_t entry_point(const char* name, void** function, cudaDriverEntryPointQueryResult* status) {
  *function = driver_entry(name);
  if (status) *status = *function ? cudaDriverEntryPointSuccess : cudaDriverEntryPointSymbolNotFound;
  return *function || status ? cudaSuccess : set_last_error(cudaErrorSymbolNotFound);
}

}  // namespace

Runtime& runtime() {
  static auto* r = [] {  // never destroyed: libraries may launch from exit handlers
    auto* made = new Runtime;
    read_environment(made->options, made->report_path);
    return made;
  }();
  return *r;
}

void keep_fault(const Fault& fault) {
  if (!fault.report.raised) tell(fault.report);  // of no launch
  Runtime& r = runtime();
  std::lock_guard<std::mutex> lock(r.mutex);
  Report kept = fault.report;
  if (r.fault) {
    if (r.fault->report.kind != kUnsupportedCall || kept.kind == kUnsupportedCall) return;
    kept.text += std::string("\nbefore it: ") + r.fault->what();
  }
  r.fault.emplace(std::move(kept)).collected = fault.collected;
  r.fault_text = std::string("hoppersim: ") + r.fault->what();
}

int unsupported_driver_call(const char* what) {
  keep_fault(Fault(kUnsupportedCall, std::string(what) + " is not modelled by the simulator"));
  return cudaErrorNotSupported;
}

int unsupported_runtime_call(const char* what) {
  return set_last_error(static_cast<cudaError_t>(unsupported_driver_call(what)));
}

void keep_reports(Reports& from, Fault* fault) {
  Runtime& r = runtime();
  for (const Report& report : from.list) {
    tell(report);
    r.reports.add(report);
  }
  if (fault == nullptr) return;
  fault->report.raised = true;
  tell(fault->report);
  r.reports.add(fault->report);
  if (r.options.go_on) fault->collected = r.reports.errors();
}

cudaError_t set_last_error(cudaError_t error) {
  if (error != cudaSuccess) last_error = error;
  return error;
}

}  // namespace hoppersim

using namespace hoppersim;

extern "C" {

cudaError_t cudaGetLastError() { return std::exchange(last_error, cudaSuccess); }
cudaError_t cudaPeekAtLastError() { return last_error; }

const char* cudaGetErrorName(cudaError_t error) {
  const ErrorName* e = find_error(error);
  return e ? e->name : "unrecognized error code";
}

// A launch failure is told with the fault that the simulator found, an unsupported call with its name.
const char* cudaGetErrorString(cudaError_t error) {
  Runtime& r = runtime();
  if (r.fault && error == (r.fault->report.kind == kUnsupportedCall ? cudaErrorNotSupported : cudaErrorLaunchFailure))
    return r.fault_text.c_str();
  const ErrorName* e = find_error(error);
  return e ? e->text : "unrecognized error code";
}

cudaError_t cudaGetDeviceCount(int* count) { return *count = 1, cudaSuccess; }
cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
cudaError_t cudaSetDevice(int device) { return device == 0 ? cudaSuccess : set_last_error(cudaErrorInvalidDevice); }
cudaError_t cudaDeviceSynchronize() { return cudaSuccess; }
cudaError_t cudaGetDeviceFlags(unsigned* flags) { return *flags = cudaDeviceMapHost, cudaSuccess; }
cudaError_t cudaChooseDevice(int* device, const cudaDeviceProp*) { return *device = 0, cudaSuccess; }
cudaError_t cudaRuntimeGetVersion(int* version) { return *version = CUDART_VERSION, cudaSuccess; }
cudaError_t cudaDriverGetVersion(int* version) { return *version = kDriverVersion, cudaSuccess; }

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device) {
  if (device != 0) return set_last_error(cudaErrorInvalidDevice);
  const auto found = attributes().find(attribute);
  if (found == attributes().end()) return unsupported_call("cudaDeviceGetAttribute of attribute", attribute);
  *value = found->second;
  return cudaSuccess;
}

cudaError_t cudaGetDeviceProperties(cudaDeviceProp* p, int device) {
  if (device != 0) return set_last_error(cudaErrorInvalidDevice);
  *p = cudaDeviceProp{};
  std::snprintf(p->name, sizeof p->name, "hoppersim H200");
  p->totalGlobalMem = kMemoryBytes;
  p->sharedMemPerBlock = kSharedWithoutOptIn;
  p->sharedMemPerBlockOptin = kSharedLimit;
  p->sharedMemPerMultiprocessor = kSharedPerMultiprocessor;
  p->reservedSharedMemPerBlock = kSharedReservedPerBlock;
  p->regsPerBlock = p->regsPerMultiprocessor = kRegistersPerMultiprocessor;
  p->warpSize = kLanes;
  p->maxThreadsPerBlock = kMaxThreadsPerBlock;
  std::copy_n(kMaxThreadsPerBlockAxis, 3, p->maxThreadsDim);
  std::copy_n(kMaxGrid, 3, p->maxGridSize);
  p->totalConstMem = 64 * 1024;
  p->major = 9, p->minor = 0;
  p->multiProcessorCount = kMultiprocessors;
  p->maxThreadsPerMultiProcessor = kThreadsPerMultiprocessor;
  p->maxBlocksPerMultiProcessor = kBlocksPerMultiprocessor;
  p->l2CacheSize = kL2Bytes;
  p->memoryBusWidth = kMemoryBusWidth;
  p->concurrentKernels = p->unifiedAddressing = p->managedMemory = p->streamPrioritiesSupported = 1;
  p->clusterLaunch = p->cooperativeLaunch = 1;
  return cudaSuccess;
}

cudaError_t cudaStreamCreateWithPriority(cudaStream_t* stream, unsigned flags, int priority) {
  priority = std::clamp(priority, kHighestPriority, kLowestPriority);
  *stream = reinterpret_cast<cudaStream_t>(new StreamFacts{flags, priority});
  return cudaSuccess;
}
cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned flags) {
  return cudaStreamCreateWithPriority(stream, flags, kLowestPriority);
}
cudaError_t cudaStreamCreate(cudaStream_t* stream) { return cudaStreamCreateWithFlags(stream, cudaStreamDefault); }
cudaError_t cudaStreamDestroy(cudaStream_t stream) {
  delete reinterpret_cast<StreamFacts*>(stream);
  return cudaSuccess;
}
cudaError_t cudaStreamGetFlags(cudaStream_t stream, unsigned* flags) {
  return *flags = facts_of(stream).flags, cudaSuccess;
}
cudaError_t cudaStreamGetPriority(cudaStream_t stream, int* priority) {
  return *priority = facts_of(stream).priority, cudaSuccess;
}
cudaError_t cudaStreamGetId(cudaStream_t stream, unsigned long long* id) {
  return *id = reinterpret_cast<uint64_t>(stream), cudaSuccess;
}
cudaError_t cudaStreamGetDevice(cudaStream_t, int* device) { return *device = 0, cudaSuccess; }
cudaError_t cudaDeviceGetStreamPriorityRange(int* least, int* greatest) {
  if (least) *least = kLowestPriority;
  if (greatest) *greatest = kHighestPriority;
  return cudaSuccess;
}
// All before it has run.
cudaError_t cudaLaunchHostFunc(cudaStream_t, cudaHostFn_t function, void* data) { return function(data), cudaSuccess; }
cudaError_t cudaStreamAddCallback(cudaStream_t stream, cudaStreamCallback_t function, void* data, unsigned) {
  return function(stream, cudaSuccess, data), cudaSuccess;
}
cudaError_t cudaStreamSynchronize(cudaStream_t) { return cudaSuccess; }
cudaError_t cudaStreamQuery(cudaStream_t) { return cudaSuccess; }
cudaError_t cudaStreamWaitEvent(cudaStream_t, cudaEvent_t, unsigned) { return cudaSuccess; }
cudaError_t cudaStreamIsCapturing(cudaStream_t, cudaStreamCaptureStatus* status) {
  return *status = cudaStreamCaptureStatusNone, cudaSuccess;
}

cudaError_t cudaEventCreate(cudaEvent_t* event) { return new_handle(event); }
cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned) { return new_handle(event); }
cudaError_t cudaEventDestroy(cudaEvent_t event) { return delete_handle(event); }
cudaError_t cudaEventRecord(cudaEvent_t, cudaStream_t) { return cudaSuccess; }
cudaError_t cudaEventRecordWithFlags(cudaEvent_t, cudaStream_t, unsigned) { return cudaSuccess; }
cudaError_t cudaEventSynchronize(cudaEvent_t) { return cudaSuccess; }
cudaError_t cudaEventQuery(cudaEvent_t) { return cudaSuccess; }

cudaError_t cudaGetDriverEntryPoint(const char* name, void** function, unsigned long long,
                                    cudaDriverEntryPointQueryResult* status) {
  return entry_point(name, function, status);
}
cudaError_t cudaGetDriverEntryPointByVersion(const char* name, void** function, unsigned, unsigned long long,
                                             cudaDriverEntryPointQueryResult* status) {
  return entry_point(name, function, status);
}

}  // extern "C"
