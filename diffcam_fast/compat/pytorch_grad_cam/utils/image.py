"""Images to tensors, maps to pictures: without OpenCV and torchvision."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from diffcam_fast.compat.originals import attribute
from diffcam_fast.compat.resizing import resize
from diffcam_fast.ops.colormaps import color_table

_JET = 2  # cv2.COLORMAP_JET


def preprocess_image(
    img: np.ndarray, mean: Sequence[float] = (0.5, 0.5, 0.5), std: Sequence[float] = (0.5, 0.5, 0.5)
) -> Tensor:
    """An image as a batch of one, normalised.

    Args:
        img: ``(H, W, C)`` or ``(H, W)``; uint8 is divided by 255.
        mean: of each channel, subtracted.
        std: of each channel, divided by.

    Returns:
        ``(1, C, H, W)``; float32 for uint8, otherwise of the dtype of the image.

    Raises:
        ValueError: a standard deviation is 0.
    """
    if 0 in std:
        raise ValueError(f"std: expected numbers other than 0; got {std}")
    tensor = torch.from_numpy(np.array(img[:, :, None] if img.ndim == 2 else img)).permute(2, 0, 1).contiguous()
    if tensor.dtype == torch.uint8:
        tensor = tensor.float() / 255
    shape = (-1, 1, 1)
    mean_of, std_of = (torch.as_tensor(values, dtype=tensor.dtype).reshape(shape) for values in (mean, std))
    return ((tensor - mean_of) / std_of).unsqueeze(0)


def deprocess_image(img: np.ndarray) -> np.ndarray:
    """Any array as a picture: mean grey, a tenth of the range for each standard deviation; uint8."""
    standard = (img - img.mean()) / (img.std() + 1e-5)
    return _bytes(255 * np.clip(0.5 + 0.1 * standard, 0, 1))


def show_cam_on_image(
    img: np.ndarray, mask: np.ndarray, use_rgb: bool = False, colormap: int = _JET, image_weight: float = 0.5
) -> np.ndarray:
    """A map laid over an image as heat; the brightest value of the result is 255.

    Args:
        img: ``(H, W, 3)``, floating point from 0 to 1.
        mask: ``(H, W)``, from 0 to 1.
        use_rgb: whether the image is red, green, blue; otherwise it is blue, green, red, as OpenCV reads it.
        colormap: one of OpenCV's; the default needs no OpenCV.
        image_weight: of the image; the rest is the heat's.

    Returns:
        ``(H, W, 3)``, uint8.

    Raises:
        ImportError: a colormap other than the default, and OpenCV is not installed.
        ValueError: the image or its weight is out of range.
    """
    if img.max() > 1:
        raise ValueError(f"img: expected values from 0 to 1; got up to {img.max():.4g}")
    if not 0 <= image_weight <= 1:
        raise ValueError(f"image_weight: expected a number from 0 to 1; got {image_weight}")
    colors = _colors(colormap)
    heat = (colors if use_rgb else colors[:, ::-1])[_bytes(255 * mask)].astype(np.float32) / 255
    mixed = (1 - image_weight) * heat + image_weight * img
    return _bytes(255 * (mixed / mixed.max()))


def scale_cam_image(cam: Any, target_size: Sequence[int] | None = None) -> np.ndarray:
    """Maps scaled to 0 to 1, each by itself, then resized.

    Args:
        cam: ``(N, *S)``, or a list of maps ``(*S)``.
        target_size: lengths in reverse order: (width, height), or (width, height, depth); None: as they are.

    Returns:
        ``(N, *target_size reversed)``, float32.
    """
    scaled = []
    for one in cam:
        above = np.asarray(one) - np.min(one)
        above = above / (1e-7 + np.max(above))
        if target_size is not None:
            tensor = torch.from_numpy(np.ascontiguousarray(above, dtype=np.float32))
            above = resize(tensor[None, None], tuple(target_size)[::-1])[0, 0].numpy()
        scaled.append(above)
    return np.asarray(scaled, np.float32)


def scale_accross_batch_and_channels(tensor: np.ndarray, target_size: Sequence[int]) -> np.ndarray:
    """`scale_cam_image` of each channel of each image: ``(N, C, h, w)`` to ``(N, C, height, width)``."""
    flat = tensor.reshape(-1, *tensor.shape[2:])
    return scale_cam_image(flat, target_size).reshape(*tensor.shape[:2], target_size[1], target_size[0])


def _colors(colormap: int) -> np.ndarray:
    """uint8 (256, 3): red, green, blue."""
    if colormap == _JET:
        return _bytes(np.rint(color_table("jet").numpy() * 255))
    try:
        import cv2
    except ImportError as error:
        raise ImportError(
            f"colormap: only OpenCV's COLORMAP_JET ({_JET}) is known without OpenCV; got {colormap}: "
            "pip install opencv-python-headless"
        ) from error
    colors: np.ndarray = cv2.applyColorMap(np.arange(256, dtype=np.uint8)[:, None], colormap)[:, 0, ::-1]
    return colors


def _bytes(values: np.ndarray) -> np.ndarray:
    return values.astype(np.uint8)


def __getattr__(name: str) -> Any:
    return attribute("pytorch_grad_cam", "utils.image", name)
