// The Python module bitmask._C: what is not an op. No torch header here; importing it also registers the ops of this library.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdlib>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "checks.h"
#include "cpu/kernels.h"
#include "parallel.h"

namespace py = pybind11;

namespace {

// What a Python signal handler raised while a kernel ran; Python takes it when the op has thrown.
py::object& pending_exception() {
  static auto* pending = new py::object();  // never destroyed: the interpreter may be gone by then
  return *pending;
}

bool interrupted() {
  const py::gil_scoped_acquire gil;
  if (PyErr_CheckSignals() == 0) return false;
  const py::error_already_set error;
  pending_exception() = error.value();
  return true;
}

py::object take_pending_exception() {
  py::object taken = std::move(pending_exception());
  return taken ? taken : py::none();
}

std::vector<std::string> available_isas() {
  std::vector<std::string> names;
  for (int i = 0; i < bitmask::cpu::isa_count(); ++i) names.emplace_back(bitmask::cpu::isa_name(i));
  return names;
}

[[noreturn]] void refuse_isa(const std::string& what, const std::string& name) {
  std::string known;
  for (const std::string& isa : available_isas()) known += (known.empty() ? "" : ", ") + isa;
  throw py::value_error(what + ": got '" + name + "', expected one that this machine runs: " + known);
}

void set_isa(const std::optional<std::string>& name) {
  const std::string asked = name.value_or("");
  if (!bitmask::cpu::force_isa(asked.c_str())) refuse_isa("isa", asked);
}

py::dict build_info() {
  py::dict info;
  info["compiler"] = __VERSION__;
  info["cxx_standard"] = static_cast<long>(__cplusplus);
  info["torch_target"] = BITMASK_TORCH_TARGET;
  return info;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Native core of bitmask: build information and choice of instruction set. The ops are in torch.ops.bitmask.";
  m.attr("INVALID") = bitmask::kInvalid;
  m.attr("OUT_OF_MEMORY") = bitmask::kOutOfMemory;
  m.attr("INTERRUPTED") = bitmask::kInterrupted;
  m.def("build_info", &build_info);
  m.def("available_isas", &available_isas);
  m.def("get_isa", [] { return bitmask::cpu::kernels().isa; });
  m.def("set_isa", &set_isa, py::arg("name"));
  m.def("take_pending_exception", &take_pending_exception);
  bitmask::set_interrupt_check(&interrupted);

  const char* asked = std::getenv("BITMASK_ISA");
  if (asked != nullptr && !bitmask::cpu::force_isa(asked)) refuse_isa("BITMASK_ISA", asked);
}
