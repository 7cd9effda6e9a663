// Fat binaries, kernels and variables as nvcc's host code registers them.
#include <algorithm>
#include <unordered_map>

#include "runtime.h"

namespace hoppersim {

namespace {

struct Variable {
  LoadedModule* module;
  std::string name;
};

struct ManagedVariable {
  Variable variable;
  void** host_pointer;  // through which host code reaches it
};

struct Registry {
  std::mutex mutex;
  std::unordered_map<const void*, std::unique_ptr<Kernel>> kernels;  // by host stub
  std::unordered_map<const void*, Variable> variables;               // by host shadow
  std::vector<ManagedVariable> managed;
};

// Never destroyed: libraries unregister from exit handlers that may run after this library's static destructors.
Registry& registry() {
  static auto* r = new Registry;
  return *r;
}

}  // namespace

LoadedModule::~LoadedModule() {
  if (!module) return;
  for (auto& [name, bytes] : module->globals) global_ranges().remove(bytes.data());
}

const Module& LoadedModule::parsed() {
  std::lock_guard<std::mutex> lock(mutex);
  if (module) return *module;
  if (image != nullptr) text = ptx_of_image(image);
  module = parse_ptx(text);
  for (auto& [name, bytes] : module->globals) global_ranges().add(bytes.data(), bytes.size());
  return *module;
}

const Function& LoadedModule::function(const std::string& name) {
  if (const auto changed = replaced.find(name); changed != replaced.end()) return *changed->second;
  const auto& functions = parsed().functions;
  const auto found = functions.find(name);
  if (found == functions.end()) throw Fault("unknown kernel", name);
  return *found->second;
}

void LoadedModule::replace(const std::string& name, const std::string& changed_text) {
  auto changed = parse_kernel(changed_text, name, parsed());
  if (changed->problem) throw Fault(*changed->problem);
  replaced[name] = std::move(changed);
}

void LoadedModule::restore(const std::string& name) { replaced.erase(name); }

VariableBytes* LoadedModule::global(const std::string& name) {
  parsed();
  const auto found = module->globals.find(name);
  return found == module->globals.end() ? nullptr : &found->second;
}

Kernel* find_kernel(const void* stub_or_handle) {
  Registry& r = registry();
  std::lock_guard<std::mutex> lock(r.mutex);
  const auto found = r.kernels.find(stub_or_handle);
  if (found != r.kernels.end()) return found->second.get();
  for (auto& [stub, kernel] : r.kernels)
    if (kernel.get() == stub_or_handle) return kernel.get();
  return nullptr;
}

std::vector<Kernel*> kernels_named(const std::string& name) {
  Registry& r = registry();
  std::lock_guard<std::mutex> lock(r.mutex);
  std::vector<Kernel*> result;
  for (auto& [stub, kernel] : r.kernels)
    if (kernel->name == name) result.push_back(kernel.get());
  return result;
}

VariableBytes* find_variable(const void* shadow) {
  Registry& r = registry();
  Variable variable{};
  {
    std::lock_guard<std::mutex> lock(r.mutex);
    const auto found = r.variables.find(shadow);
    if (found == r.variables.end()) return nullptr;
    variable = found->second;
  }
  return variable.module->global(variable.name);
}

}  // namespace hoppersim

using namespace hoppersim;

extern "C" {

void** __cudaRegisterFatBinary(void* wrapper) {
  tell_module();
  return reinterpret_cast<void**>(new LoadedModule(wrapper));
}

void __cudaRegisterFatBinaryEnd(void**) {}

void __cudaUnregisterFatBinary(void** handle) {
  auto* module = reinterpret_cast<LoadedModule*>(handle);
  Registry& r = registry();
  std::lock_guard<std::mutex> lock(r.mutex);
  for (auto i = r.kernels.begin(); i != r.kernels.end();)
    i = i->second->module == module ? r.kernels.erase(i) : std::next(i);
  for (auto i = r.variables.begin(); i != r.variables.end();)
    i = i->second.module == module ? r.variables.erase(i) : std::next(i);
  std::erase_if(r.managed, [&](const ManagedVariable& m) { return m.variable.module == module; });
  delete module;
}

void __cudaRegisterFunction(void** handle, const char* stub, char*, const char* name, int, uint3*, uint3*, dim3*, dim3*,
                            int*) {
  auto kernel = std::make_unique<Kernel>();
  kernel->module = reinterpret_cast<LoadedModule*>(handle);
  kernel->name = name;
  Registry& r = registry();
  std::lock_guard<std::mutex> lock(r.mutex);
  r.kernels[stub] = std::move(kernel);
}

void __cudaRegisterVar(void** handle, char* shadow, char*, const char* name, int, size_t, int, int) {
  Registry& r = registry();
  std::lock_guard<std::mutex> lock(r.mutex);
  r.variables[shadow] = {reinterpret_cast<LoadedModule*>(handle), name};
}

void __cudaRegisterManagedVar(void** handle, void** host_pointer, char* shadow, const char* name, int, size_t, int,
                              int) {
  Registry& r = registry();
  std::lock_guard<std::mutex> lock(r.mutex);
  r.variables[shadow] = {reinterpret_cast<LoadedModule*>(handle), name};
  r.managed.push_back({r.variables[shadow], host_pointer});
}

// Host code calls it before it touches a managed variable.
char __cudaInitModule(void** handle) {
  Registry& r = registry();
  std::lock_guard<std::mutex> lock(r.mutex);
  try {
    for (const ManagedVariable& m : r.managed) {
      if (m.variable.module != reinterpret_cast<LoadedModule*>(handle)) continue;
      if (VariableBytes* bytes = m.variable.module->global(m.variable.name)) *m.host_pointer = bytes->data();
    }
  } catch (const Fault& fault) {
    keep_fault(fault);
  }
  return 1;
}

// Handles of kernels, of the runtime and the driver, are all a Kernel*.
cudaError_t __cudaGetKernel(cudaKernel_t* handle, const void* stub) {
  Kernel* kernel = find_kernel(stub);
  if (kernel == nullptr) return set_last_error(cudaErrorInvalidDeviceFunction);
  *handle = reinterpret_cast<cudaKernel_t>(kernel);
  return cudaSuccess;
}
cudaError_t cudaGetKernel(cudaKernel_t* handle, const void* stub) { return __cudaGetKernel(handle, stub); }
cudaError_t cudaGetFuncBySymbol(cudaFunction_t* handle, const void* stub) {
  return __cudaGetKernel(reinterpret_cast<cudaKernel_t*>(handle), stub);
}

}  // extern "C"
