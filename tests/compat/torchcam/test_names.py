"""torchcam's names, ours and the original's, and the examples of its README."""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import re
import shutil
import subprocess
import sys
from importlib.metadata import metadata
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from diffcam_fast import compat
from diffcam_fast.compat import originals
from diffcam_fast.compat import torchcam as ours
from diffcam_fast.compat.torchcam.utils import overlay_mask
from tests.compat.networks import Flat, Pooled, images, make
from tests.tolerances import COMPAT_SHARE_OF_RANGE, PIXEL

image = pytest.importorskip("PIL.Image")
pytest.importorskip("torchcam")


def test_names_of_the_original() -> None:
    theirs = originals.original("torchcam", "methods")
    for name in ("ScoreCAM", "SSCAM", "ISCAM", "LeGrad"):
        assert getattr(ours.methods, name) is getattr(theirs, name)
    for module in ("methods", "methods.core", "methods.activation", "methods.gradient", "methods._utils", "utils"):
        other = originals.original("torchcam", module)
        mine = importlib.import_module(f"diffcam_fast.compat.torchcam.{module}")
        for name in getattr(other, "__all__", [name for name in dir(other) if not name.startswith("_")]):
            assert hasattr(mine, name), (module, name)
    # Third parties derive from these.
    assert issubclass(ours.methods.gradient._GradCAM, ours.methods.core._CAM)
    assert ours.__version__ == originals.original("torchcam").__version__
    from diffcam_fast.compat.torchcam.metrics import ClassificationMetric

    assert ClassificationMetric.__module__ == "torchcam.metrics"
    with pytest.raises(ImportError):
        from diffcam_fast.compat.torchcam.methods import NoSuchCAM  # noqa: F401
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("diffcam_fast.compat.torchcam.no_such_module")


def test_installed_and_undone() -> None:
    modules = originals.modules_of("torchcam")
    with compat.installed("torchcam", strict=True):
        import torchcam.metrics
        from torchcam.explain import explain
        from torchcam.methods import GradCAM, ScoreCAM
        from torchcam.methods._utils import locate_candidate_layer
        from torchcam.methods.core import _CAM
        from torchcam.methods.gradient import LayerCAM
        from torchcam.utils import overlay_mask as named

        assert GradCAM is ours.methods.GradCAM and LayerCAM is ours.methods.LayerCAM and named is overlay_mask
        assert issubclass(GradCAM, _CAM) and not issubclass(ScoreCAM, _CAM)
        assert locate_candidate_layer(make(Flat), (3, 12, 10)) == "relu"
        assert GradCAM(make(Flat), "late").strict and not GradCAM(make(Flat), "late", strict=False).strict
        assert torchcam.metrics.ClassificationMetric is not None and callable(explain)
    assert not ours.methods.GradCAM(make(Flat), "late").strict
    assert all(sys.modules.get(name) is module for name, module in modules.items())
    assert importlib.import_module("torchcam") is modules.get("torchcam", sys.modules["torchcam"])
    assert importlib.import_module("torchcam").methods.GradCAM is not ours.methods.GradCAM


def test_explain_runs_on_our_classes() -> None:
    model, x = make(Pooled), images(Pooled, 1)
    theirs = originals.original("torchcam", "explain").explain(model, x, target_layer="late", expected_class_idx=2)
    for method in (ours.methods.GradCAM, ours.methods.LayerCAM):
        result = ours.explain.explain(model, x, target_layer="late", expected_class_idx=2, method=method)
        assert result.method == method.__name__ and result.target_layers == ("late",)
        assert result.predicted_class_idx == theirs.predicted_class_idx
    result = ours.explain.explain(model, x, target_layer="late", expected_class_idx=2)
    assert set(result.cams) == set(theirs.cams)
    for index, maps in result.cams.items():
        assert (maps[0] - theirs.cams[index][0]).abs().max() <= COMPAT_SHARE_OF_RANGE
    with pytest.raises(TypeError):
        ours.explain.explain(model, x, target_layer="late", method=originals.original("torchcam", "methods").GradCAM)
    # The original goes on with its own.
    assert originals.original("torchcam", "explain").GradCAM is originals.original("torchcam", "methods").GradCAM


@pytest.mark.parametrize("name", ("GradCAM", "LayerCAM", "FinerCAM"))
def test_metrics_take_our_classes(name: str) -> None:
    model, x = make(Pooled), images(Pooled)
    summaries = []
    for methods in (originals.original("torchcam", "methods"), ours.methods):
        with getattr(methods, name)(model, "late") as cam:
            metric = ours.metrics.ClassificationMetric(cam, logits_fn=lambda logits: logits.softmax(1))
            metric.update(x)
            metric.update(x * 2)
            summaries.append(metric.summary())
    assert summaries[0].keys() == summaries[1].keys()
    for key, value in summaries[0].items():
        assert abs(summaries[1][key] - value) < 1e-4


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[3])}
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, check=False, env=environment)


