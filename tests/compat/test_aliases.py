"""Other libraries' names for ours, and back."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from diffcam_fast import compat
from diffcam_fast.compat import originals
from diffcam_fast.compat import pytorch_grad_cam as ours


def peer_modules() -> dict[str, Any]:
    return originals.modules_of("pytorch_grad_cam")


@pytest.fixture
def original() -> Any:
    pytest.importorskip("tests.helpers.torchvision_cpu")
    return pytest.importorskip("pytorch_grad_cam")


def test_installed_and_undone(original: Any) -> None:
    modules, finders = peer_modules(), list(sys.meta_path)
    with compat.installed("pytorch_grad_cam"):
        import pytorch_grad_cam
        import pytorch_grad_cam.metrics.road
        from pytorch_grad_cam.base_cam import BaseCAM
        from pytorch_grad_cam.grad_cam import GradCAM
        from pytorch_grad_cam.utils.find_layers import replace_layer_recursive
        from pytorch_grad_cam.utils.image import create_labels_legend, show_cam_on_image

        assert pytorch_grad_cam is ours and GradCAM is ours.GradCAM and BaseCAM is ours.BaseCAM
        assert show_cam_on_image is ours.utils.image.show_cam_on_image
        # What is not ours is the original's, which goes on with its own modules.
        assert pytorch_grad_cam.ScoreCAM is original.ScoreCAM
        assert issubclass(pytorch_grad_cam.ScoreCAM, modules["pytorch_grad_cam.base_cam"].BaseCAM)
        assert create_labels_legend is modules["pytorch_grad_cam.utils.image"].create_labels_legend
        assert replace_layer_recursive.__module__ == "pytorch_grad_cam.utils.find_layers"
        road = pytorch_grad_cam.metrics.road
        assert road.ROADMostRelevantFirst is original.metrics.road.ROADMostRelevantFirst
    assert peer_modules() == modules and sys.meta_path == finders
    assert importlib.import_module("pytorch_grad_cam") is original


def test_install_and_uninstall() -> None:
    modules = peer_modules()
    try:
        compat.install("pytorch_grad_cam", strict=True)
        compat.install("pytorch_grad_cam")
        with compat.installed("pytorch_grad_cam", strict=True):
            assert importlib.import_module("pytorch_grad_cam") is ours
        assert importlib.import_module("pytorch_grad_cam") is ours
    finally:
        compat.uninstall("pytorch_grad_cam")
    assert peer_modules() == modules
    with pytest.raises(ValueError, match=r"install\(\) was called for; got 'pytorch_grad_cam'"):
        compat.uninstall("pytorch_grad_cam")
    with pytest.raises(ValueError, match="package: expected one of captum, pytorch_grad_cam, torchcam; got 'gradcam'"):
        compat.install("gradcam")


def test_undone_after_an_exception() -> None:
    modules = peer_modules()
    with pytest.raises(KeyError), compat.installed("pytorch_grad_cam"):
        raise KeyError
    assert peer_modules() == modules


def test_strict_is_the_default_of_what_is_made_meanwhile() -> None:
    from tests.compat.networks import Flat, make

    model = make(Flat)
    with compat.installed("pytorch_grad_cam", strict=True):
        assert ours.GradCAM(model, [model.late]).strict
        assert not ours.GradCAM(model, [model.late], strict=False).strict
        model.train()
        assert not ours.FinerCAM(model, [model.late], strict=False).base_cam.strict
        assert model.training
        assert ours.FinerCAM(model, [model.late]).base_cam.strict
        assert not model.training
    assert not ours.GradCAM(model, [model.late]).strict


def test_names_of_the_original(original: Any) -> None:
    from diffcam_fast.compat.pytorch_grad_cam.metrics.cam_mult_image import CamMultImageConfidenceChange
    from diffcam_fast.compat.pytorch_grad_cam.xgrad_cam import XGradCAM

    from diffcam_fast.compat.pytorch_grad_cam import AblationCAM, GuidedBackpropReLUModel
    from diffcam_fast.compat.pytorch_grad_cam.utils.model_targets import FasterRCNNBoxScoreTarget

    assert AblationCAM is original.AblationCAM and GuidedBackpropReLUModel is original.GuidedBackpropReLUModel
    assert CamMultImageConfidenceChange is original.metrics.cam_mult_image.CamMultImageConfidenceChange
    assert FasterRCNNBoxScoreTarget is original.utils.model_targets.FasterRCNNBoxScoreTarget
    assert XGradCAM is ours.XGradCAM
    for name in dir(original):
        if not name.startswith("_"):
            assert hasattr(ours, name), name
    with pytest.raises(ImportError):
        from diffcam_fast.compat.pytorch_grad_cam import NoSuchCAM  # noqa: F401
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("diffcam_fast.compat.pytorch_grad_cam.no_such_module")


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), **environment},
    )


def test_without_the_original(tmp_path: Path) -> None:
    """Ours needs nothing of what the original needs, and says what to install for the rest."""
    script = tmp_path / "script.py"
    script.write_text(
        """
