"""Which part of a photo a model sees, and how it is normalised."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from diffcam_fast.models import Preprocessing
from diffcam_fast.models.efficientnet_lite import LITE0_PREPROCESSING

Image = pytest.importorskip("PIL.Image")


def gradient(width, height):
    """A photo whose red tells the column and whose green tells the row."""
    columns = np.broadcast_to(np.linspace(0, 255, width), (height, width))
    rows = np.broadcast_to(np.linspace(0, 255, height)[:, None], (height, width))
    return Image.fromarray(np.stack([columns, rows, 0 * rows], 2).astype(np.uint8))


@pytest.mark.parametrize(
    ("photo", "size", "fraction", "expected"),
    [
        ((400, 400), (224, 224), 0.875, (25, 25, 375, 375)),
        ((800, 400), (224, 224), 0.875, (225, 25, 575, 375)),
        ((400, 800), (224, 224), 1.0, (0, 200, 400, 600)),
        ((400, 400), (100, 200), 1.0, (0, 100, 400, 300)),
    ],
)
def test_the_central_crop_keeps_the_inputs_aspect_ratio(photo, size, fraction, expected):
    box = Preprocessing(size=size, crop_fraction=fraction).box(*photo)
    assert box == pytest.approx(expected)


def test_stretching_shows_everything():
    assert Preprocessing().box(1234, 56, "stretch") == (0, 0, 1234, 56)


@pytest.mark.parametrize("interpolation", ["nearest", "bilinear", "bicubic", "lanczos"])
def test_the_pixels_come_from_the_box(interpolation):
    preprocessing = Preprocessing(size=(20, 40), crop_fraction=0.5, interpolation=interpolation)
    pixels = preprocessing.pixels(gradient(400, 200)).int()
    assert pixels.shape == (3, 20, 40)
    # The box runs from a quarter to three quarters of the photo in both directions.
    for channel in (pixels[0].float().mean(0), pixels[1].float().mean(1)):
        assert channel[0] == pytest.approx(0.25 * 255, abs=6)
        assert channel[-1] == pytest.approx(0.75 * 255, abs=6)


@pytest.mark.parametrize("size", [(1, 1), (1, 3000), (3000, 1), (2, 7)])
@pytest.mark.parametrize("fit", ["crop", "stretch"])
def test_photos_of_any_shape(size, fit):
    assert Preprocessing().pixels(gradient(*size), fit).shape == (3, 224, 224)


def test_lite0_sees_pixels_less_127_over_128():
    pixels = torch.tensor([0, 127, 255], dtype=torch.uint8).view(1, 3, 1, 1).expand(1, 3, 2, 2)
    expected = torch.tensor([-127 / 128, 0.0, 1.0])
    torch.testing.assert_close(LITE0_PREPROCESSING.normalize(pixels)[0, :, 0, 0], expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"size": (0, 224)}, "size"),
        ({"crop_fraction": 0.0}, "crop_fraction"),
        ({"crop_fraction": 1.5}, "crop_fraction"),
        ({"std": (1.0, 0.0, 1.0)}, "std"),
        ({"interpolation": "magic"}, "interpolation"),
    ],
)
def test_wrong_attributes(options, message):
    with pytest.raises(ValueError, match=message):
        Preprocessing(**options)


def test_an_unknown_fit():
    with pytest.raises(ValueError, match="fit: got 'squeeze'"):
        Preprocessing().box(10, 10, "squeeze")