def test_without_the_original(tmp_path: Path) -> None:
    """Ours needs nothing of what the original needs, and says what to install for the rest."""
    script = tmp_path / "script.py"
    script.write_text(
        """
import sys

for name in ("torchcam", "torchvision", "matplotlib", "PIL"):
    sys.modules[name] = None
import torch
from diffcam_fast.compat import installed
from diffcam_fast.compat.torchcam import methods, utils

model = torch.nn.Sequential(torch.nn.Conv3d(1, 3, 2), torch.nn.Tanh(), torch.nn.Flatten(), torch.nn.Linear(24, 3))
for name in ("GradCAM", "GradCAMpp", "SmoothGradCAMpp", "XGradCAM", "LayerCAM", "FinerCAM"):
    with getattr(methods, name)(model, input_shape=(1, 3, 3, 3)) as cam:
        (maps,) = cam(1, model(torch.randn(2, 1, 3, 3, 3)))
    assert maps.shape == (2, 2, 2, 2)
try:
    utils.overlay_mask(None, None)
except ImportError as error:
    assert "pip install 'diffcam_fast[viz]'" in str(error), error
del sys.modules["torchcam"]
sys.path = [entry for entry in sys.path if "site-packages" not in entry]
for statement in (
    "from diffcam_fast.compat.torchcam.methods import ScoreCAM",
    "from diffcam_fast.compat.torchcam.explain import explain",
    "import diffcam_fast.compat.torchcam.metrics",
):
    try:
        exec(statement)
    except ImportError as error:
        assert "pip install torchcam" in str(error), error
    else:
        raise AssertionError(statement)
with installed("torchcam"):
    from torchcam.methods import GradCAM as Named
assert Named is methods.GradCAM
print("whole")
"""
    )
    result = run(str(script))
    assert result.stdout.strip() == "whole", result.stderr


def test_script_runs_unchanged(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        """
import sys
import torch
from torchcam.methods import GradCAM, ScoreCAM

model = torch.nn.Sequential(torch.nn.Conv2d(1, 3, 2), torch.nn.Flatten(), torch.nn.Linear(12, 3))
for kind in (GradCAM, ScoreCAM):
    with kind(model, "0") as extractor:
        scores = model(torch.randn(1, 1, 3, 3))
        (maps,) = extractor(1, scores)
    print(kind.__module__, getattr(extractor, "strict", None), tuple(maps.shape), sys.argv[1:])
"""
    )
    result = run("-m", "diffcam_fast.compat", "torchcam", "--strict", str(script), "--size")
    first, second = result.stdout.splitlines()
    assert first.startswith("diffcam_fast.compat.torchcam") and first.endswith("True (1, 2, 2) ['--size']")
    assert second.startswith("torchcam.methods.activation None (1, 2, 2)"), result.stderr


@pytest.mark.parametrize("mode", ("RGB", "L"))
@pytest.mark.parametrize("options", ({}, {"alpha": 0.3}, {"colormap": "turbo", "alpha": 0.0}))
def test_overlay(mode: str, options: dict[str, Any]) -> None:
    random = np.random.default_rng(0)
    picture = image.fromarray(random.integers(0, 256, (40, 30, 3), np.uint8)).convert(mode)
    mask = image.fromarray(random.random((7, 5), np.float32))
    found = overlay_mask(picture, mask, **options)
    expected = originals.original("torchcam", "utils").overlay_mask(picture, mask, **options)
    assert found.size == picture.size and found.mode == "RGB"
    assert np.abs(np.asarray(found, np.int64) - np.asarray(expected)).max() <= PIXEL


@pytest.mark.parametrize("mode", ("F", "I;16", "HSV"))
def test_overlay_on_other_pictures(mode: str) -> None:
    values = np.random.default_rng(0).integers(0, 256, (6, 5, 3))
    dtype = {"F": np.float32, "I;16": np.uint16, "HSV": np.uint8}[mode]
    picture = image.fromarray((values if mode == "HSV" else values[:, :, 0]).astype(dtype))
    picture = image.merge("HSV", picture.split()) if mode == "HSV" else picture
    assert picture.mode == mode
    mask = image.fromarray(values[:, :, 1].astype(np.float32) / 255)
    found = np.asarray(overlay_mask(picture, mask), np.int64)
    expected = np.asarray(originals.original("torchcam", "utils").overlay_mask(picture, mask), np.int64)
    assert np.abs(found - expected).max() <= PIXEL


