"""The classes to explain: every form, and what is refused."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
import torch

from diffcam_fast.explain import Explainer
from tests.explain.networks import CLASSES, InPlaceAfter, make


@pytest.mark.parametrize(
    "classes",
    [
        3,
        np.int32(3),
        torch.tensor(3),
        [3, 3],
        (3, 3),
        [[3], [3]],
        np.array([3, 3], dtype=np.uint8),
        torch.tensor([3, 3], dtype=torch.int16),
        torch.tensor([[3], [3]]),
    ],
    ids=str,
)
def test_forms(classes: Any) -> None:
    network = make(InPlaceAfter)
    images = network.images()
    explanation = Explainer(network, "layer")(images, classes)
    assert explanation.classes.tolist() == [[3], [3]]
    assert explanation.classes.dtype == torch.int64


def test_the_prediction_is_the_default() -> None:
    network = make(InPlaceAfter)
    images = network.images(4)
    assert torch.equal(Explainer(network, "layer")(images).classes, network(images).argmax(1, keepdim=True))


@pytest.mark.parametrize(
    ("classes", "error", "message"),
    [
        (1.0, TypeError, "classes: expected integers; got float"),
        ("cat", TypeError, "classes: expected integers; got str"),
        (True, TypeError, "classes: expected integers; got bool"),
        (torch.tensor([1.0, 2.0]), TypeError, "classes: expected integers; got torch.float32"),
        (torch.tensor([True, False]), TypeError, "classes: expected integers; got torch.bool"),
        ([1, 2, 3], ValueError, r"integers of shape \(2,\) or \(2, T\) for 2 images; got shape \(3,\)"),
        ([[1, 2]], ValueError, r"got shape \(1, 2\)"),
        ([[], []], ValueError, r"got shape \(2, 0\)"),
        ([[1], [1, 2]], ValueError, "rows of different lengths"),
        (CLASSES, ValueError, "classes: expected indices from 0 to 4 for 5 classes; got 5 to 5"),
        ([0, -1], ValueError, "got -1 to 0"),
    ],
    ids=str,
)
def test_errors(classes: Any, error: type[Exception], message: str) -> None:
    network = make(InPlaceAfter)
    with pytest.raises(error, match=message):
        Explainer(network, "layer")(network.images(), classes)


def test_several_classes_of_one_image_need_two_brackets() -> None:
    network = make(InPlaceAfter)
    with pytest.raises(ValueError, match=re.escape("are [[a, b]]")):
        Explainer(network, "layer")(network.images(1), [1, 2])
