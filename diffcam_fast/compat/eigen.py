"""The first principal component of activations as a map (Muhammad and Yeasin 2020), from the small Gram matrix."""

from __future__ import annotations

import importlib
import threading
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

# Two threads that limit NumPy's at a time would not put back what they found.
_limiting = threading.Lock()

# From this ratio of its sides on LAPACK's gesdd takes the triangular factor of a matrix in its place.
_ELONGATED = 11 / 6


def first_component(activations: Tensor) -> Tensor:
    """Positions projected on the first right singular vector of the centred activations.

    With X the ``(positions, channels)`` matrix of an image, each channel less its mean over positions, and NaN taken
    for 0: ``X v``, for the ``v`` with the largest ``|X v|``. It comes from the eigenvectors of ``X X^T`` or ``X^T X``,
    whichever is smaller, of all images at a time, in float64.

    A singular vector has no sign of its own. The one here is what NumPy's SVD, which is LAPACK's gesdd, gives to X:
    an accident of the Householder reflections there, not a property of the image. It is found from the triangular
    factor of X where gesdd itself starts from that, and from a thin SVD otherwise, on the host. Where two singular
    values nearly coincide, neither the map nor its sign is determined.

    Args:
        activations: ``(N, C, *S)``, floating point.

    Returns:
        ``(N, *S)``, float32 (float64 for float64 activations).
    """
    dtype = torch.float64 if activations.dtype == torch.float64 else torch.float32
    images, channels, *size = activations.shape
    x = activations.detach().flatten(2).transpose(1, 2).to(dtype)
    x = torch.where(x.isnan(), 0, x)
    x = x - x.mean(1, keepdim=True)
    if x.numel() == 0:
        return x.new_zeros((images, *size))
    wide = x.to(torch.float64)
    positions = wide.shape[1]
    if positions <= channels:
        values, vectors = torch.linalg.eigh(wide @ wide.mT)
        projection = vectors[:, :, -1] * values[:, -1:].clamp(min=0).sqrt()
    else:
        vectors = torch.linalg.eigh(wide.mT @ wide).eigenvectors
        projection = (wide @ vectors[:, :, -1:]).squeeze(2)
    with _limiting, _single_thread():
        theirs = torch.from_numpy(np.stack([_projection_as_lapack_signs_it(image) for image in x.numpy(force=True)]))
    agreement = (theirs.to(projection.device, torch.float64) * projection).sum(1, keepdim=True)
    projection = torch.where(agreement < 0, -projection, projection)
    return projection.to(dtype).reshape(images, *size)


def _single_thread() -> AbstractContextManager[Any]:
    """NumPy's linear algebra on one thread, where threadpoolctl is installed, as it is beside pytorch-grad-cam.

    Matrices this small do not gain by more, and the threads would go on spinning while the next image waits for the
    network.
    """
    controller = _blas()
    return nullcontext() if controller is None else controller.limit(limits=1)


@lru_cache(maxsize=1)
def _blas() -> Any:
    try:
        threadpoolctl: Any = importlib.import_module("threadpoolctl")
    except ImportError:
        return None
    return threadpoolctl.ThreadpoolController().select(user_api="blas")


def _projection_as_lapack_signs_it(x: np.ndarray) -> np.ndarray:
    """``x @ v``, by the same path through LAPACK that the full decomposition of `x` takes."""
    positions, channels = x.shape
    if channels >= _ELONGATED * positions:
        left, values, _ = np.linalg.svd(_triangular_factor(x.T).T)
        projection: np.ndarray = left[:, 0] * values[0]
        return projection
    factor = _triangular_factor(x) if positions >= _ELONGATED * channels else x
    right = np.linalg.svd(factor, full_matrices=False)[2]
    projection = x @ right[0]
    return projection


def _triangular_factor(x: np.ndarray) -> np.ndarray:
    factor: Any = np.linalg.qr(x, mode="r")
    return np.asarray(factor)