def test_overlay_refuses() -> None:
    picture = image.new("RGB", (4, 4))
    for arguments, error, message in (
        ((np.zeros(3), picture), TypeError, "img: expected a PIL.Image.Image"),
        ((picture, np.zeros(3)), TypeError, "mask: expected a PIL.Image.Image"),
        ((picture.convert("RGBA"), picture), ValueError, "img: expected one or three channels"),
        ((picture, picture, "jet", 1.0), ValueError, "alpha: expected a float"),
        ((picture, picture, "jet", 0), ValueError, "alpha: expected a float"),
    ):
        with pytest.raises(error, match=message):
            overlay_mask(*arguments)
        with pytest.raises(error):
            originals.original("torchcam", "utils").overlay_mask(*arguments)


class _Reader:
    """Runs the README's Python, block after block, without the network: its photo is drawn, its weights are random."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
        helper = pytest.importorskip("tests.helpers.torchvision_cpu")
        matplotlib = pytest.importorskip("matplotlib")
        matplotlib.use("Agg")
        torch.manual_seed(0)
        state = helper.models.resnet18().state_dict()
        monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", lambda *given, **options: state)
        monkeypatch.setattr("urllib.request.urlretrieve", self._draw)
        monkeypatch.setattr("torchvision.io.decode_image", self._decode)
        monkeypatch.chdir(folder)

    @staticmethod
    def _draw(address: str, path: str) -> None:
        y, x = np.mgrid[:240, :300]
        picture = np.stack([x % 256, y, 255 * (np.hypot(x - 90, y - 120) < 60)], 2).astype(np.uint8)
        image.fromarray(picture).save(path)

    @staticmethod
    def _decode(path: str) -> Tensor:
        return torch.from_numpy(np.array(image.open(path))).permute(2, 0, 1)

    def read(self, blocks: list[str]) -> dict[str, Any]:
        names: dict[str, Any] = {}
        for block in blocks:
            exec(block, names)
        return names


def blocks_of_the_readme() -> list[str]:
    text = metadata("torchcam").get_payload()
    return re.findall(r"^```python.*?\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize("way", ("changed import", "installed"))
def test_examples_of_the_readme(way: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = blocks_of_the_readme()
    assert len(blocks) >= 6 and sum("import LayerCAM" in block for block in blocks) >= 2
    reader = _Reader(monkeypatch, tmp_path)
    expected = reader.read(blocks)
    saved = json.loads((tmp_path / "torchcam-explanation" / "manifest.json").read_text())
    changed = [re.sub(r"^from torchcam", "from diffcam_fast.compat.torchcam", b, flags=re.MULTILINE) for b in blocks]
    assert changed != blocks
    shutil.rmtree(tmp_path / "torchcam-explanation")
    with compat.installed("torchcam") if way == "installed" else contextlib.nullcontext():
        found = reader.read(blocks if way == "installed" else changed)
    assert found["LayerCAM"] is ours.methods.LayerCAM and found["overlay_mask"] is overlay_mask
    assert json.loads((tmp_path / "torchcam-explanation" / "manifest.json").read_text()).keys() == saved.keys()
    (mine,), (other,) = found["activation_map"], expected["activation_map"]
    assert mine.shape == other.shape == (1, 7, 7) and other.max() - other.min() > 0.5
    assert (mine - other).abs().max() <= COMPAT_SHARE_OF_RANGE
    assert found["cam_extractor"].target_names == expected["cam_extractor"].target_names
    difference = np.abs(np.asarray(found["result"], np.int64) - np.asarray(expected["result"]))
    # Rounding takes a value to the next of jet's 256 colours, which are up to 5 apart; half of it is heat.
    assert difference.max() <= 0.5 * 5 + PIXEL and (difference > PIXEL).mean() < 1e-3


def test_layer_is_chosen_as_the_original_does() -> None:
    theirs = originals.original("torchcam", "methods._utils").locate_candidate_layer
    mine = importlib.import_module("diffcam_fast.compat.torchcam.methods._utils").locate_candidate_layer
    whole = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Dropout(0.9))
    for model, shape in (
        (make(Flat), (3, 12, 10)),
        (make(Pooled), (3, 12, 10)),
        (whole, (3, 9, 9)),
        (nn.Sequential(nn.Linear(3, 3)), (3,)),
    ):
        model.train()
        generator = torch.get_rng_state()
        assert mine(model, shape) == theirs(model, shape)
        assert model.training and torch.equal(torch.get_rng_state(), generator)
    # What has no parameters, and half precision.
    assert mine(nn.Sequential(nn.ReLU(), nn.Flatten()), (3, 4, 4)) == "0"
    assert mine(make(Flat).half(), (3, 12, 10)) == "relu"
