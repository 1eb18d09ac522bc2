"""Networks with the same probabilities and other logits: what maps of a single logit can be steered with."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Any

import torch
from torch import Tensor, nn

from diffcam_fast.explain.capture import LayerHooks
from diffcam_fast.explain.checks import check_logits
from diffcam_fast.explain.layers import LayerSpec, resolve_layer, unwrapped
from diffcam_fast.ops.arguments import check_number
from diffcam_fast.reference.cam import accumulation_dtype

Shift = Callable[[Tensor], Tensor]
"""What is added to the logits: the layer's output (N, ...) -> one number an image, (N,)."""

CORNERS = {"top left": (0, 0), "top right": (0, -1), "bottom left": (-1, 0), "bottom right": (-1, -1)}


@dataclass(frozen=True)
class CornerSum:
    """``strength * sum_c A[c, corner]``: the sum over the channels at one corner of the layer's output.

    Args:
        strength: K, the gradient of the shift with respect to each channel at the corner; of either sign.
        corner: "top left", "top right", "bottom left" or "bottom right".

    Raises:
        TypeError: the strength is no number.
        ValueError: it is not finite, or there is no such corner.
    """

    strength: float
    corner: str = "top left"

    def __post_init__(self) -> None:
        check_number("strength", self.strength)
        if self.corner not in CORNERS:
            raise ValueError(f"corner: expected one of {', '.join(CORNERS)}; got {self.corner!r}")

    def __call__(self, activations: Tensor) -> Tensor:
        """The shift ``(N,)`` of activations ``(N, C, H, W)``, float32 (float64 for float64)."""
        if activations.dim() != 4:
            raise ValueError(f"shift: expected activations (N, C, H, W) for a corner; got {tuple(activations.shape)}")
        row, column = CORNERS[self.corner]
        return self.strength * activations[:, :, row, column].sum(1, dtype=accumulation_dtype(activations.dtype))


@dataclass(frozen=True)
class RegionSum:
    """``strength * sum A[c, region]``: the sum over the channels and over a block of positions.

    Args:
        strength: K, as in `CornerSum`.
        region: for each dimension of positions where the block starts and where it stops, ``((0, 2), (3, 7))`` for rows
            0 and 1 and columns 3 to 6.

    Raises:
        TypeError: the strength is no number, or the region is not made of pairs of integers.
        ValueError: the strength is not finite, or a part of the region is empty or starts below 0.
    """

    strength: float
    region: Sequence[tuple[int, int]]

    def __post_init__(self) -> None:
        check_number("strength", self.strength)
        wrong = f"region: expected pairs of integers (start, stop), one for each dimension; got {self.region!r}"
        if not isinstance(self.region, tuple | list) or not self.region:
            raise TypeError(wrong)
        for pair in self.region:
            if not isinstance(pair, tuple | list) or len(pair) != 2 or not all(_is_integer(bound) for bound in pair):
                raise TypeError(wrong)
            if not 0 <= pair[0] < pair[1]:
                raise ValueError(f"region: expected 0 <= start < stop; got {tuple(pair)}")
        object.__setattr__(self, "region", tuple((int(start), int(stop)) for start, stop in self.region))

    def __call__(self, activations: Tensor) -> Tensor:
        """The shift ``(N,)`` of activations ``(N, C, *S)``, float32 (float64 for float64)."""
        size = tuple(activations.shape[2:])
        if len(size) != len(self.region) or any(
            stop > length for (_, stop), length in zip(self.region, size, strict=True)
        ):
            raise ValueError(f"shift: expected a region within the layer's {size} positions; got {self.region}")
        index: tuple[Any, ...] = (..., *(slice(start, stop) for start, stop in self.region))
        block = activations[index]
        return self.strength * block.flatten(1).sum(1, dtype=accumulation_dtype(activations.dtype))


