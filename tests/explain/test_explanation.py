"""What is made of layer maps when asked: resizing, fusing, overlays, arrays."""

from __future__ import annotations

from unittest import mock

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional

import diffcam_fast as dcf
from diffcam_fast.explain import Explainer, Explanation, explanation, finishing
from tests.explain.networks import Branches, Signal, make
from tests.tolerances import MAP_SHARE_OF_RANGE, PIXEL


def _explanation(*layers: Tensor, size: tuple[int, ...] | None = None, normalize: str | None = "minmax") -> Explanation:
    count, targets = layers[0].shape[:2]
    return Explanation(
        {str(index): maps for index, maps in enumerate(layers)},
        torch.zeros(count, 5),
        torch.zeros(count, targets, dtype=torch.int64),
        None,
        torch.zeros(count, targets),
        size=size,
        normalize=normalize,
    )


def _normalized(maps: Tensor) -> Tensor:
    low, high = maps.amin((2, 3), keepdim=True), maps.amax((2, 3), keepdim=True)
    return (maps - low) / (high - low + 1e-7)


def test_maps_of_the_right_size_are_handed_out_as_they_are() -> None:
    maps = torch.rand(2, 3, 4, 5)
    assert _explanation(maps).maps is maps
    assert _explanation(maps, size=(4, 5)).maps is maps


def test_resized_maps_span_their_range_again() -> None:
    maps = torch.rand(2, 3, 4, 5)
    expected = _normalized(functional.interpolate(maps, (9, 8), mode="bilinear", align_corners=False))
    found = _explanation(maps, size=(9, 8))
    torch.testing.assert_close(found.maps, expected)
    torch.testing.assert_close(found.resized([9, 8]), expected)
    assert found.resized((4, 5)) is maps


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize(
    ("old", "new"),
    [((7, 7), (224, 224)), ((1, 9), (30, 4)), ((5, 2), (5, 9)), ((32, 32), (40, 8)), ((33, 4), (50, 50))],
    ids=str,
)
def test_resizing_agrees_with_pytorch(
    old: tuple[int, int], new: tuple[int, int], count: int, dtype: torch.dtype
) -> None:
    maps = _normalized(torch.rand(count, 1, *old, dtype=dtype))
    expected = _normalized(functional.interpolate(maps.double(), new, mode="bilinear", align_corners=False))
    found = _explanation(maps, size=new).maps
    assert found.dtype == dtype
    assert (found - expected).abs().amax() <= MAP_SHARE_OF_RANGE[dtype]


def test_resizing_keeps_all_digits_whatever_products_are_rounded_to() -> None:
    maps = _normalized(torch.rand(8, 1, 32, 32))
    found = _explanation(maps, size=(256, 256))
    expected = found.maps
    with torch.autocast("cpu", torch.bfloat16):
        assert (found.resized((256, 256)) - expected).abs().amax() <= MAP_SHARE_OF_RANGE[torch.float32]
    with torch.device("meta"):
        assert found.resized((250, 240)).device == maps.device
    # Whether a product of these shapes would be rounded is for the processor to say.
    products = mock.patch.object(finishing, "_enlarged", wraps=finishing._enlarged)
    before = torch.backends.mkldnn.matmul.fp32_precision
    for precision, count in (("bf16", 0), ("tf32", 0), ("ieee", 1)):
        torch.backends.mkldnn.matmul.fp32_precision = precision
        try:
            with products as enlarged:
                assert (found.resized((256, 256)) - expected).abs().amax() <= MAP_SHARE_OF_RANGE[torch.float32]
        finally:
            torch.backends.mkldnn.matmul.fp32_precision = before
        assert enlarged.call_count == count


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("normalize", ["minmax", "max", None])
def test_resizing_maps_that_are_not_finite(value: float, normalize: str | None) -> None:
    maps = torch.rand(2, 1, 4, 4)
    maps[0, 0, 3, 3] = value
    found = _explanation(maps, size=(12, 12), normalize=normalize).maps
    assert not found[0].isfinite().all()
    assert found[1].isfinite().all()
    if normalize is None:
        assert found[0, 0, 0, 0] == maps[0, 0, 0, 0]


def test_raw_maps_are_only_resized() -> None:
    maps = torch.randn(2, 3, 4, 5)
    expected = functional.interpolate(maps, (9, 8), mode="bilinear", align_corners=False)
    torch.testing.assert_close(_explanation(maps, size=(9, 8), normalize=None).maps, expected)


