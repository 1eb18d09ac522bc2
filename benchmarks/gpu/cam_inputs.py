"""Inputs for `cam`, ours and its competitors on them, and the check of everybody's maps."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import diffcam_fast as dcf
from benchmarks.gpu.timing import Settings
from benchmarks.report import Row
from benchmarks.speed.measure import Candidate
from diffcam_fast.reference.cam import cam as reference_cam
from tests.tolerances import HALF_ERROR_RATIO, MAP_SHARE_OF_RANGE, PEER_SHARE_OF_RANGE

LAYOUTS = {"contiguous": torch.contiguous_format, "channels-last": torch.channels_last}
DTYPES = (torch.float32, torch.bfloat16)
OPTIONS = (True, "minmax", 1e-7)

#: Images whose float64 maps are computed at a time.
CHECKED_AT_A_TIME = 32


@dataclass(frozen=True)
class Kind:
    """A method on inputs of one shape, layout and dtype."""

    method: str
    shape: tuple[int, int, int, int]
    layout: str
    dtype: torch.dtype

    @property
    def bytes(self) -> int:
        """Of activations and gradients, each read once."""
        count = self.shape[0] * self.shape[1] * self.shape[2] * self.shape[3]
        return 2 * count * self.dtype.itemsize

    def columns(self) -> Row:
        """As columns of a row."""
        return {
            "method": self.method,
            "shape": "x".join(map(str, self.shape)),
            "layout": self.layout,
            "dtype": str(self.dtype).removeprefix("torch."),
            "bytes": self.bytes,
        }

    @property
    def label(self) -> str:
        """For a person."""
        return ", ".join(str(value) for key, value in self.columns().items() if key != "bytes")


class Inputs:
    """Copies of random activations and gradients, no two the same."""

    def __init__(self, kind: Kind, copies: int, settings: Settings) -> None:
        source = torch.Generator(settings.device).manual_seed(0)
        self.kind = kind

        def random() -> Tensor:
            return torch.randn(kind.shape, generator=source, device=settings.device)

        def laid_out(values: Tensor) -> Tensor:
            return values.to(kind.dtype).contiguous(memory_format=LAYOUTS[kind.layout])

        # Activations as a ReLU leaves them, but for zeros; gradients whose mean keeps maps off the zero of their ReLU.
        self.pairs = [(laid_out(random().square_().add_(0.01)), laid_out(random().add_(0.3))) for _ in range(copies)]
        # The reference takes gradients with a target dimension: given here, so that no competitor pays for it.
        self.canonical = [(activations, gradients.unsqueeze(1)) for activations, gradients in self.pairs]
        self._exact: Tensor | None = None

    def error(self, found: Tensor) -> float:
        """Of maps of copy 0 against the float64 reference, as a share of range."""
        if self._exact is None:
            chunks = zip(*(values.split(CHECKED_AT_A_TIME) for values in self.canonical[0]), strict=True)
            self._exact = torch.cat(
                [reference_cam(a.double(), g.double(), self.kind.method, *OPTIONS) for a, g in chunks]
            )
            if not (self._exact.amax((2, 3)) > 0.5).all():
                raise ValueError(
                    f"{self.kind.label}: these inputs give an empty map, and too much would pass for right"
                )
        return (found.double().reshape(self._exact.shape) - self._exact).abs().max().item()

    def ours(self) -> Candidate:
        """The op, whatever backend serves it."""
        tolerance = MAP_SHARE_OF_RANGE[torch.float32] + self._allowance()
        return Candidate(lambda copy: dcf.cam(*self.pairs[copy], self.kind.method), self.error, tolerance)

    def eager(self) -> Candidate:
        """The reference."""
        return self._competitor(reference_cam)

    def compiled(self) -> Candidate:
        """The reference under torch.compile with all it can tune, for exactly these inputs.

        Without its own graphs: those copy inputs that move, and no copy is timed here.
        """
        torch._dynamo.reset()
        fast = torch.compile(reference_cam, fullgraph=True, dynamic=False, mode="max-autotune-no-cudagraphs")
        return self._competitor(fast)

    def _competitor(self, function: Callable[..., Any]) -> Candidate:
        options = (self.kind.method, *OPTIONS)
        return Candidate(
            lambda copy: function(*self.canonical[copy], *options), self.error, PEER_SHARE_OF_RANGE + self._allowance()
        )

    def _allowance(self) -> float:
        """What half precision may err in addition: a multiple of what the reference itself errs in it."""
        if self.kind.dtype == torch.float32:
            return 0.0
        activations, gradients = self.canonical[0]
        return HALF_ERROR_RATIO * self.error(reference_cam(activations, gradients, self.kind.method, *OPTIONS))
