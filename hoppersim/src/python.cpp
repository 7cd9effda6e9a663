// The module `_hoppersim`: options, records of launches, faults, ranges, and launches of PTX text.
// hoppersim/__init__.py wraps it.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>

#include "report.h"
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

const char* name_of(Severity severity) { return severity == Severity::error ? "error" : "warning"; }

py::dict dict_of(const Report& r) {
  auto unless = [](bool missing, py::object value) { return missing ? py::object(py::none()) : value; };
  py::dict d;
  d["kind"] = r.kind, d["severity"] = name_of(r.severity);
  d["kernel"] = unless(r.kernel.empty(), py::str(r.kernel));
  d["mangled"] = unless(r.mangled.empty(), py::str(r.mangled));
  d["source"] = unless(r.source.empty(), py::str(r.source));
  d["line"] = unless(r.line == 0, py::int_(r.line));
  d["instruction"] = unless(r.instruction.empty(), py::str(r.instruction));
  d["cta"] = unless(r.cta.empty(), py::tuple(py::cast(r.cta)));
  d["warp"] = unless(r.warp < 0, py::int_(r.warp)), d["lane"] = unless(r.lane < 0, py::int_(r.lane));
  d["text"] = r.text, d["count"] = r.count;
  return d;
}

py::list list_of(const std::vector<Report>& reports) {
  py::list result;
  for (const Report& report : reports) result.append(dict_of(report));
  return result;
}

py::dict get_options() {
  const Options& o = runtime().options;
  py::dict d;
  d["timing"] = o.timing == Timing::late ? "late" : "early";
  d["seed"] = o.seed, d["host_threads"] = o.host_threads;
  d["max_instructions"] = o.max_instructions, d["check_global"] = o.check_global;
  d["allow"] = o.allow, d["warn_as_error"] = o.warn_as_error, d["strict"] = o.strict, d["go_on"] = o.go_on;
  return d;
}

void set_options(const std::string& timing, uint64_t seed, int host_threads, uint64_t max_instructions,
                 bool check_global, const std::vector<std::string>& allow,
                 const std::vector<std::string>& warn_as_error, bool strict, bool go_on) {
  if (timing != "early" && timing != "late")
    throw py::value_error("timing must be \"early\" or \"late\", got \"" + timing + "\"");
  Runtime& r = runtime();
  std::lock_guard<std::mutex> lock(r.mutex);
  r.options.timing = timing == "late" ? Timing::late : Timing::early;
  r.options.seed = seed, r.options.host_threads = host_threads;
  r.options.max_instructions = max_instructions, r.options.check_global = check_global;
  r.options.allow = allow, r.options.warn_as_error = warn_as_error;
  r.options.strict = strict, r.options.go_on = go_on;
}

// Raises the kept fault, if there is one.
void raise_fault() {
  Runtime& r = runtime();
  std::optional<Fault> fault;
  {
    std::lock_guard<std::mutex> lock(r.mutex);
    fault.swap(r.fault);
  }
  if (!fault) return;
  cudaGetLastError();  // it was this
  throw *fault;
}

// Raises the errors that were collected and not raised, if there are any, as one fault: the text is the first's.
void raise_collected() {
  Runtime& r = runtime();
  std::unique_lock<std::mutex> lock(r.mutex);
  std::vector<Report> errors = r.reports.errors();
  lock.unlock();
  const auto left = std::find_if(errors.begin(), errors.end(), [](const Report& e) { return !e.raised; });
  if (left == errors.end()) return;
  Fault fault(*left);
  fault.collected = std::move(errors);
  throw fault;
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
    const VariableBytes* bytes = loaded.global(name);
    if (bytes == nullptr) throw py::key_error(name);
    return {reinterpret_cast<const char*>(bytes->data()), bytes->size()};
  }

  LoadedModule loaded;
};

// The modules whose kernels have this name. Copies of one source have the same text; anything else is ambiguous.
std::vector<LoadedModule*> modules_with(const std::string& kernel) {
  std::vector<LoadedModule*> modules;
  for (const Kernel* k : kernels_named(kernel)) modules.push_back(k->module);
  if (modules.empty()) throw Fault("unknown kernel", kernel);
  for (const LoadedModule* m : modules)
    if (m->text != modules[0]->text) throw Fault("unknown kernel", kernel + " is the name of different kernels");
  return modules;
}

PyObject* fault_type = nullptr;

void translate_fault(std::exception_ptr pointer) {
  try {
    if (pointer) std::rethrow_exception(pointer);
  } catch (const Fault& fault) {
    py::object instance = py::reinterpret_borrow<py::object>(fault_type)(fault.what());
    instance.attr("kind") = fault.report.kind;
    instance.attr("reports") = list_of(fault.collected.empty() ? std::vector{fault.report} : fault.collected);
    PyErr_SetObject(fault_type, instance.ptr());
  }
}

}  // namespace

PYBIND11_MODULE(_hoppersim, m) {
  fault_type =
      PyErr_NewExceptionWithDoc("hoppersim.Fault",
                                "A finding: `kind` is stable, the text says where. `reports`: it, or with go_on "
                                "all that were collected.",
                                PyExc_RuntimeError, nullptr);
  m.attr("Fault") = py::reinterpret_borrow<py::object>(fault_type);
  py::register_exception_translator(&translate_fault);

  m.attr("MAX_INSTRUCTIONS") = kMaxInstructions;
  m.def("options", &get_options);
  m.def("set_options", &set_options, py::arg("timing"), py::arg("seed"), py::arg("host_threads"),
        py::arg("max_instructions"), py::arg("check_global"), py::arg("allow"), py::arg("warn_as_error"),
        py::arg("strict"), py::arg("go_on"));
  m.def("kinds", [] {
    py::list result;
    for (const Kind& k : kinds()) result.append(py::make_tuple(k.name, name_of(k.severity), k.meaning, k.goes_on));
    return result;
  });
  m.def("reports", [] {
    std::lock_guard<std::mutex> lock(runtime().mutex);
    return list_of(runtime().reports.list);
  });
  m.def("clear_reports", [] {
    std::lock_guard<std::mutex> lock(runtime().mutex);
    runtime().reports.list.clear();
  });
  m.def("raise_collected", &raise_collected);
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

  m.def(
      "module_text", [](const std::string& kernel) { return modules_with(kernel)[0]->text; },
      "The PTX of the module that a registered kernel is in.");
  m.def("replace_kernel", [](const std::string& kernel, const std::string& text) {
    for (LoadedModule* module : modules_with(kernel)) module->replace(kernel, text);
  });
  m.def("restore_kernel", [](const std::string& kernel) {
    for (LoadedModule* module : modules_with(kernel)) module->restore(kernel);
  });

  py::class_<TextModule>(m, "TextModule")
      .def(py::init<const std::string&>())
      .def("kernels", &TextModule::kernels)
      .def("parameters", &TextModule::parameters)
      .def("launch", &TextModule::launch)
      .def("global_bytes", &TextModule::global_bytes);
}
