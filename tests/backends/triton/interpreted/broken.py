"""A pytest plugin that breaks each op's kernels in one device function, to show that the checks can fail."""

from __future__ import annotations

import triton
import triton.language as tl

from diffcam_fast.backends.triton import cam, cam_backward, logit_difference, overlay, saliency_contrast


@triton.jit
def channel_offsets(c, stride, WIDE: tl.constexpr):
    """Every second channel is read from where the one before it lies."""
    return c // 2 * 2 * stride


@triton.jit
def _is_at_or_before(key, k, last_key, last_k):
    """Ties go to the higher index, and a rival is never done with."""
    return key > last_key


@triton.jit
def _place(pixel, scale, positions):
    """Corners are aligned."""
    at = pixel.to(scale.dtype) * scale
    first = tl.minimum(at.to(tl.int32), positions - 1)
    return first, tl.minimum(first + 1, positions - 1), at - first.to(scale.dtype)


@triton.jit
def _divided(values, scale, divisor):
    """Energies are not taken into account."""
    return values * scale


cam.channel_offsets = channel_offsets
cam_backward.channel_offsets = channel_offsets
logit_difference._is_at_or_before = _is_at_or_before
overlay._place = _place
saliency_contrast._divided = _divided
