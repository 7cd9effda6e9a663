// The module `_hoppersim`: options, records of launches, faults, ranges, and launches of PTX text.
// hoppersim/__init__.py wraps it.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "runtime.h"

namespace py = pybind11;
using namespace hoppersim;

namespace {

using Triple = std::array<uint32_t, 3>;

Dim3 dim3_of(const Triple& t) { return {t[0], t[1], t[2]}; }
Triple triple_of(const Dim3& d) { return {d.x, d.y, d.z}; }

py::dict dict_of(const Counters& c) {
  py::dict d;
  d["instructions"] = c.instructions;
  for (const auto& [name, value] : c.numbers()) d[name] = value;
  return d;
}

py::dict dict_of(const LaunchRecord& r) {
  py::dict d;
  d["kernel"] = r.kernel, d["mangled"] = r.mangled, d["occupancy"] = r.occupancy;
  d["grid"] = triple_of(r.grid), d["block"] = triple_of(r.block), d["cluster"] = triple_of(r.cluster);
  d["static_shared"] = r.static_shared, d["dynamic_shared"] = r.dynamic_shared;
  d["counters"] = dict_of(r.counters);
  return d;
}

py::list launches() {
  Runtime& r = runtime();
  std::lock_guard<std::mutex> lock(r.mutex);
  py::list result;
  for (const LaunchRecord& record : r.launches) result.append(dict_of(record));
  return result;
}

py::dict get_options() {
  const Options& o = runtime().options;
  py::dict d;
  d["timing"] = o.timing == Timing::late ? "late" : "early";
  d["seed"] = o.seed, d["host_threads"] = o.host_threads;
  d["max_instructions"] = o.max_instructions, d["check_global"] = o.check_global;
  return d;
}

void set_options(const std::string& timing, uint64_t seed, int host_threads, uint64_t max_instructions,
                 bool check_global) {
  if (timing != "early" && timing != "late")
    throw py::value_error("timing must be \"early\" or \"late\", got \"" + timing + "\"");
  Runtime& r = runtime();
  std::lock_guard<std::mutex> lock(r.mutex);
  r.options.timing = timing == "late" ? Timing::late : Timing::early;
  r.options.seed = seed, r.options.host_threads = host_threads;
  r.options.max_instructions = max_instructions, r.options.check_global = check_global;
}

// Raises the kept fault, if there is one.
void raise_fault() {
  Runtime& r = runtime();
  std::optional<Fault> fault;
  {
    std::lock_guard<std::mutex> lock(r.mutex);
    fault.swap(r.fault);
  }
  if (fault) throw *fault;
}

// One kernel of a parsed PTX text, launched without host code.
struct TextModule {
  explicit TextModule(const std::string& text) : loaded(text) { loaded.parsed(); }

  std::vector<std::string> kernels() {
    std::vector<std::string> names;
    for (const auto& [name, function] : loaded.parsed().functions) names.push_back(name);
    return names;
  }

  std::vector<std::tuple<std::string, uint32_t, uint32_t>> parameters(const std::string& name) {
    std::vector<std::tuple<std::string, uint32_t, uint32_t>> result;
    for (const Parameter& p : loaded.function(name).parameters) result.emplace_back(p.name, p.offset, p.size);
    return result;
  }

  void launch(const std::string& name, const Triple& grid, const Triple& block, const py::bytes& parameters,
              const Triple& cluster, uint32_t shared) {
    Kernel kernel;
    kernel.module = &loaded, kernel.name = name;
    kernel.largest_dynamic_shared = kSharedLimit - static_cast<int>(kernel.function().static_shared);
    kernel.non_portable_cluster = true;
    LaunchShape shape{dim3_of(grid), dim3_of(block), std::nullopt, shared};
    if (cluster != Triple{1, 1, 1}) shape.cluster = dim3_of(cluster);
    const std::string bytes = parameters;
    if (bytes.size() != kernel.function().parameter_bytes)
      throw py::value_error("parameter bytes of " + name + " do not match");
    Dim3 checked_cluster;
    if (const cudaError_t refused = check_launch(kernel, shape, &checked_cluster))
      throw Fault("launch refused", name + ": " + cudaGetErrorName(refused));
    py::gil_scoped_release release;
    run_kernel(kernel, shape, checked_cluster, {bytes.begin(), bytes.end()});
  }

  py::bytes global_bytes(const std::string& name) {
    const std::vector<uint8_t>* bytes = loaded.global(name);
    if (bytes == nullptr) throw py::key_error(name);
    return {reinterpret_cast<const char*>(bytes->data()), bytes->size()};
  }

  LoadedModule loaded;
};

PyObject* fault_type = nullptr;

void translate_fault(std::exception_ptr pointer) {
  try {
    if (pointer) std::rethrow_exception(pointer);
  } catch (const Fault& fault) {
    py::object instance = py::reinterpret_borrow<py::object>(fault_type)(fault.what());
    instance.attr("kind") = fault.kind;
    instance.attr("kernel") = fault.at.kernel, instance.attr("source") = fault.at.source;
    instance.attr("instruction") = fault.at.instruction, instance.attr("ptx_line") = fault.at.ptx_line;
    PyErr_SetObject(fault_type, instance.ptr());
  }
}

}  // namespace

PYBIND11_MODULE(_hoppersim, m) {
  fault_type =
      PyErr_NewExceptionWithDoc("hoppersim.Fault",
                                "A finding that stopped a launch: `kind` is stable, the text says where, as do "
                                "`kernel`, `source` (file:line), `ptx_line` and `instruction`.",
                                PyExc_RuntimeError, nullptr);
  m.attr("Fault") = py::reinterpret_borrow<py::object>(fault_type);
  py::register_exception_translator(&translate_fault);

  m.def("options", &get_options);
  m.def("set_options", &set_options, py::arg("timing"), py::arg("seed"), py::arg("host_threads"),
        py::arg("max_instructions"), py::arg("check_global"));
  m.def("launches", &launches, "Records of the launches since clear_launches(), oldest first.");
  m.def("clear_launches", [] {
    std::lock_guard<std::mutex> lock(runtime().mutex);
    runtime().launches.clear();
  });
  m.def("raise_fault", &raise_fault,
        "Raises the fault that a launch through the CUDA runtime left, if any, and forgets it.");
  m.def(
      "add_range",
      [](uintptr_t begin, size_t size, bool writable) {
        if (global_ranges().contains(begin, size, writable)) return false;
        global_ranges().add(reinterpret_cast<const void*>(begin), size, writable);
        return true;
      },
      "Kernels may touch these bytes; false if they might already, and then there is nothing to remove.");
  m.def("remove_range", [](uintptr_t begin) { global_ranges().remove(reinterpret_cast<const void*>(begin)); });
  m.def("set_registers", [](const std::string& kernel, int registers) {
    for (Kernel* k : kernels_named(kernel)) k->registers = registers;
  });

  py::class_<TextModule>(m, "TextModule")
      .def(py::init<const std::string&>())
      .def("kernels", &TextModule::kernels)
      .def("parameters", &TextModule::parameters)
      .def("launch", &TextModule::launch)
      .def("global_bytes", &TextModule::global_bytes);
}
