// Which modules of a network are in training mode.

#pragma once

#include <pybind11/pybind11.h>

namespace diffcam {

// The modules of a torch.nn.Module, itself included, whose flag `training` is up; one that is in several
// places may be there more than once. None where a module keeps its attributes in another way than
// torch.nn.Module does.
pybind11::object modules_in_training(const pybind11::object& model);

}  // namespace diffcam
