"""`compat.quantus.explain` as Quantus's explanation function."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import diffcam_fast as dcf
from diffcam_fast.compat.quantus import explain
from tests.compat.networks import Flat, Pooled, Volume, images, make
from tests.tolerances import COMPAT_SHARE_OF_RANGE

LABELS = np.array([4, 0, 6])


def expected(model: nn.Module, **options: Any) -> np.ndarray:
    return dcf.Explainer(model, **options)(images(type(model)), LABELS).maps.numpy()


@pytest.mark.parametrize("options", ({}, {"layers": "early", "method": "layercam", "target": dcf.Logit()}))
def test_arrays_and_tensors(options: dict[str, Any]) -> None:
    model, x = make(Flat), images(Flat)
    reference = expected(model, **options)
    for inputs in (
        x.numpy(),
        x,
        x.double().numpy(),
        x.numpy().transpose(0, 2, 3, 1),
        x.movedim(1, -1).requires_grad_(),
    ):
        for targets in (LABELS, torch.from_numpy(LABELS), LABELS.tolist(), LABELS[:, None], LABELS.astype(np.uint8)):
            found = explain(model, inputs, targets, **options)
            assert isinstance(found, np.ndarray) and found.dtype == np.float32 and found.shape == (3, 1, 12, 10)
            assert np.abs(found - reference).max() <= COMPAT_SHARE_OF_RANGE
    frozen = x.numpy()
    frozen.flags.writeable = False
    assert np.abs(explain(model, frozen, LABELS, device="cpu", **options) - reference).max() <= COMPAT_SHARE_OF_RANGE
    assert np.ptp(reference) > 0.5


def test_order_of_the_channels() -> None:
    torch.manual_seed(0)
    # As many channels as positions: only the caller knows.
    model = nn.Sequential(nn.Conv2d(5, 6, 3, padding=1), nn.Tanh(), nn.Flatten(), nn.Linear(150, 3))
    x = torch.randn(2, 5, 5, 5)
    first = explain(model, x, 1, layers="0")
    assert np.array_equal(explain(model, x, 1, layers="0", channel_first=True), first)
    assert np.array_equal(explain(model, x.movedim(1, -1).numpy(), 1, layers="0", channel_first=False), first)
    assert not np.array_equal(explain(model, x, 1, layers="0", channel_first=False), first)
    # Signals and volumes.
    model = nn.Sequential(nn.Conv1d(2, 4, 3), nn.Tanh(), nn.Flatten(), nn.Linear(40, 3))
    signal = torch.randn(2, 2, 12)
    assert np.array_equal(explain(model, signal.movedim(1, -1), 1, layers="0"), explain(model, signal, 1, layers="0"))
    volume = make(Volume)
    found = explain(volume, images(Volume).movedim(1, -1), LABELS, layers="late", channel_first=False)
    assert found.shape == (3, 1, 8, 9, 10)
    assert np.array_equal(found, explain(volume, images(Volume), LABELS, layers="late"))


def test_predicted_classes_and_other_precisions() -> None:
    model, x = make(Pooled), images(Pooled)
    predicted = model(x).argmax(1)
    assert np.array_equal(explain(model, x, None), explain(model, x, predicted))
    assert np.array_equal(explain(model, x, 4), explain(model, x, [4, 4, 4]))
    assert explain(make(Pooled, torch.float64), x, LABELS).dtype == np.float64
    found = explain(make(Pooled, torch.bfloat16), x.numpy(), LABELS)
    assert found.dtype == np.float32 and np.abs(found - explain(model, x, LABELS)).max() < 0.1


def test_the_model_is_left_as_it_was() -> None:
    model, x = make(Pooled).train(), images(Pooled)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    explain(model, x, LABELS)
    assert model.training and not x.requires_grad
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize(
    ("change", "error", "message"),
    (
        ({"model": len}, TypeError, "model: expected a torch.nn.Module"),
        ({"inputs": [[1.0]]}, TypeError, "inputs: expected an array or a tensor of numbers; got list"),
        ({"inputs": np.array([["a"]])}, TypeError, "inputs: expected an array or a tensor of numbers; got an array of"),
        ({"inputs": np.ones((3, 4))}, ValueError, r"inputs: expected images \(N, C"),
        ({"targets": np.array([0.5, 1, 2])}, TypeError, "targets: classes: expected integers"),
        ({"targets": [1, 2]}, ValueError, "targets: classes: expected None, an integer, or"),
        ({"targets": [[1, 2]] * 3}, ValueError, "targets: expected one class for each image; got shape"),
        ({"targets": [1, 2, 99]}, ValueError, "classes: expected indices from 0 to 6"),
        ({"device": "meta"}, ValueError, "device: expected that of the model, cpu; got meta"),
        ({"device": "gpu"}, ValueError, "device: expected the name of a device; got 'gpu'"),
        ({"channel_first": 1}, TypeError, "channel_first: expected True, False or None; got int"),
        ({"xai_lib": "captum", "gc_layer": 0}, TypeError, "options: expected some of layers.*; got gc_layer, xai_lib"),
        ({"method": "GradCAM"}, ValueError, "method: expected one of gradcam"),
        ({"target": dcf.LogitDifference(top_k=2, pairwise=True)}, ValueError, "target: .*makes 2 of each"),
    ),
)
def test_refusals(change: dict[str, Any], error: type[Exception], message: str) -> None:
    arguments = {"model": make(Flat), "inputs": images(Flat), "targets": LABELS, **change}
    with pytest.raises(error, match=message):
        explain(**arguments)


@pytest.fixture(scope="module")
def quantus() -> Any:
    return pytest.importorskip("quantus", reason="Quantus is not installed")


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_in_an_evaluation(quantus: Any) -> None:
    """Quantus asks for the maps itself, and finds in them what it finds in maps that it is given."""
    model = make(Flat)
    x = images(Flat).numpy()
    given = expected(model, method="layercam", layers="late")
    # How much the maps are concentrated; what the model says while pixels turn black in their order (Bach et al. 2015).
    sparseness = quantus.Sparseness(disable_warnings=True)
    flipping = quantus.PixelFlipping(features_in_step=4, perturb_baseline="black", disable_warnings=True)
    for metric in (sparseness, flipping):
        evaluated = partial(metric, model=model, x_batch=x, y_batch=LABELS, device="cpu")
        asked = {"method": "layercam", "layers": "late"}
        found = np.array(evaluated(a_batch=None, explain_func=explain, explain_func_kwargs=asked))
        assert len(found) == 3 and np.isfinite(found).all() and np.ptp(found) > 0
        assert np.allclose(found, np.array(evaluated(a_batch=given)), rtol=1e-4)
        assert not np.allclose(found, np.array(evaluated(a_batch=1 - given)), rtol=1e-2)


def test_several_methods_in_one_evaluation(quantus: Any) -> None:
    """`quantus.evaluate` hands on the names of explanations as their methods."""
    model, x = make(Flat), images(Flat).numpy()
    metric = quantus.Sparseness(disable_warnings=True)
    results = quantus.evaluate(
        metrics={"sparseness": metric},
        xai_methods={"gradcam": explain, "layercam": explain},
        model=model,
        x_batch=x,
        y_batch=LABELS,
        explain_func_kwargs={"layers": "late"},
        call_kwargs={"all": {"device": "cpu"}},
    )
    for method, found in results.items():
        given = expected(model, method=method, layers="late")
        scores = metric(model=model, x_batch=x, y_batch=LABELS, a_batch=given, device="cpu")
        assert np.allclose(found["sparseness"], scores, rtol=1e-4)
    assert results["gradcam"] != results["layercam"]
