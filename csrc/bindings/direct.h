// Calls on PyTorch's CPU tensors that pass its dispatcher by.

#pragma once

#include <pybind11/pybind11.h>

namespace diffcam {

// Adds the functions of direct.cpp to the module.
void add_direct_calls(pybind11::module_& module);

}  // namespace diffcam
