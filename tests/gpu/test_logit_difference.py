"""`logit_difference` on a GPU, every backend, against the float64 reference on the CPU."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import diffcam_fast as dcf
from diffcam_fast.reference.logit_difference import BASELINES, TEMPERED
from diffcam_fast.reference.logit_difference import logit_difference as reference
from tests.gpu.cases import (
    BACKENDS,
    DEVICE,
    DTYPES,
    KERNELS,
    Failures,
    each,
    forced,
    generator,
    largest,
    need_gpu,
    poisoned_memory,
)
from tests.tolerances import LOGIT_DIFFERENCE

OP = torch.ops.diffcam_fast.logit_difference.default

NAMES = ("delta", "cotangent", "rivals", "differences")


def _embedded(values: Tensor) -> Tensor:
    """Every second element of a larger tensor whose other elements are NaN."""
    wide = values.new_full([2 * size for size in values.shape], math.nan)
    return wide[::2, ::2].copy_(values)


def _with_margin(values: Tensor) -> Tensor:
    """Side by side, each image's logits behind a NaN and before another; most rows start off any alignment."""
    wide = values.new_full((values.shape[0], values.shape[1] + 2), math.nan)
    return wide[:, 1:-1].copy_(values)


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda values: values.contiguous(),
    "transposed": lambda values: values.t().contiguous().t(),
    "strided": _embedded,
    "margin": _with_margin,
    "expanded": lambda values: values[:1].expand_as(values),
}

#: Images, classes, targets.
SIZES = ((3, 2, 1), (4, 7, 2), (2, 17, 3), (3, 130, 1), (5, 1000, 2), (1, 1001, 5), (2, 21841, 1), (300, 33, 1))


def canonical(
    baseline: str,
    top_k: int | None = None,
    temperature: float = 1.0,
    alpha: float = 1.0,
    ranks: tuple[int, ...] = (1, 2, 3),
) -> tuple[Any, ...]:
    """The op's arguments after logits and classes."""
    return baseline, top_k or 0, temperature, alpha, list(ranks) if baseline == "finer" else []


