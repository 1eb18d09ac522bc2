"""The hoax: its ones, its entropy and its symmetry; and the entropy of maps."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from scipy.stats import entropy
from torch import Tensor

from diffcam_fast.robustness.hoax import SalienceHoax, map_entropy

SEVEN = """
1111111
1100011
1000001
1000001
1000001
1100011
1111111
"""


def _picture(text: str) -> Tensor:
    return torch.tensor([[float(digit) for digit in row] for row in text.split()])


def test_the_known_case() -> None:
    hoax = SalienceHoax((7, 7), math.log(28))
    assert torch.equal(hoax.map, _picture(SEVEN))
    assert (hoax.count, hoax.size) == (28, (7, 7))
    assert hoax.entropy == pytest.approx(3.33, abs=0.005)
    assert map_entropy(hoax.map).item() == pytest.approx(math.log(28), abs=1e-6)


@pytest.mark.parametrize("size", [(4, 4), (7, 7), (8, 8), (3, 9), (14, 11), (1, 6), (2, 2)])
def test_every_entropy_is_met_by_the_nearest_number_of_ones(size: tuple[int, int]) -> None:
    positions = math.prod(size)
    for count in range(1, positions):
        for wanted in (math.log(count), math.log(count + 0.4), math.log(count - 0.4)):
            if wanted >= 0:
                hoax = SalienceHoax(size, wanted)
                assert hoax.count == count
                assert hoax.map.sum().item() == count
                assert set(hoax.map.unique().tolist()) <= {0.0, 1.0}
    uniform = SalienceHoax(size, math.log(positions))
    assert uniform.count == positions - 1  # a constant map has no normalised form


@pytest.mark.parametrize("size", [(4, 4), (7, 7), (9, 6)])
def test_more_ones_never_take_away_others_and_rings_fill_from_the_border(size: tuple[int, int]) -> None:
    before = torch.zeros(size)
    height, width = size
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    depth = torch.stack([rows, columns, height - 1 - rows, width - 1 - columns]).amin(0)
    for count in range(1, height * width):
        found = SalienceHoax(size, math.log(count)).map
        assert bool((found >= before).all())
        assert depth[found == 0].min() >= depth[found == 1].max()
        before = found


def test_without_an_entropy_it_is_the_border_ring() -> None:
    hoax = SalienceHoax((5, 8))
    expected = torch.ones(5, 8)
    expected[1:-1, 1:-1] = 0
    assert torch.equal(hoax.map, expected)


@pytest.mark.parametrize("count", [2, 4, 6, 8, 12, 14, 16, 20, 28])
def test_an_even_number_of_ones_is_symmetric_under_half_a_turn(count: int) -> None:
    found = SalienceHoax((8, 8), math.log(count)).map
    assert torch.equal(found, found.flip(0, 1))


@pytest.mark.parametrize("count", [4, 12, 20, 24, 28])
def test_a_7x7_hoax_is_symmetric_in_every_way_where_the_count_allows(count: int) -> None:
    found = SalienceHoax((7, 7), math.log(count)).map
    for other in (found.flip(0), found.flip(1), found.T):
        assert torch.equal(found, other)


def test_fewer_ones_than_a_ring_leave_the_middle_of_the_sides_open() -> None:
    found = SalienceHoax((8, 8), math.log(20)).map
    assert found[0].tolist() == [1, 1, 1, 0, 0, 1, 1, 1]
    assert found[3].tolist() == [0] * 8


def test_like_takes_size_and_mean_entropy_from_maps() -> None:
    first, second = torch.zeros(6, 6), torch.zeros(6, 6)
    first[2, 1:5] = 1
    second.view(-1)[:9] = 0.3
    hoax = SalienceHoax.like(torch.stack([first, second, torch.zeros(6, 6)])[:, None])
    assert hoax.size == (6, 6)
    assert hoax.count == 6  # exp((ln 4 + ln 9) / 2)


def test_the_map_is_new_each_time() -> None:
    hoax = SalienceHoax((4, 4))
    hoax.map.zero_()
    assert hoax.map.sum() == 12
    assert repr(hoax) == "SalienceHoax(size=(4, 4), count=12, entropy=2.485)"


def test_entropy_against_scipy() -> None:
    maps = torch.rand(3, 2, 5, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    maps[0, 0, :3] = 0
    found = map_entropy(maps)
    assert found.shape == (3, 2)
    for image in range(3):
        for target in range(2):
            assert found[image, target].item() == pytest.approx(float(entropy(maps[image, target].flatten())), 1e-12)
    torch.testing.assert_close(map_entropy(maps * 1e-30), found)
    assert map_entropy(maps.half()).dtype == torch.float32


def test_entropy_of_large_values_and_of_nothing() -> None:
    assert map_entropy(torch.full((4, 4), 3e38)).item() == pytest.approx(math.log(16))
    assert map_entropy(torch.zeros(2, 3, 3)).isnan().all()
    assert map_entropy(torch.zeros(0, 3, 3)).shape == (0,)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: SalienceHoax(7), TypeError, "size: expected a tuple of integers; got 7"),
        (lambda: SalienceHoax((7, 7.0)), TypeError, "size: expected a tuple of integers"),
        (lambda: SalienceHoax((7,)), ValueError, r"size: expected \(height, width\)"),
        (lambda: SalienceHoax((1, 1)), ValueError, r"size: expected \(height, width\) of two positions"),
        (lambda: SalienceHoax((0, 7)), ValueError, "size: expected one to three positive integers"),
        (lambda: SalienceHoax((7, 7), 4.0), ValueError, r"entropy: expected 0 to ln 49 = 3.8918 nats.*got 4.0"),
        (lambda: SalienceHoax((7, 7), -0.1), ValueError, "entropy: expected 0 to ln 49"),
        (lambda: SalienceHoax((7, 7), math.nan), ValueError, "entropy: expected a finite number; got nan"),
        (lambda: SalienceHoax((7, 7), "high"), TypeError, "entropy: expected a number; got str"),
        (lambda: SalienceHoax.like(torch.zeros(2, 3, 3)), ValueError, "maps: expected at least one map"),
        (lambda: map_entropy([[1.0]]), TypeError, "maps: expected a torch.Tensor; got list"),
        (lambda: map_entropy(torch.ones(3, 3, dtype=torch.int64)), TypeError, "maps: expected a floating point"),
        (lambda: map_entropy(torch.ones(3)), ValueError, r"maps: expected shape \(..., H, W\)"),
        (lambda: map_entropy(-torch.ones(3, 3)), ValueError, "maps: expected no negative values"),
    ],
)
def test_bad_input(make: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make()
