"""Each map loss against a computation of its own, written with loops, and its gradients in float64."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from scipy.ndimage import center_of_mass
from torch import Tensor

from diffcam_fast import cam
from diffcam_fast.robustness.fooling_losses import (
    ActiveLoss,
    CentreOfMassLoss,
    HoaxLoss,
    LocationLoss,
    MapLoss,
    TopKLoss,
    centre_of_mass,
)
from diffcam_fast.robustness.hoax import SalienceHoax

LABELS = torch.tensor([2, 0, 1, 2])
LOSSES = {
    "hoax": HoaxLoss(SalienceHoax((5, 4), math.log(12))),
    "location": LocationLoss(),
    "top-k": TopKLoss(0.15),
    "centre of mass": CentreOfMassLoss(),
    "active": ActiveLoss(2, 0),
}


def _maps(seed: int, targets: int = 1, size: tuple[int, int] = (5, 4)) -> Tensor:
    return torch.rand(4, targets, *size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_hoax_is_the_mean_squared_difference() -> None:
    maps = _maps(0)
    hoax = SalienceHoax((5, 4), math.log(12)).map.numpy()
    expected = [np.mean((each[0].numpy() - hoax) ** 2) for each in maps]
    np.testing.assert_allclose(LOSSES["hoax"](maps), expected, rtol=1e-12)
    reached = torch.from_numpy(hoax).expand(4, 1, 5, 4)
    assert LOSSES["hoax"](reached).tolist() == [0] * 4


def test_location_is_the_mean_squared_difference_from_a_frame() -> None:
    maps = _maps(0, size=(6, 5))
    for width in (1, 2):
        expected = []
        for each in maps[:, 0].tolist():
            total = 0.0
            for row, column in np.ndindex(6, 5):
                wanted = min(row, column, 5 - row, 4 - column) < width
                total += (each[row][column] - wanted) ** 2 / 30
            expected.append(total)
        np.testing.assert_allclose(LocationLoss(width)(maps), expected, rtol=1e-12)


def test_top_k_is_the_mean_square_where_the_original_was_largest() -> None:
    maps, original = _maps(0), _maps(1)
    expected = []
    for each, before in zip(maps.flatten(1).tolist(), original.flatten(1).tolist(), strict=True):
        largest = sorted(range(20), key=lambda position: -before[position])[:3]  # 15 % of 20
        expected.append(sum(each[position] ** 2 for position in largest) / 3)
    np.testing.assert_allclose(LOSSES["top-k"](maps, original), expected, rtol=1e-12)


def test_centre_of_mass_is_minus_the_distance_along_rows_and_columns() -> None:
    maps, original = _maps(0), _maps(1)
    expected = []
    for each, before in zip(maps[:, 0].numpy(), original[:, 0].numpy(), strict=True):
        there, here = center_of_mass(each), center_of_mass(before)
        expected.append(-(abs(there[0] - here[0]) / 5 + abs(there[1] - here[1]) / 4))
    np.testing.assert_allclose(LOSSES["centre of mass"](maps, original), expected, rtol=1e-6)


def test_where_the_centre_of_mass_is() -> None:
    corner = torch.zeros(5, 4)
    corner[4, 0] = 0.5
    expected = torch.tensor([[0.9, 0.125], [0.5, 0.5]])  # of a corner; of nothing
    torch.testing.assert_close(centre_of_mass(torch.stack([corner, torch.zeros(5, 4)])), expected)


def test_active_exchanges_two_classes_maps() -> None:
    maps, original = _maps(0, targets=2), _maps(1, targets=2)
    expected = []
    for (first, second), (first_before, second_before) in zip(maps.numpy(), original.numpy(), strict=True):
        expected.append((np.mean((first - second_before) ** 2) + np.mean((first_before - second) ** 2)) / 2)
    np.testing.assert_allclose(LOSSES["active"](maps, original), expected, rtol=1e-12)
    assert LOSSES["active"].classes(LABELS).tolist() == [[2, 0]] * 4
    assert LOSSES["active"].counts(LABELS).tolist() == [True, True, False, True]
    assert LOSSES["active"](original.flip(1), original).tolist() == [0] * 4


@pytest.mark.parametrize("name", ["hoax", "location", "top-k", "centre of mass"])
def test_other_losses_attack_every_image_by_its_label(name: str) -> None:
    assert LOSSES[name].classes(LABELS).tolist() == [[2], [0], [1], [2]]
    assert LOSSES[name].counts(LABELS).all()
    assert LOSSES[name].needs_original is (name in ("top-k", "centre of mass"))


@pytest.mark.parametrize("method", ["gradcam", "gradcam++", "xgradcam", "hirescam", "layercam", "elementwise"])
@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
def test_gradients_through_cam(loss: MapLoss, method: str) -> None:
    generator = torch.Generator().manual_seed(3)
    targets = loss.classes(LABELS).shape[1]
    # Positive, so that no map is empty.
    activations = torch.rand(4, 3, 5, 4, generator=generator, dtype=torch.float64).requires_grad_()
    gradients = torch.rand(4, targets, 3, 5, 4, generator=generator, dtype=torch.float64) - 0.3
    gradients.requires_grad_()
    original = _maps(1, targets)

    def attack(activations: Tensor, gradients: Tensor) -> Tensor:
        return loss(cam(activations, gradients, method), original)

    assert attack(activations, gradients).shape == (4,)
    assert torch.autograd.gradcheck(attack, (activations, gradients))


def test_what_is_compared_with_gets_no_gradient() -> None:
    original = _maps(1).requires_grad_()
    for name in ("top-k", "centre of mass"):
        assert not LOSSES[name](_maps(0), original).requires_grad


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: HoaxLoss((7, 7)), TypeError, "hoax: expected a SalienceHoax; got tuple"),
        (lambda: LocationLoss(0), ValueError, "width: expected at least 1; got 0"),
        (lambda: LocationLoss(1.0), TypeError, "width: expected an integer; got float"),
        (
            lambda: LocationLoss(2)(_maps(0)),
            ValueError,
            "maps: expected more than 4 positions a side.*frame of width 2",
        ),
        (lambda: TopKLoss(0), ValueError, "fraction: expected a number above 0 and up to 1; got 0"),
        (lambda: TopKLoss(True), TypeError, "fraction: expected a number; got bool"),
        (lambda: ActiveLoss(1, 1), ValueError, "second: expected another class than first, 1; got 1"),
        (lambda: ActiveLoss(-1, 1), ValueError, "first: expected the index of a class; got -1"),
        (lambda: ActiveLoss(0, "dog"), TypeError, "second: expected an integer; got str"),
        (lambda: LOSSES["hoax"](_maps(0, size=(4, 5))), ValueError, r"maps: expected the size of the hoax, \(5, 4\)"),
        (lambda: LOSSES["hoax"](_maps(0)[:, 0]), ValueError, r"maps: expected a tensor \(N, T, H, W\)"),
        (lambda: LOSSES["location"](None), ValueError, r"maps: expected a tensor \(N, T, H, W\).*got NoneType"),
        (lambda: LOSSES["top-k"](_maps(0)), ValueError, "original: expected the maps of the network before"),
        (lambda: LOSSES["top-k"](_maps(0), _maps(0, 2)), ValueError, r"original: expected the shape of maps, \(4, 1"),
        (lambda: LOSSES["active"](_maps(0), _maps(0)), ValueError, "maps: expected those of two classes"),
    ],
)
def test_bad_input(make: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make()
