"""Runs the CUDA kernels where there is no GPU; see README.md."""

from __future__ import annotations

from . import ops
from .build import build, build_op, preload_sanitizers
from .device import Device, KernelError, load

__all__ = ["Device", "KernelError", "build", "build_op", "load", "ops", "preload_sanitizers"]
