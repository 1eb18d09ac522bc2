"""The first principal component of activations as a map (Muhammad and Yeasin 2020), from a small triangular factor."""

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
    for 0: ``X v``, for the ``v`` with the largest ``|X v|``. Where X is much longer one way than the other, as with the
    many channels of most layers, what is decomposed is its triangular factor, as small as the Gram matrix.

    A singular vector has no sign of its own. The one here is what NumPy's SVD, which is LAPACK's gesdd, gives to X: an
    accident of the Householder reflections there, not a property of the image. It comes out the same because gesdd
    itself starts from the triangular factor of such matrices. Where two singular values nearly coincide, neither the
    map nor its sign is determined.

    Args:
        activations: ``(N, C, *S)``, floating point; brought to the host.

    Returns:
        ``(N, *S)``, float32 (float64 for float64 activations).
    """
    dtype = torch.float64 if activations.dtype == torch.float64 else torch.float32
    images, _, *size = activations.shape
    x = activations.detach().to("cpu", dtype).flatten(2)
    if x.numel() == 0:
        return activations.new_zeros((images, *size), dtype=dtype)
    mean = x.mean(2, keepdim=True)
    if mean.isnan().any():
        x = torch.where(x.isnan(), 0, x)
        mean = x.mean(2, keepdim=True)
    projection = _projection(x - mean)
    return projection.to(activations.device).reshape(images, *size)


def _projection(x: Tensor) -> Tensor:
    """``v^T x`` of matrices x (N, C, P), by the path that the full decomposition of X = x^T takes through LAPACK."""
    _, channels, positions = x.shape
    if channels >= _ELONGATED * positions:
        left, values, _ = _decomposed(_triangular_factor(x).mT)
        return left[:, :, 0] * values[:, :1]
    longer = positions >= _ELONGATED * channels
    right = _decomposed(_triangular_factor(x.mT) if longer else x.mT)[2]
    return (right[:, :1] @ x).squeeze(1)


def _triangular_factor(tall: Tensor) -> Tensor:
    return torch.geqrf(tall)[0][:, : tall.shape[2]].triu()


def _decomposed(matrices: Tensor) -> list[Tensor]:
    # NumPy's, not PyTorch's: with another LAPACK the signs would be others.
    with _limiting, _single_thread():
        return [torch.from_numpy(part) for part in np.linalg.svd(matrices.numpy(), full_matrices=False)]


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
