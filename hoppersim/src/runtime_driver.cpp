// The CUDA driver: what host code is linked to or asks the runtime for. Contexts are handles; the error numbers are
// those of the runtime wherever both have one.
#include <cuda.h>
#include <dlfcn.h>

#include <cctype>
#include <cstring>
#include <map>

#include "runtime.h"
#include "tensor_map.h"

namespace hoppersim {

namespace {

thread_local CUcontext current_context = nullptr;
CUcontext primary_context() {
  static char context;
  return reinterpret_cast<CUcontext>(&context);
}

// Calls a function of the runtime, whose last error is not the driver's business.
template <class Call>
CUresult through_runtime(Call call) {
  const cudaError_t before = cudaGetLastError();
  const cudaError_t error = call();
  cudaGetLastError();
  set_last_error(before);
  switch (error) {
    case cudaErrorInvalidConfiguration: return CUDA_ERROR_INVALID_VALUE;
    case cudaErrorInvalidDeviceFunction: return CUDA_ERROR_INVALID_HANDLE;
    default: return static_cast<CUresult>(error);
  }
}

CUresult encoded(const char* function, int code) {
  if (code == CUDA_ERROR_NOT_SUPPORTED)
    unsupported_driver_call((std::string(function) + " (" + tensor_map_error() + ")").c_str());
  return static_cast<CUresult>(code);
}

// A module that the program loads itself, and the kernels it has asked for.
struct DriverModule {
  explicit DriverModule(const void* image) : loaded(image) {}
  LoadedModule loaded;
  std::map<std::string, Kernel> kernels;
};

// Calls `use` for a module or a kernel of one.
template <class Use>
CUresult with_module(Use use) {
  try {
    return use();
  } catch (const Fault& fault) {
    if (fault.report.kind == "unknown kernel") return CUDA_ERROR_NOT_FOUND;
    keep_fault(fault);
    return CUDA_ERROR_INVALID_IMAGE;
  }
}

Kernel* kernel_of(CUfunction function) { return reinterpret_cast<Kernel*>(function); }

// The arguments as one buffer of bytes, as `extra` gives them; null without.
const uint8_t* argument_buffer(void** extra, size_t* size) {
  const uint8_t* buffer = nullptr;
  for (; extra && *extra != CU_LAUNCH_PARAM_END; extra += 2) {
    if (*extra == CU_LAUNCH_PARAM_BUFFER_POINTER) buffer = static_cast<const uint8_t*>(extra[1]);
    if (*extra == CU_LAUNCH_PARAM_BUFFER_SIZE) *size = *static_cast<const size_t*>(extra[1]);
  }
  return buffer;
}

CUresult launch_function(CUfunction function, const LaunchShape& shape, void** arguments, void** extra) {
  if (function == nullptr) return CUDA_ERROR_INVALID_HANDLE;
  Kernel& kernel = *kernel_of(function);
  std::vector<void*> pointers;
  size_t size = 0;
  if (const uint8_t* buffer = argument_buffer(extra, &size)) {
    for (const Parameter& p : kernel.function().parameters) {
      if (p.offset + p.size > size) return CUDA_ERROR_INVALID_VALUE;
      pointers.push_back(const_cast<uint8_t*>(buffer) + p.offset);
    }
    arguments = pointers.data();
  }
  return through_runtime([&] { return launch_kernel(kernel, shape, arguments); });
}

const char* error_text(CUresult error) {
  if (error == CUDA_ERROR_INVALID_VALUE || error == CUDA_ERROR_NOT_SUPPORTED) {
    const char* text = tensor_map_error();
    if (*text) return text;
  }
  return cudaGetErrorString(static_cast<cudaError_t>(error));
}

}  // namespace

// The newest of the versions that a function has, as for a program of this driver's CUDA.
void* driver_entry(const char* name) {
  if (std::strncmp(name, "cu", 2) != 0 || !std::isupper(static_cast<unsigned char>(name[2]))) return nullptr;
  static void* self = [] {
    Dl_info info;
    return dladdr(reinterpret_cast<void*>(&driver_entry), &info) ? dlopen(info.dli_fname, RTLD_LAZY | RTLD_NOLOAD)
                                                                 : nullptr;
  }();
  for (const char* version : {"_v4", "_v3", "_v2", ""})
    if (void* found = self ? dlsym(self, (std::string(name) + version).c_str()) : nullptr) return found;
  return nullptr;
}

}  // namespace hoppersim