import sys

for name in ("pytorch_grad_cam", "cv2", "ttach", "torchvision", "matplotlib", "sklearn", "scipy"):
    sys.modules[name] = None
import torch
from diffcam_fast.compat import installed
from diffcam_fast.compat.pytorch_grad_cam import EigenGradCAM, GradCAM
from diffcam_fast.compat.pytorch_grad_cam.utils.image import show_cam_on_image
from diffcam_fast.compat.pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget

model = torch.nn.Sequential(torch.nn.Conv3d(1, 3, 2), torch.nn.Tanh(), torch.nn.Flatten(), torch.nn.Linear(24, 3))
for kind in (GradCAM, EigenGradCAM):
    maps = kind(model, [model[0]])(torch.randn(2, 1, 3, 3, 3), [ClassifierOutputTarget(1)] * 2, aug_smooth=True)
    assert maps.shape == (2, 3, 3, 3)
del sys.modules["pytorch_grad_cam"]
sys.path = [entry for entry in sys.path if "site-packages" not in entry]
for statement in (
    "from diffcam_fast.compat.pytorch_grad_cam import ScoreCAM",
    "import diffcam_fast.compat.pytorch_grad_cam.metrics.road",
    "from diffcam_fast.compat.pytorch_grad_cam.utils.image import show_factorization_on_image",
):
    try:
        exec(statement)
    except ImportError as error:
        assert "pip install grad-cam" in str(error), error
    else:
        raise AssertionError(statement)
with installed("pytorch_grad_cam"):
    from pytorch_grad_cam import GradCAM as Named
    from pytorch_grad_cam.layer_cam import LayerCAM
assert Named is GradCAM
print("whole")
"""
    )
    result = run(str(script))
    assert result.stdout.strip() == "whole", result.stderr


def test_script_runs_unchanged(tmp_path: Path) -> None:
    (tmp_path / "neighbour.py").write_text("VALUE = 3\n")
    script = tmp_path / "script.py"
    script.write_text(
        """
import sys
from neighbour import VALUE
from pytorch_grad_cam import GradCAM
from pytorch_grad_cam.utils.image import show_cam_on_image
import torch

assert __name__ == "__main__"
model = torch.nn.Sequential(torch.nn.Conv2d(1, VALUE, 2), torch.nn.Flatten(), torch.nn.Linear(12, 3))
with GradCAM(model=model, target_layers=[model[0]]) as cam:
    cam(input_tensor=torch.randn(1, 1, 3, 3), targets=None)
    print(GradCAM.__module__, cam.strict, sys.argv[1:], model.training)
"""
    )
    result = run("-m", "diffcam_fast.compat", "pytorch_grad_cam", str(script), "--size", "3")
    assert result.stdout.split()[0].startswith("diffcam_fast.compat"), result.stderr
    assert result.stdout.strip().endswith("False ['--size', '3'] True")
    result = run("-m", "diffcam_fast.compat", "pytorch_grad_cam", "--strict", str(script))
    assert result.stdout.strip().endswith("True [] False"), result.stderr
    result = run("-m", "diffcam_fast.compat", "pytorch_grad_cam", "missing.py")
    assert result.returncode == 2 and "no such file: missing.py" in result.stderr
