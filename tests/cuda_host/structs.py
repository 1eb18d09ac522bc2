"""The C++ structures that the harness takes, as ctypes has them."""

from __future__ import annotations

import ctypes

SPATIAL_RANK = 3


class DeviceStruct(ctypes.Structure):
    _fields_ = (
        ("multiprocessors", ctypes.c_int),
        ("capability", ctypes.c_int),
        ("shared_bytes", ctypes.c_int64),
        ("seed", ctypes.c_uint64),
    )


class ViewStruct(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p),
        ("image_stride", ctypes.c_int64),
        ("target_stride", ctypes.c_int64),
        ("channel_stride", ctypes.c_int64),
        ("spatial_stride", ctypes.c_int64 * SPATIAL_RANK),
    )


class CamShapeStruct(ctypes.Structure):
    _fields_ = (
        ("images", ctypes.c_int64),
        ("targets", ctypes.c_int64),
        ("channels", ctypes.c_int64),
        ("extent", ctypes.c_int64 * SPATIAL_RANK),
        ("type", ctypes.c_int),
        ("constant_gradients", ctypes.c_bool),
    )


class LogitDifferenceShapeStruct(ctypes.Structure):
    _fields_ = (
        ("images", ctypes.c_int64),
        ("targets", ctypes.c_int64),
        ("classes", ctypes.c_int64),
        ("type", ctypes.c_int),
    )


class LogitDifferenceOptionsStruct(ctypes.Structure):
    _fields_ = (
        ("baseline", ctypes.c_int),
        ("top_k", ctypes.c_int64),
        ("temperature", ctypes.c_double),
        ("alpha", ctypes.c_double),
        ("ranks", ctypes.POINTER(ctypes.c_int64)),
        ("rank_count", ctypes.c_int64),
    )


class LogitDifferenceResultStruct(ctypes.Structure):
    _fields_ = (
        ("delta", ctypes.c_void_p),
        ("cotangent", ctypes.c_void_p),
        ("rivals", ctypes.c_void_p),
        ("differences", ctypes.c_void_p),
    )


class OverlayShapeStruct(ctypes.Structure):
    _fields_ = (
        ("images", ctypes.c_int64),
        ("targets", ctypes.c_int64),
        ("map_height", ctypes.c_int64),
        ("map_width", ctypes.c_int64),
        ("height", ctypes.c_int64),
        ("width", ctypes.c_int64),
        ("map_type", ctypes.c_int),
        ("pixel_type", ctypes.c_int),
    )


class OverlayOptionsStruct(ctypes.Structure):
    _fields_ = (
        ("opacity", ctypes.c_float),
        ("normalize", ctypes.c_int),
        ("blend", ctypes.c_int),
        ("eps", ctypes.c_double),
    )


class SaliencyContrastShapeStruct(ctypes.Structure):
    _fields_ = (
        ("images", ctypes.c_int64),
        ("targets", ctypes.c_int64),
        ("channels", ctypes.c_int64),
        ("extent", ctypes.c_int64 * SPATIAL_RANK),
        ("type", ctypes.c_int),
        ("per_channel", ctypes.c_bool),
    )
