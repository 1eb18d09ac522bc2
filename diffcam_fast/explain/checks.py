"""What an explainer accepts, and what it says to everything else."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor


def check_images(images: Any) -> None:
    """Raise unless images are a floating point batch."""
    if not isinstance(images, Tensor):
        raise TypeError(f"images: expected a torch.Tensor; got {type(images).__name__}")
    if not images.is_floating_point():
        raise TypeError(f"images: expected a floating point tensor; got {images.dtype}")
    if not 3 <= images.dim() <= 5:
        raise ValueError(
            f"images: expected a batch (N, C, *S) with one to three spatial dimensions; got shape {tuple(images.shape)}"
        )


def check_logits(output: Any, images: int) -> Tensor:
    """The model's output, if it is logits (N, K)."""
    if not isinstance(output, Tensor):
        raise ValueError(
            f"model: expected it to return logits (N, K); got {type(output).__name__}; wrap the model in a "
            "module that returns its logits"
        )
    if output.dim() != 2 or output.shape[0] != images or output.shape[1] < 2:
        raise ValueError(
            f"model: expected logits of shape ({images}, K), K at least 2, for {images} images (with a batch "
            f"dimension); got shape {tuple(output.shape)}"
        )
    if not output.is_floating_point():
        raise ValueError(f"model: expected floating point logits; got {output.dtype}")
    return output


def check_activations(name: str, activations: Any, *, reshaped: bool) -> Tensor:
    """A layer's output, if it is (N, C, *positions)."""
    if not isinstance(activations, Tensor):
        raise TypeError(f"reshape: expected the function to return a tensor; got {type(activations).__name__}")
    if 3 <= activations.dim() <= 5 and activations.shape[2:].numel() >= 2:
        return activations
    where = f"layer {name!r}" + (" after reshape" if reshaped else "")
    shape = tuple(activations.shape)
    if not 3 <= len(shape) <= 5:
        raise ValueError(
            f"layers: expected {where} to put out (N, C, *positions), one to three dimensions of "
            f"positions; got shape {shape}"
        )
    raise ValueError(f"layers: expected {where} to have several positions for a map; got shape {shape}")


def check_map_size(
    images: Tensor, activations: Mapping[str, Tensor], size: str | Sequence[int] | None, *, reshaped: bool
) -> tuple[int, ...] | None:
    """The size of the maps; None for the layer's own. Checked before the work is done."""
    wanted = tuple(images.shape[2:]) if isinstance(size, str) else None if size is None else tuple(size)
    for name, activation in activations.items():
        shape = activation.shape
        if shape[0] != images.shape[0]:
            raise ValueError(
                f"layers: expected layer {name!r} to put out one entry per image, {images.shape[0]} in "
                f"all; got shape {tuple(shape)}"
            )
        if wanted is not None and len(wanted) != len(shape) - 2:
            tokens = len(shape) == 3 and images.dim() > 3 and not reshaped
            raise ValueError(
                f"size: layer {name!r} has {len(shape) - 2} dimensions of positions, in shape {tuple(shape)}, "
                f"which cannot be resized to {wanted}"
                + ("; for tokens pass reshape=diffcam_fast.tokens_to_positions()" if tokens else "")
            )
    if len({activation.dim() for activation in activations.values()}) > 1:
        raise ValueError("layers: expected layers with the same number of dimensions of positions, to fuse their maps")
    return wanted
