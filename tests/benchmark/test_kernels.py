"""The op against the read ceiling, as `diffcam bench` measures it."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch

import diffcam_fast
from diffcam_fast.benchmark import kernels
from diffcam_fast.benchmark.measure import Timing, WrongResult, threads


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    with threads(1):
        yield


DEVICES = [
    "cpu",
    pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")),
]


@pytest.mark.parametrize("device", DEVICES)
def test_quick_run(device: str) -> None:
    found = kernels.run(torch.device(device), quick=True)
    assert [(row["layout"], row["dtype"]) for row in found.rows] == [
        (layout, dtype) for dtype in ("float32", "bfloat16") for layout in ("contiguous", "channels-last")
    ]
    for row in found.rows:
        size = 4 if row["dtype"] == "float32" else 2
        assert row["bytes"] == 2 * size * 2048 * 49
        assert row["gb_per_s"] == pytest.approx(row["bytes"] / (row["ms"] * 1e6))
        assert row["share_of_read"] > 0 and row["ceiling_gb_per_s"] > 0
        assert row["error"] <= kernels.TOLERANCES[getattr(torch, row["dtype"])]


def test_what_is_read_is_compared_round_by_round() -> None:
    """A machine that is twice as fast from some round on makes neither share nor reader faster."""
    inputs = SimpleNamespace(bytes=4e9)
    ceiling = SimpleNamespace(bytes_per_call=1e9)
    mine, read = Timing.of([8.0, 8.0, 8.0, 4.0, 4.0]), Timing.of([1.0, 1.0, 0.5, 0.5, 0.5])
    row = kernels.columns(inputs, mine, ceiling, read)
    assert row["gb_per_s"] == 0.5 and row["ceiling_gb_per_s"] == 2
    assert row["share_of_read"] == 0.5
    assert "share_of_read" not in kernels.columns(inputs, mine, ceiling, None)


def test_a_wrong_kernel_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    right = diffcam_fast.cam
    monkeypatch.setattr(diffcam_fast, "cam", lambda *arguments: 1.001 * right(*arguments))
    with pytest.raises(WrongResult, match=r"1x2048x7x7, contiguous, float32: ours: error 0\.00"):
        kernels.run(torch.device("cpu"), quick=True)
