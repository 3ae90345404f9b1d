#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <c10/util/Exception.h>

#include "core/cpu/level.h"

// What Python asks the library itself, beside the operators, which it reaches through torch.ops.
PYBIND11_MODULE(_C, m) {
  pybind11::register_exception_translator([](std::exception_ptr error) {
    try {
      std::rethrow_exception(error);
    } catch (const c10::ValueError& value_error) {
      PyErr_SetString(PyExc_ValueError, value_error.what_without_backtrace());
    }
  });
  m.def("cpu_capability", &torchops::cpu_capability);
  m.def("cpu_capabilities", &torchops::cpu_capabilities);
  m.def("why_no_higher_level", &torchops::why_no_higher_level);
}