using namespace hoppersim;

extern "C" {

CUresult cuInit(unsigned) { return CUDA_SUCCESS; }
CUresult cuDriverGetVersion(int* version) { return *version = kDriverVersion, CUDA_SUCCESS; }

CUresult cuGetErrorName(CUresult error, const char** text) {
  *text = cudaGetErrorName(static_cast<cudaError_t>(error));
  return CUDA_SUCCESS;
}
CUresult cuGetErrorString(CUresult error, const char** text) { return *text = error_text(error), CUDA_SUCCESS; }

CUresult cuGetProcAddress_v2(const char* name, void** function, int, cuuint64_t,
                             CUdriverProcAddressQueryResult* status) {
  *function = driver_entry(name);
  if (status) *status = *function ? CU_GET_PROC_ADDRESS_SUCCESS : CU_GET_PROC_ADDRESS_SYMBOL_NOT_FOUND;
  return *function ? CUDA_SUCCESS : CUDA_ERROR_NOT_FOUND;
}

// ---- The device and its context

CUresult cuDeviceGetCount(int* count) {
  return through_runtime([&] { return cudaGetDeviceCount(count); });
}
CUresult cuDeviceGet(CUdevice* device, int ordinal) {
  if (ordinal != 0) return CUDA_ERROR_INVALID_DEVICE;
  return *device = 0, CUDA_SUCCESS;
}
static CUresult properties(cudaDeviceProp* p, CUdevice device) {
  return through_runtime([&] { return cudaGetDeviceProperties(p, device); });
}
CUresult cuDeviceGetName(char* name, int length, CUdevice device) {
  cudaDeviceProp p;
  if (const CUresult error = properties(&p, device)) return error;
  std::snprintf(name, static_cast<size_t>(length), "%s", p.name);
  return CUDA_SUCCESS;
}
CUresult cuDeviceTotalMem_v2(size_t* bytes, CUdevice device) {
  cudaDeviceProp p;
  if (const CUresult error = properties(&p, device)) return error;
  return *bytes = p.totalGlobalMem, CUDA_SUCCESS;
}
CUresult cuDeviceGetAttribute(int* value, CUdevice_attribute attribute, CUdevice device) {
  return through_runtime([&] { return cudaDeviceGetAttribute(value, static_cast<cudaDeviceAttr>(attribute), device); });
}
CUresult cuDevicePrimaryCtxRetain(CUcontext* context, CUdevice) { return *context = primary_context(), CUDA_SUCCESS; }
CUresult cuDevicePrimaryCtxRelease_v2(CUdevice) { return CUDA_SUCCESS; }
CUresult cuCtxCreate_v2(CUcontext* context, unsigned, CUdevice) {
  return *context = current_context = primary_context(), CUDA_SUCCESS;
}
CUresult cuCtxCreate_v3(CUcontext* context, CUexecAffinityParam*, int, unsigned, CUdevice) {
  return cuCtxCreate_v2(context, 0, 0);
}
CUresult cuCtxCreate_v4(CUcontext* context, CUctxCreateParams*, unsigned, CUdevice) {
  return cuCtxCreate_v2(context, 0, 0);
}
CUresult cuCtxDestroy_v2(CUcontext) { return CUDA_SUCCESS; }
// The runtime makes the primary context current at its first call, which this may follow.
CUresult cuCtxGetCurrent(CUcontext* context) {
  if (current_context == nullptr) current_context = primary_context();
  return *context = current_context, CUDA_SUCCESS;
}
CUresult cuCtxSetCurrent(CUcontext context) { return current_context = context, CUDA_SUCCESS; }
CUresult cuCtxPushCurrent_v2(CUcontext context) { return current_context = context, CUDA_SUCCESS; }
CUresult cuCtxPopCurrent_v2(CUcontext* context) { return context ? cuCtxGetCurrent(context) : CUDA_SUCCESS; }
CUresult cuCtxGetDevice(CUdevice* device) { return *device = 0, CUDA_SUCCESS; }
CUresult cuCtxSynchronize() { return CUDA_SUCCESS; }

// ---- Modules and launches

CUresult cuModuleLoadData(CUmodule* module, const void* image) {
  return with_module([&] {
    auto loaded = std::make_unique<DriverModule>(image);
    loaded->loaded.parsed();
    *module = reinterpret_cast<CUmodule>(loaded.release());
    return CUDA_SUCCESS;
  });
}
CUresult cuModuleLoadDataEx(CUmodule* module, const void* image, unsigned, CUjit_option*, void**) {
  return cuModuleLoadData(module, image);
}
CUresult cuModuleLoadFatBinary(CUmodule* module, const void* image) { return cuModuleLoadData(module, image); }
CUresult cuModuleUnload(CUmodule module) {
  delete reinterpret_cast<DriverModule*>(module);
  return CUDA_SUCCESS;
}
CUresult cuModuleGetFunction(CUfunction* function, CUmodule handle, const char* name) {
  auto* module = reinterpret_cast<DriverModule*>(handle);
  return with_module([&] {
    module->loaded.function(name);  // it exists
    Kernel& kernel = module->kernels[name];
    kernel.module = &module->loaded, kernel.name = name;
    *function = reinterpret_cast<CUfunction>(&kernel);
    return CUDA_SUCCESS;
  });
}
CUresult cuModuleGetGlobal_v2(CUdeviceptr* address, size_t* bytes, CUmodule module, const char* name) {
  return with_module([&] {
    const VariableBytes* found = reinterpret_cast<DriverModule*>(module)->loaded.global(name);
    if (found == nullptr) return CUDA_ERROR_NOT_FOUND;
    if (address) *address = reinterpret_cast<CUdeviceptr>(found->data());
    if (bytes) *bytes = found->size();
    return CUDA_SUCCESS;
  });
}

CUresult cuFuncSetAttribute(CUfunction function, CUfunction_attribute attribute, int value) {
  return with_module([&] {
    return through_runtime(
        [&] { return set_attribute(*kernel_of(function), static_cast<cudaFuncAttribute>(attribute), value); });
  });
}
CUresult cuFuncSetCacheConfig(CUfunction, CUfunc_cache) { return CUDA_SUCCESS; }

CUresult cuLaunchKernel(CUfunction function, unsigned grid_x, unsigned grid_y, unsigned grid_z, unsigned block_x,
                        unsigned block_y, unsigned block_z, unsigned shared, CUstream, void** arguments, void** extra) {
  const LaunchShape shape{{grid_x, grid_y, grid_z}, {block_x, block_y, block_z}, std::nullopt, shared};
  return launch_function(function, shape, arguments, extra);
}
CUresult cuLaunchCooperativeKernel(CUfunction function, unsigned grid_x, unsigned grid_y, unsigned grid_z,
                                   unsigned block_x, unsigned block_y, unsigned block_z, unsigned shared, CUstream,
                                   void** arguments) {
  const LaunchShape shape{{grid_x, grid_y, grid_z}, {block_x, block_y, block_z}, std::nullopt, shared, true};
  return launch_function(function, shape, arguments, nullptr);
}
CUresult cuLaunchKernelEx(const CUlaunchConfig* c, CUfunction function, void** arguments, void** extra) {
  LaunchShape shape{{c->gridDimX, c->gridDimY, c->gridDimZ},
                    {c->blockDimX, c->blockDimY, c->blockDimZ},
                    std::nullopt,
                    c->sharedMemBytes};
  static_assert(sizeof(CUlaunchAttribute) == sizeof(cudaLaunchAttribute));
  const auto* attributes = reinterpret_cast<const cudaLaunchAttribute*>(c->attrs);
  if (const CUresult error = through_runtime([&] { return apply_attributes(attributes, c->numAttrs, &shape); }))
    return error;
  return launch_function(function, shape, arguments, extra);
}

// ---- Memory

static void* pointer_of(CUdeviceptr address) { return reinterpret_cast<void*>(address); }
static CUresult copy(void* to, const void* from, size_t bytes) {
  return through_runtime([&] { return cudaMemcpy(to, from, bytes, cudaMemcpyDefault); });
}

CUresult cuMemAlloc_v2(CUdeviceptr* address, size_t bytes) {
  return through_runtime([&] { return cudaMalloc(reinterpret_cast<void**>(address), bytes); });
}
CUresult cuMemFree_v2(CUdeviceptr address) {
  return through_runtime([&] { return cudaFree(pointer_of(address)); });
}
CUresult cuMemcpy(CUdeviceptr to, CUdeviceptr from, size_t bytes) {
  return copy(pointer_of(to), pointer_of(from), bytes);
}
CUresult cuMemcpyHtoD_v2(CUdeviceptr to, const void* from, size_t bytes) { return copy(pointer_of(to), from, bytes); }
CUresult cuMemcpyDtoH_v2(void* to, CUdeviceptr from, size_t bytes) { return copy(to, pointer_of(from), bytes); }
CUresult cuMemcpyDtoD_v2(CUdeviceptr to, CUdeviceptr from, size_t bytes) { return cuMemcpy(to, from, bytes); }
CUresult cuMemcpyHtoDAsync_v2(CUdeviceptr to, const void* from, size_t bytes, CUstream) {
  return copy(pointer_of(to), from, bytes);
}
CUresult cuMemcpyDtoHAsync_v2(void* to, CUdeviceptr from, size_t bytes, CUstream) {
  return copy(to, pointer_of(from), bytes);
}
CUresult cuMemcpyDtoDAsync_v2(CUdeviceptr to, CUdeviceptr from, size_t bytes, CUstream) {
  return cuMemcpy(to, from, bytes);
}
CUresult cuMemsetD8_v2(CUdeviceptr to, unsigned char value, size_t bytes) {
  return through_runtime([&] { return cudaMemset(pointer_of(to), value, bytes); });
}
CUresult cuMemsetD8Async(CUdeviceptr to, unsigned char value, size_t bytes, CUstream) {
  return cuMemsetD8_v2(to, value, bytes);
}
CUresult cuStreamCreate(CUstream* stream, unsigned) {
  return through_runtime([&] { return cudaStreamCreate(stream); });
}
CUresult cuStreamDestroy_v2(CUstream stream) {
  return through_runtime([&] { return cudaStreamDestroy(stream); });
}
CUresult cuStreamSynchronize(CUstream) { return CUDA_SUCCESS; }

// ---- Tensor maps

CUresult cuTensorMapEncodeTiled(CUtensorMap* map, CUtensorMapDataType type, cuuint32_t rank, void* address,
                                const cuuint64_t* extent, const cuuint64_t* stride, const cuuint32_t* box,
                                const cuuint32_t* element_stride, CUtensorMapInterleave interleave,
                                CUtensorMapSwizzle swizzle, CUtensorMapL2promotion promotion,
                                CUtensorMapFloatOOBfill fill) {
  return encoded("cuTensorMapEncodeTiled", encode_tensor_map(map, type, rank, address, extent, stride, box,
                                                             element_stride, interleave, swizzle, promotion, fill));
}

CUresult cuTensorMapEncodeIm2col(CUtensorMap* map, CUtensorMapDataType type, cuuint32_t rank, void* address,
                                 const cuuint64_t* extent, const cuuint64_t* stride, const int* lower, const int* upper,
                                 cuuint32_t channels, cuuint32_t pixels, const cuuint32_t* element_stride,
                                 CUtensorMapInterleave interleave, CUtensorMapSwizzle swizzle,
                                 CUtensorMapL2promotion promotion, CUtensorMapFloatOOBfill fill) {
  return encoded("cuTensorMapEncodeIm2col",
                 encode_im2col_map(map, type, rank, address, extent, stride, lower, upper, channels, pixels,
                                   element_stride, interleave, swizzle, promotion, fill));
}

}  // extern "C"