def test_several_layers_are_averaged_at_the_largest_size() -> None:
    large, small = torch.rand(2, 3, 6, 5), torch.rand(2, 3, 2, 3)
    enlarged = _normalized(functional.interpolate(small, (6, 5), mode="bilinear", align_corners=False))
    torch.testing.assert_close(_explanation(small, large).maps, _normalized((large + enlarged) / 2))


@pytest.mark.parametrize("size", [(7,), (5, 6), (4, 5, 6)])
def test_any_number_of_dimensions(size: tuple[int, ...]) -> None:
    maps = torch.rand(2, 3, *(2 for _ in size))
    assert _explanation(maps, size=size).maps.shape == (2, 3, *size)


def test_constant_maps_become_zeros() -> None:
    assert torch.equal(_explanation(torch.ones(1, 1, 2, 2), size=(4, 4)).maps, torch.zeros(1, 1, 4, 4))


def test_maps_are_computed_once_and_only_when_asked() -> None:
    network = make(Branches)
    with mock.patch.object(explanation, "resized", wraps=finishing.resized) as resize:
        found = Explainer(network, "left")(network.images())
        assert resize.call_count == 0
        assert found.maps is found.maps
        assert resize.call_count == 1


def test_sizes_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match=r"size: expected 2 lengths for maps of shape \(1, 1, 2, 2\); got \(3,\)"):
        _explanation(torch.rand(1, 1, 2, 2)).resized((3,))
    with pytest.raises(TypeError, match="size: expected a tuple of integers"):
        _explanation(torch.rand(1, 1, 2, 2)).resized((3.0, 3.0))


def test_overlay() -> None:
    network = make(Branches, torch.float32)
    images = network.images(2, torch.float32).sigmoid()
    found = Explainer(network, "left")(images, [[0, 1, 2]] * 2)
    overlay = found.overlay(images, colormap="hot", opacity=0.3)
    assert overlay.shape == (2, 3, 12, 10, 3)
    assert overlay.dtype == torch.uint8
    resized_before = dcf.overlay(found.maps, images, colormap="hot", opacity=0.3, normalize=None)
    assert (overlay.int() - resized_before.int()).abs().max() <= PIXEL
    assert not torch.equal(overlay, found.overlay(images))
    assert found.overlay(images.repeat(1, 1, 2, 3)).shape == (2, 3, 24, 30, 3)


def test_overlay_of_several_layers_shows_their_fused_maps() -> None:
    layers = torch.rand(2, 1, 3, 3), torch.rand(2, 1, 6, 8)
    found, images = _explanation(*layers, size=(12, 16)), torch.rand(2, 3, 12, 16)
    assert torch.equal(found.overlay(images), dcf.overlay(found.maps, images))


def test_overlay_needs_maps_with_two_spatial_dimensions() -> None:
    with pytest.raises(ValueError, match=r"maps: expected two spatial dimensions.*got \(2, 1, 6\)"):
        _explanation(torch.rand(2, 1, 6)).overlay(torch.rand(2, 3, 1, 6))


def test_arrays() -> None:
    network = make(Signal, torch.float32)
    found = Explainer(network, "layer")(network.images(2, torch.float32))
    array = found.numpy()
    assert isinstance(array, np.ndarray)
    assert array.dtype == np.float32
    np.testing.assert_array_equal(array, found.maps.numpy())


def test_repr_is_short() -> None:
    assert repr(_explanation(torch.rand(2, 3, 4, 5))) == "Explanation(images=2, targets=3, size=(4, 5), layers=('0',))"


def test_copies_have_memory_of_their_own() -> None:
    for size in (None, (9, 8)):
        found = _explanation(torch.rand(2, 3, 4, 5), size=size)
        maps = found.maps
        copied = found.copied()
        assert torch.equal(copied.maps, maps)
        assert copied.maps.data_ptr() != maps.data_ptr()
        assert "maps" not in _explanation(torch.rand(2, 3, 4, 5), size=size).copied().__dict__
        for name in ("logits", "classes", "delta"):
            assert getattr(copied, name).data_ptr() != getattr(found, name).data_ptr()
        found.layer_maps["0"].zero_()
        assert copied.layer_maps["0"].amax() > 0