def options(baseline: str, count: int) -> list[dict[str, Any]]:
    """Every kind of option of a baseline, for so many classes."""
    most = count - 1
    if baseline == "finer":
        return [
            {"ranks": (1,)},
            {"ranks": tuple(sorted({most, 1})), "alpha": 0.6},
            {"ranks": tuple(range(1, most + 1)[:5])},
        ]
    found: list[dict[str, Any]] = [{"top_k": k} for k in sorted({1, min(5, most), most // 2 + 1, most})]
    if baseline in TEMPERED:
        found += [{"temperature": 0.5}, {"temperature": 3.0, "top_k": min(5, most)}]
    return [{}, *found]


def _coarse(images: int, count: int, seed: int) -> Tensor:
    """Multiples of 1/4 up to 15: exact in every dtype, as are their differences, and rich in ties."""
    return torch.randint(-60, 61, (images, count), generator=generator(seed)) / 4.0


def _allowed(logits: Tensor, temperature: float = 1.0, alpha: float = 1.0, **_: Any) -> float:
    """What the tolerance for logits of order 10 means for these, and these options."""
    exact = logits.double()
    size = (exact.amax() - exact.amin() if alpha == 1 else exact.abs().amax()).item()
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    return 2 * LOGIT_DIFFERENCE[dtype] * max(1.0, size / 10) * max(1.0, 1 / temperature)


def _compare(
    failures: Failures, found: tuple[Tensor, ...], logits: Tensor, classes: Tensor, option: dict[str, Any], what: str
) -> None:
    """Compare all four results with the float64 reference of logits on the CPU."""
    expected = reference(logits.double(), classes, *canonical(**option))
    # Sums over a hundred thousand classes round more often.
    allowed = _allowed(logits, **option) * (10 if logits.shape[1] > 50_000 else 1)
    for name, got, want in zip(NAMES, found, expected, strict=True):
        failures.check(got.shape == want.shape, f"{what}: {name}: shape {tuple(got.shape)}")
        failures.check(got.is_contiguous(), f"{what}: {name}: not contiguous")
        if got.shape != want.shape:
            continue
        if name == "rivals":
            failures.same(got, want, f"{what}: rivals")
        else:
            failures.at_most(largest(got.cpu().double() - want), allowed, f"{what}: {name}")


@each(backend=BACKENDS, baseline=BASELINES, dtype=DTYPES)
def test_agrees_with_float64_reference(backend: str, baseline: str, dtype: torch.dtype) -> None:
    failures = Failures()
    layouts = list(LAYOUTS)
    with forced(backend), poisoned_memory(), torch.no_grad():
        for index, (images, count, targets) in enumerate(SIZES):
            classes = torch.randint(0, count, (images, targets), generator=generator(index))
            for turn, chosen in enumerate(options(baseline, count)):
                option = {"baseline": baseline, **chosen}
                layout = layouts[(index + turn) % len(layouts)]
                logits = LAYOUTS[layout](_coarse(images, count, index).to(dtype).to(DEVICE))
                found = OP(logits, classes.to(DEVICE), *canonical(**option))
                _compare(
                    failures, found, logits.cpu(), classes, option, f"{images}x{count}, {targets}, {layout}, {option}"
                )
    failures.report()


@each(backend=BACKENDS, baseline=BASELINES, count=(1000, 50257, 262144))
def test_many_classes(backend: str, baseline: str, count: int) -> None:
    failures = Failures()
    with forced(backend), poisoned_memory(), torch.no_grad():
        for dtype in (torch.float32, torch.bfloat16):
            # finer orders classes by a difference, which must be exact to be ordered alike in every precision.
            logits = _coarse(2, count, 1) if baseline == "finer" else 3 * torch.randn(2, count, generator=generator(1))
            logits = logits.to(dtype)
            classes = torch.stack([logits.argmax(-1), logits.argmin(-1)], 1)
            for chosen in (
                ({}, {"ranks": (1, 2, 3, 300)}) if baseline == "finer" else ({}, {"top_k": 5}, {"top_k": 700})
            ):
                option = {"baseline": baseline, **chosen}
                found = OP(logits.to(DEVICE), classes.to(DEVICE), *canonical(**option))
                _compare(failures, found, logits, classes, option, f"{dtype}, {option}")
    failures.report()


@each(backend=BACKENDS, shift=(0.0, 5000.0, -5000.0))
def test_cotangents_sum_to_zero_whatever_is_added_to_all_logits(backend: str, shift: float) -> None:
    failures = Failures()
    with forced(backend), torch.no_grad():
        for dtype, tolerance in LOGIT_DIFFERENCE.items():
            logits = (3 * torch.randn(6, 37, generator=generator(0), dtype=torch.float64) + shift).to(dtype)
            classes = torch.arange(6).unsqueeze(1)
            for baseline in BASELINES[:-1]:
                cotangent = OP(logits.to(DEVICE), classes.to(DEVICE), *canonical(baseline))[1]
                failures.at_most(largest(cotangent.sum(-1)), 4 * tolerance, f"{baseline}, {dtype}: sum")
                expected = reference(logits.double(), classes, *canonical(baseline))[1]
                failures.at_most(largest(cotangent.cpu().double() - expected), 10 * tolerance, f"{baseline}, {dtype}")
    failures.report()


@each(backend=BACKENDS)
def test_same_bits_from_run_to_run(backend: str) -> None:
    failures = Failures()
    with forced(backend), torch.no_grad():
        for images, count in ((37, 1000), (2, 100_003)):
            logits = (3 * torch.randn(images, count, generator=generator(2))).to(DEVICE)
            classes = torch.randint(0, count, (images, 2), generator=generator(3)).to(DEVICE)
            for baseline in BASELINES:
                for chosen in ({},) if baseline == "finer" else ({}, {"top_k": 7}):
                    arguments = canonical(baseline, **chosen)
                    first = OP(logits, classes, *arguments)
                    for _ in range(10):
                        torch.full((1 << 16,), math.nan, device=DEVICE)
                        for name, one, other in zip(NAMES, first, OP(logits, classes, *arguments), strict=True):
                            failures.same(one, other, f"{images}x{count}, {arguments}: {name}")
    failures.report()


@each(backend=BACKENDS)
def test_ties_go_to_the_lower_index_and_a_class_is_never_its_own_rival(backend: str) -> None:
    failures = Failures()
    with forced(backend), torch.no_grad():
        logits = torch.tensor([[2.0, 5.0, 2.0, 5.0, 5.0, 2.0]], device=DEVICE)
        classes = torch.tensor([[3, 0, 5]], device=DEVICE)
        rivals = OP(logits, classes, *canonical("max", 5))[2].tolist()
        failures.check(rivals == [[[1, 4, 0, 2, 5], [1, 3, 4, 2, 5], [1, 3, 4, 0, 2]]], f"max: {rivals}")
        rivals = OP(logits, classes, *canonical("finer", ranks=(1, 2, 3, 4, 5)))[2].tolist()
        failures.check(rivals == [[[1, 4, 0, 2, 5], [2, 5, 1, 3, 4], [0, 2, 1, 3, 4]]], f"finer: {rivals}")
        same = torch.zeros(2, 5000, device=DEVICE)
        rivals = OP(same, torch.tensor([[3], [4999]], device=DEVICE), *canonical("logsumexp", 4))[2].tolist()
        failures.check(rivals == [[[0, 1, 2, 4]], [[0, 1, 2, 3]]], f"all the same: {rivals}")
    failures.report()


@each(backend=BACKENDS, baseline=BASELINES)
def test_non_finite_logits_stay_in_their_image(backend: str, baseline: str) -> None:
    failures = Failures()
    with forced(backend), torch.no_grad():
        classes = torch.tensor([[0, 5]] * 4)
        for poison in (math.nan, math.inf, -math.inf):
            for chosen in ({},) if baseline == "finer" else ({}, {"top_k": 4}):
                arguments = canonical(baseline, **chosen)
                logits = torch.randn(4, 1003, generator=generator(3)) * 3
                clean = OP(logits.to(DEVICE), classes.to(DEVICE), *arguments)
                logits[1, 700], logits[2, 5] = poison, poison
                found = OP(logits.to(DEVICE), classes.to(DEVICE), *arguments)
                for name, got, before in zip(NAMES, found, clean, strict=True):
                    failures.same(got[[0, 3]], before[[0, 3]], f"{poison}, {arguments}: {name} of other images")
                # Which numbers are left is the reference's choice: the results agree on what is finite.
                expected = reference(logits, classes, *arguments)
                for name, got, want in zip(NAMES, found, expected, strict=True):
                    failures.same(got.isfinite(), want.isfinite(), f"{poison}, {arguments}: {name}, what is finite")
    failures.report()


@each(backend=BACKENDS, baseline=BASELINES)
def test_edges(backend: str, baseline: str) -> None:
    failures = Failures()
    with forced(backend), torch.no_grad():
        for images, targets in ((0, 2), (3, 0), (0, 0)):
            classes = torch.zeros(images, targets, dtype=torch.int64, device=DEVICE)
            found = dcf.logit_difference(torch.rand(images, 5, device=DEVICE), classes, baseline=baseline)
            failures.check(found.delta.shape == (images, targets), f"delta {tuple(found.delta.shape)}")
            failures.check(found.cotangent.shape == (images, targets, 5), f"cotangent {tuple(found.cotangent.shape)}")
    failures.report()


@each(backend=KERNELS, baseline=BASELINES)
def test_a_class_out_of_range_on_the_device_is_told_by_nan(backend: str, baseline: str) -> None:
    """The documented answer where nobody may wait to check: NaN and rivals of -1, other targets as ever."""
    need_gpu()
    failures = Failures()
    with forced(backend), torch.no_grad():
        logits = torch.randn(3, 1000, generator=generator(7)).to(DEVICE)
        good = torch.tensor([[3, 7], [11, 2], [999, 0]], device=DEVICE)
        for chosen in ({},) if baseline == "finer" else ({}, {"top_k": 5}):
            arguments = canonical(baseline, **chosen)
            expected = OP(logits, good, *arguments)
            for wrong in (1000, -1, 2**40, -(2**40)):
                classes = good.clone()
                classes[1, 0] = wrong
                found = OP(logits, classes, *arguments)
                what = f"{arguments}, class {wrong}"
                for name, got in zip(NAMES, found, strict=True):
                    told = got[1, 0] == -1 if name == "rivals" else got[1, 0].isnan()
                    failures.check(bool(told.all()), f"{what}: {name} {got[1, 0].flatten()[:5].tolist()}")
                for name, got, want in zip(NAMES, found, expected, strict=True):
                    failures.same(got[[0, 2]], want[[0, 2]], f"{what}: {name} of other images")
                    failures.same(got[1, 1], want[1, 1], f"{what}: {name} of the other target")
    failures.report()


@each(backend=BACKENDS, baseline=BASELINES)
def test_gradcheck(backend: str, baseline: str) -> None:
    with forced(backend):
        logits = torch.randn(2, 4, generator=generator(0), dtype=torch.float64).to(DEVICE).requires_grad_()
        classes = torch.tensor([[0, 3], [2, 1]], device=DEVICE)
        ranks = (1, 2) if baseline == "finer" else (1, 2, 3)
        assert torch.autograd.gradcheck(
            lambda z: dcf.logit_difference(z, classes, baseline=baseline, ranks=ranks)[:2], logits
        )