def shift_logits(model: nn.Module, layer: LayerSpec, shift: Shift) -> nn.Module:
    """A copy of a classifier that adds the same input-dependent number to all of an image's logits.

    Softmax does not see such a number, so every probability and every decision is the model's; the gradient of a single
    logit is not. Lerma and Lucas, "A Vulnerability of Attribution Methods Using Pre-Softmax Scores", 2023
    (arXiv:2307.03305), give ``t = K sum_c A[c, 0, 0]`` at the explained layer, here ``CornerSum(K)``.

    The copy has weights of its own: it can be cast, moved, trained and changed without the model, which is left as it
    is. It is of the model's class with the model's layers under their names, so whatever explains the model explains
    the copy: `Explainer` (not its `compile`, which hooks cannot follow) and libraries that hook layers. What such a
    hook returns in place of the layer's output is what the shift is computed of, so gradients with respect to it are
    complete. The copy can be copied, and pickled where its class and the shift can be. Copies of copies add their
    shifts. (torch.fx graph modules lose all hooks, and so the shift, when they are copied once more.)

    The sum is taken in float32 (float64 for float64) and rounded once to the logits' dtype: numbers much larger than
    the logits cost the logits their last digits. Where ``|t|`` is about 10, probabilities keep 6 decimals in float32.

    Args:
        model: a classifier: images ``(N, ...)`` to logits ``(N, K)``. A wrapper that compiles it or spreads it over
            devices is left out of the copy.
        layer: of the model, or its dotted name; called once in each pass.
        shift: the layer's output ``(N, ...)`` to ``(N,)``: `CornerSum`, `RegionSum` or any differentiable function.

    Returns:
        The copy, in training or evaluation mode as the model is. A pass raises TypeError or ValueError where the layer
        is not called exactly once or puts out no tensor, the shift does not return ``(N,)``, or the model no logits.

    Raises:
        TypeError: an argument is not of a type above.
        ValueError: the layer is not part of the model, or is the model itself.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module; got {type(model).__name__}")
    if isinstance(shift, type) or not callable(shift):
        raise TypeError(f"shift: expected a function of the layer's output; got {shift!r}")
    model = unwrapped(model)
    if layer is model or layer == "":
        raise ValueError("layer: expected a layer within the model; got the model itself")
    name = resolve_layer(model, layer)
    shifted = copy.deepcopy(model)
    added = _AddedShift(name, shift)
    shifted.register_forward_pre_hook(added.before)
    shifted.register_forward_hook(added.after, always_call=True)
    return shifted


class _AddedShift:
    """The hooks of a shifted model. They find the layer by its name, so copies of the model have their own."""

    def __init__(self, layer: str, shift: Shift) -> None:
        self._layer = layer
        self._shift = shift
        self._passes = threading.local()

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self._layer, self._shift)

    def before(self, model: nn.Module, args: tuple[Any, ...]) -> None:
        # Hooked anew for each pass, and so after whoever else hooks the layer: what they hand on is what is shifted by.
        watching = _Watching(self._layer, model.get_submodule(self._layer), self._shift)
        watching.__enter__()
        self._under_way().append(watching)

    def after(self, model: nn.Module, args: tuple[Any, ...], logits: Any) -> Tensor | None:
        under_way = self._under_way()
        if not under_way:  # somebody else's hook ended the pass before it began
            return None
        watching = under_way.pop()
        watching.__exit__()
        if logits is None:  # the pass failed, and its own error is on its way
            return None
        return watching.added_to(logits)

    def _under_way(self) -> list[_Watching]:
        passes = self._passes.__dict__
        found: list[_Watching] = passes.setdefault("under_way", [])
        return found


class _Watching(LayerHooks):
    """Computes the shift as soon as the layer has been called in this thread."""

    def __init__(self, name: str, layer: nn.Module, shift: Shift) -> None:
        super().__init__([layer])
        self._name = name
        self._shift = shift
        self._computed: list[Any] = []

    def on_output(self, index: int, inputs: tuple[Any, ...], output: Any) -> None:
        if not isinstance(output, Tensor):
            raise TypeError(f"layer: expected {self._name!r} to put out a tensor; got {type(output).__name__}")
        # Of a copy, because the model may go on to change the output in place.
        self._computed.append(self._shift(output.clone()))

    def added_to(self, logits: Any) -> Tensor:
        if len(self._computed) != 1:
            raise ValueError(
                f"layer: expected the model to call {self._name!r} once in a pass; it was called "
                f"{len(self._computed)} times"
            )
        (shift,) = self._computed
        if not isinstance(shift, Tensor):
            raise TypeError(f"shift: expected the function to return a tensor; got {type(shift).__name__}")
        logits = check_logits(logits, logits.shape[0] if isinstance(logits, Tensor) and logits.dim() else 0)
        if shift.shape != logits.shape[:1] or not shift.is_floating_point():
            raise ValueError(
                f"shift: expected one floating point number an image, shape ({len(logits)},); got {shift.dtype} of "
                f"shape {tuple(shift.shape)}"
            )
        wide = torch.promote_types(accumulation_dtype(logits.dtype), shift.dtype)
        return (logits.to(wide) + shift.to(logits.device, wide).unsqueeze(1)).to(logits.dtype)


def _is_integer(value: Any) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)
