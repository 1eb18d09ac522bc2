"""Imports a CUDA build of torchvision beside a CPU build of PyTorch, for the networks that the tests compare on.

torchvision registers shape functions for its detection ops when it is imported. Beside a CPU build its compiled library
does not load, and those ops do not exist; their schemas alone let the import go on. Classification never calls them.
"""

from __future__ import annotations

import torch

_library = torch.library.Library("torchvision", "DEF")
if torch.version.cuda is None:
    for _name in ("nms", "qnms"):
        _library.define(f"{_name}(Tensor boxes, Tensor scores, float iou_threshold) -> Tensor")

import torchvision  # noqa: E402

models = torchvision.models
