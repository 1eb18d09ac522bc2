"""Measures of agreement against SciPy, scikit-image and counting by hand."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from scipy.ndimage import correlate
from scipy.stats import pearsonr
from torch import Tensor

from diffcam_fast.robustness.agreement import pearson, rmse, ssim, top_overlap
from diffcam_fast.robustness.hoax import SalienceHoax
from diffcam_fast.robustness.structural_similarity import window_sigma
from tests.tolerances import MAP_SHARE_OF_RANGE

DOUBLE = MAP_SHARE_OF_RANGE[torch.float64]


def _maps(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _ssim_by_hand(first: np.ndarray, second: np.ndarray, sigma: float, data_range: float) -> float:
    reach = int(3.5 * sigma + 0.5)
    offsets = np.arange(-reach, reach + 1)
    line = np.exp(-(offsets**2) / (2 * sigma**2))
    window = np.outer(line, line) / line.sum() ** 2

    def mean(values: np.ndarray) -> np.ndarray:
        # "mirror" reflects without repeating the border
        return correlate(values, window, mode="mirror")

    a, b = mean(first), mean(second)
    variances = mean(first**2) - a**2, mean(second**2) - b**2
    covariance = mean(first * second) - a * b
    small, smaller = (0.01 * data_range) ** 2, (0.03 * data_range) ** 2
    numerator = (2 * a * b + small) * (2 * covariance + smaller)
    return float((numerator / ((a**2 + b**2 + small) * (sum(variances) + smaller))).mean())


@pytest.mark.parametrize(
    ("size", "sigma"), [((4, 4), 6 / 11), ((4, 9), 6 / 11), ((7, 7), 10.5 / 11), ((11, 14), 1.5), ((32, 32), 1.5)]
)
@pytest.mark.parametrize("data_range", [1.0, 2.5])
def test_ssim_by_hand(size: tuple[int, int], sigma: float, data_range: float) -> None:
    assert window_sigma(*size) == pytest.approx(sigma)
    first, second = _maps(3, 2, *size), _maps(3, 2, *size, seed=1)
    second = 0.7 * first + 0.3 * second
    found = ssim(first, second, data_range=data_range)
    assert found.shape == (3, 2)
    assert found.dtype == torch.float64
    for image in range(3):
        for target in range(2):
            expected = _ssim_by_hand(first[image, target].numpy(), second[image, target].numpy(), sigma, data_range)
            assert found[image, target].item() == pytest.approx(expected, abs=1e-10)


@pytest.mark.parametrize("size", [(2, 3), (4, 4), (7, 7), (7, 20), (32, 32)])
def test_ssim_against_torchmetrics(size: tuple[int, int]) -> None:
    pytest.importorskip("tests.helpers.torchvision_cpu")  # torchmetrics imports torchvision where it is installed
    image = pytest.importorskip("torchmetrics.functional.image")
    first, second = _maps(5, *size), _maps(5, *size, seed=1)
    sigma = window_sigma(*size)
    expected = image.structural_similarity_index_measure(
        first[:, None], second[:, None], sigma=sigma, data_range=1.0, reduction="none"
    )
    torch.testing.assert_close(ssim(first, second), expected, rtol=0, atol=DOUBLE)


def test_equal_maps_agree_fully_and_the_hoax_with_its_opposite_not_at_all() -> None:
    hoax = SalienceHoax((4, 4)).map
    assert ssim(hoax[None], hoax).item() == pytest.approx(1)
    assert ssim(hoax[None], 1 - hoax).item() < 0
    assert pearson(hoax[None], hoax).item() == pytest.approx(1)
    assert pearson(hoax[None], 1 - hoax).item() == pytest.approx(-1)
    assert rmse(hoax[None], 1 - hoax).item() == 1
    assert top_overlap(hoax[None], 1 - hoax, 4 / 16).item() == 0


def test_pearson_against_scipy() -> None:
    first, second = _maps(5, 3, 6, 4), _maps(5, 3, 6, 4, seed=1)
    found = pearson(first, second)
    assert found.shape == (5, 3)
    for index in np.ndindex(5, 3):
        assert found[index].item() == pytest.approx(pearsonr(first[index].ravel(), second[index].ravel()).statistic)
    torch.testing.assert_close(pearson(1e-30 * first, 1e20 * second + 3e19), found, rtol=1e-9, atol=0)


def test_pearson_of_a_constant_map_is_not_a_number() -> None:
    maps = _maps(2, 7, 7)
    constant = torch.full((7, 7), 0.1, dtype=torch.float64)  # whose mean is not exactly 0.1
    assert pearson(maps, constant).isnan().all()
    assert pearson(constant[None], maps).isnan().all()


def test_rmse_by_hand() -> None:
    first = torch.tensor([[[0.0, 1.0], [0.5, 0.25]]], dtype=torch.float64)
    second = torch.tensor([[[1.0, 1.0], [0.0, 0.25]]], dtype=torch.float64)
    assert rmse(first, second).tolist() == [pytest.approx(math.sqrt(1.25 / 4))]


def test_top_overlap_by_hand_with_ties_to_the_earlier_position() -> None:
    first = torch.tensor([[0.9, 0.8, 0.1, 0.1, 0.1]])
    second = torch.tensor([[0.9, 0.1, 0.8, 0.1, 0.1]])
    assert top_overlap(first, second, 0.4).item() == 0.5
    assert top_overlap(first, second, 0.6).item() == 1  # 0.1 at the third position before the later ones
    assert top_overlap(first, second, 0.1).item() == 1  # one position at least
    assert top_overlap(first, torch.zeros(1, 5), 1.0).item() == 1


@pytest.mark.parametrize("measure", [ssim, pearson, rmse, top_overlap])
def test_shapes_broadcasting_dtypes_and_empty_batches(measure: Any) -> None:
    first, second = _maps(4, 3, 7, 7), _maps(4, 3, 7, 7, seed=1)
    together = measure(first, second)
    assert together.shape == (4, 3)
    for image in range(4):
        alone = measure(first[image], second[image])
        assert (together[image] - alone).abs().max() <= DOUBLE
    one = measure(first, second[0, 0])
    assert (one - measure(first, second[0, 0].expand_as(first))).abs().max() <= DOUBLE
    assert measure(first, first.half()).dtype == torch.float32
    assert measure(first.half(), second.half()).dtype == torch.float32
    assert measure(torch.zeros(0, 7, 7), torch.zeros(0, 7, 7)).shape == (0,)


@pytest.mark.parametrize("measure", [ssim, pearson, rmse, top_overlap])
@pytest.mark.parametrize(
    ("first", "second", "error", "message"),
    [
        ([[1.0]], torch.zeros(1, 1), TypeError, "first: expected a torch.Tensor; got list"),
        (torch.zeros(2, 2), torch.zeros(2, 2, dtype=torch.int64), TypeError, "second: expected a floating point"),
        (torch.zeros(4), torch.zeros(4), ValueError, r"first: expected shape \(N, H, W\)"),
        (torch.zeros(2, 4, 4), torch.zeros(2, 4, 5), ValueError, r"second: expected maps of the size of first, \(4, 4"),
        (torch.zeros(2, 4, 4), torch.zeros(3, 4, 4), ValueError, "second: expected the shape of first"),
    ],
)
def test_bad_maps(measure: Any, first: Any, second: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        measure(first, second)


def test_bad_options() -> None:
    maps = torch.zeros(1, 4, 4)
    with pytest.raises(ValueError, match="data_range: expected a positive number; got 0"):
        ssim(maps, maps, data_range=0)
    with pytest.raises(TypeError, match="data_range: expected a number; got str"):
        ssim(maps, maps, data_range="1")
    with pytest.raises(ValueError, match="fraction: expected a number above 0 and up to 1; got 0"):
        top_overlap(maps, maps, 0)
    with pytest.raises(TypeError, match="fraction: expected a number; got NoneType"):
        top_overlap(maps, maps, None)
