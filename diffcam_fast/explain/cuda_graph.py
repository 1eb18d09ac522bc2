"""A whole explained inference as one CUDA graph."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from diffcam_fast.explain.checks import check_images
from diffcam_fast.explain.classes import classes_for, parse_classes
from diffcam_fast.explain.explanation import Explanation

if TYPE_CHECKING:
    from diffcam_fast.explain.explainer import Explainer

# The first pass chooses the layer and takes every precaution, the second takes fewer; the third is like those to come.
_WARM_UPS = 3


class CapturedExplainer:
    """What `Explainer.capture` returns: explains images of one shape by replaying a CUDA graph.

    A replay launches everything from the images to the maps with one call, and waits for nothing. Images and classes
    are copied into the graph's own memory, and the results out of it, on the current stream: earlier results stay
    valid. Calls from several threads take turns; the graph's memory is that of one explanation.

    Replays read the model's parameters where they were when the graph was captured: changes in place
    (`load_state_dict`, optimizers) are seen; tensors put into their place (`model.to(...)`) are not.
    """

    def __init__(self, explainer: Explainer, example: Tensor, classes: Any) -> None:
        check_images(example)
        if example.device.type != "cuda":
            raise ValueError(
                f"example: expected images on a CUDA device, with the model there too: a CUDA graph records what a "
                f"GPU does; got images on {example.device}"
            )
        if example.shape[0] == 0:
            raise ValueError(f"example: expected at least one image; got shape {tuple(example.shape)}")
        elsewhere = {str(tensor.device) for tensor in explainer.model.parameters() if tensor.device != example.device}
        if elsewhere:
            raise ValueError(
                f"example: expected the model on the images' device, {example.device}; it has parameters on "
                + ", ".join(sorted(elsewhere))
            )
        self._lock = threading.Lock()
        self._device = example.device
        with torch.cuda.device(self._device), torch.inference_mode(False), torch.no_grad():
            # Strides too: a channels-last graph wants channels-last images.
            self._images = torch.empty_like(example, memory_format=torch.preserve_format).copy_(example)
            self._classes: Tensor | None = None
            self._graph = torch.cuda.CUDAGraph()
            self._done = torch.cuda.Event()
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                requested = parse_classes(classes, example.shape[0])
                if requested is not None:
                    logits = explainer(self._images).logits
                    self._class_count = logits.shape[1]
                    self._classes = classes_for(requested, logits).clone()
                for _ in range(_WARM_UPS):
                    explainer(self._images, self._classes).maps.sum()
            torch.cuda.current_stream().wait_stream(stream)
            # Other threads may go on using the GPU: only what this thread does is checked while capturing.
            with torch.cuda.graph(self._graph, capture_error_mode="thread_local"):
                self._explanation = explainer(self._images, self._classes)
                self._maps = self._explanation.maps
            self._done.record()

    def __call__(self, images: Tensor, classes: Any = None) -> Explanation:
        """Explain images.

        Args:
            images: of the example's shape, dtype and device; contiguous, channels last or whatever.
            classes: as in `Explainer.__call__`, for as many targets as were captured; None: those given to
                `Explainer.capture`, and where none were given the predicted ones.

        Returns:
            The explanation, in memory of its own.

        Raises:
            TypeError: images that are no floating point tensor, classes that are no integers.
            ValueError: images or classes that are not like the captured ones.
        """
        check_images(images)
        static = self._images
        if (images.shape, images.dtype, images.device) != (static.shape, static.dtype, static.device):
            raise ValueError(
                f"images: expected shape {tuple(static.shape)}, {static.dtype} on {static.device}, as captured; got "
                f"{tuple(images.shape)}, {images.dtype} on {images.device}"
            )
        chosen = self._chosen(classes)
        with self._lock, torch.cuda.device(self._device), torch.inference_mode(False), torch.no_grad():
            stream = torch.cuda.current_stream()
            # The call before may have been on another stream: its results are still being copied out.
            stream.wait_event(self._done)
            static.copy_(images, non_blocking=True)
            if chosen is not None:
                assert self._classes is not None
                self._classes.copy_(chosen, non_blocking=True)
            self._graph.replay()
            explanation = self._explanation.copied()
            self._done.record(stream)
        return explanation

    def _chosen(self, classes: Any) -> Tensor | None:
        requested = parse_classes(classes, self._images.shape[0])
        if requested is None:
            return None
        if self._classes is None:
            raise ValueError(
                "classes: this graph explains the predicted classes; to choose them at each call, give classes to "
                "capture() as well"
            )
        logits = self._images.new_empty(1).expand(self._images.shape[0], self._class_count)
        chosen = classes_for(requested, logits)
        if chosen.shape != self._classes.shape:
            raise ValueError(
                f"classes: expected as many as were captured, shape {tuple(self._classes.shape)}; got "
                f"{tuple(chosen.shape)}"
            )
        return chosen
