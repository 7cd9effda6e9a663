// What was built: compiler, instruction sets, architectures. No torch headers here (they do not mix with pybind11's).
#include <pybind11/pybind11.h>

#include <sstream>
#include <string>

#include "bindings/backend.h"
#include "build_facts.h"
#include "csrc/common/cpu/isa.h"
#include "csrc/common/plain_reason.h"
#include "csrc/hopper/empty_launch.h"

namespace py = pybind11;

namespace {

py::list lines(const std::string& text) {
  py::list result;
  std::istringstream stream(text);
  for (std::string line; std::getline(stream, line);)
    if (!line.empty()) result.append(line);
  return result;
}

py::dict build_info() {
  py::dict info;
  info["torch"] = JET_BUILD_TORCH;
  info["compiler"] = JET_BUILD_COMPILER;
  info["cpu_isas"] = lines(JET_BUILD_CPU_ISAS);
  info["cpu_isa"] = jet::cpu::isa_name(jet::cpu::active_isa());
  info["cuda_architectures"] = lines(JET_BUILD_CUDA_ARCHITECTURES);
  return info;
}

}  // namespace

PYBIND11_MODULE(_introspection, m) {
  m.doc() = "Build facts of jetkernels.";
  m.def("build_info", &build_info, "Compiler, torch version, CPU instruction sets and CUDA architectures of this build.");
  m.def(
      "plain_reason_text", [](int64_t code) { return jet::text(static_cast<jet::PlainReason>(code)); }, py::arg("code"),
      "The reason that the bindings pass to the plain PyTorch path, as text.");
  m.def(
      "plain_reason",
      [](const std::string& op, int device) -> py::object {
        const auto reason = jet::bindings::plain_reason(device, jet::bindings::has_hopper_kernel(op.c_str()));
        return reason ? py::object(py::str(jet::text(*reason))) : py::object(py::none());
      },
      py::arg("op"), py::arg("device"),
      "Why the plain PyTorch path serves an op on a CUDA device (-1: on a CPU); None if a kernel does. Single calls may differ\n"
      "on a CUDA device: for shapes that the kernel does not take.");
#ifdef JET_WITH_CUDA
  m.def(
      "empty_launch", [](uintptr_t stream) { return jet::hopper::empty_launch(reinterpret_cast<void*>(stream)); },
      py::arg("stream"), "Launches an empty kernel on a CUDA stream; returns the cudaError_t.");
#endif
}
