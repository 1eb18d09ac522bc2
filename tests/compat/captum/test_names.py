"""captum's names for ours, and captum's own names through ours."""

from __future__ import annotations

import doctest
import importlib
import importlib.metadata
import os
import re
import runpy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from diffcam_fast import compat
from diffcam_fast.compat import captum as ours
from diffcam_fast.compat import originals
from diffcam_fast.compat.__main__ import main
from tests.compat.networks import Flat, images, make
from tests.tolerances import COMPAT_SHARE_OF_RANGE


@pytest.fixture
def captum() -> Any:
    return pytest.importorskip("captum")


def test_installed_and_undone(captum: Any) -> None:
    modules = originals.modules_of("captum")
    with compat.installed("captum", strict=True):
        import captum as named
        import captum.attr._core.layer.grad_cam as where_it_lives
        import captum.metrics
        from captum._utils.common import _format_tensor_into_tuples
        from captum.attr import GuidedGradCam, IntegratedGradients, LayerAttribution, LayerGradCam, visualization
        from captum.attr._utils.attribution import GradientAttribution

        assert named is ours and LayerGradCam is ours.LayerGradCam is where_it_lives.LayerGradCam
        assert named.__version__ == "0.9.0"
        model = make(Flat)
        assert LayerGradCam(model, model.late).strict and not LayerGradCam(model, model.late, strict=False).strict
        # What is not ours is the original's, which goes on with its own modules.
        attr = modules["captum.attr"]
        assert GuidedGradCam is attr.GuidedGradCam and IntegratedGradients is attr.IntegratedGradients
        assert visualization is attr.visualization and LayerAttribution is attr.LayerAttribution
        assert GradientAttribution is attr.GradientAttribution
        assert issubclass(LayerGradCam, (LayerAttribution, GradientAttribution))
        assert _format_tensor_into_tuples is modules["captum._utils.common"]._format_tensor_into_tuples
        assert type(GuidedGradCam(model, model.late).grad_cam) is attr.LayerGradCam
        assert captum.metrics.infidelity is modules["captum.metrics"].infidelity
    assert originals.modules_of("captum") == modules
    assert importlib.import_module("captum") is modules["captum"]
    assert not ours.LayerGradCam(model, model.late).strict


def test_names_of_the_original(captum: Any) -> None:
    from diffcam_fast.compat.captum.attr._core.layer.grad_cam import LayerGradCam as SameLayerGradCam

    from diffcam_fast.compat.captum import robust
    from diffcam_fast.compat.captum.attr import LayerGradCam, LayerIntegratedGradients

    assert LayerGradCam is SameLayerGradCam is ours.LayerGradCam
    assert LayerIntegratedGradients is captum.attr.LayerIntegratedGradients and robust is captum.robust
    for original, here in ((captum, ours), (captum.attr, ours.attr)):
        assert here.__all__ == original.__all__
        for name in original.__all__:
            assert hasattr(here, name), name
    everything: dict[str, Any] = {}
    exec("from diffcam_fast.compat.captum.attr import *", everything)
    assert everything["LayerGradCam"] is LayerGradCam and everything["Saliency"] is captum.attr.Saliency
    with pytest.raises(ImportError):
        from diffcam_fast.compat.captum.attr import LayerGradCamera  # noqa: F401
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("diffcam_fast.compat.captum.no_such_module")


def test_captums_own_classes_work_with_ours(captum: Any) -> None:
    model, x = make(Flat), images(Flat)

    def smoothed(kind: Any) -> Tensor:
        torch.manual_seed(0)
        tunnel = captum.attr.NoiseTunnel(kind(model, model.late))
        return tunnel.attribute(x, nt_type="vargrad", nt_samples=4, stdevs=0.2, target=4)

    expected = smoothed(captum.attr.LayerGradCam)
    assert expected.max() > 0
    assert (smoothed(ours.LayerGradCam) - expected).abs().max() <= COMPAT_SHARE_OF_RANGE * expected.max()


def test_without_captum(tmp_path: Path) -> None:
    """Ours needs nothing of what captum needs, and says what to install for the rest."""
    script = tmp_path / "script.py"
    script.write_text(
        """
import sys

for name in ("captum", "matplotlib", "tqdm"):
    sys.modules[name] = None
import torch
from diffcam_fast.compat import installed
from diffcam_fast.compat.captum import LayerGradCam

model = torch.nn.Sequential(torch.nn.Conv2d(1, 3, 2), torch.nn.Tanh(), torch.nn.Flatten(), torch.nn.Linear(27, 3))
cam = LayerGradCam(model, model[0])
assert cam.attribute(torch.randn(2, 1, 4, 4), 1).shape == (2, 1, 3, 3)
assert LayerGradCam.__mro__[1:] == (object,) and not cam.has_convergence_delta() and not cam.multiplies_by_inputs
del sys.modules["captum"]
sys.path = [entry for entry in sys.path if "site-packages" not in entry]
for statement in (
    "from diffcam_fast.compat.captum.attr import IntegratedGradients",
    "from diffcam_fast.compat.captum import metrics",
    "import diffcam_fast.compat.captum.metrics",
    "cam.compute_convergence_delta(1, 2, 3)",
    "LayerGradCam(lambda x: model(x), model[0], [0, 1]).attribute(torch.randn(2, 1, 4, 4), 1)",
):
    try:
        exec(statement)
    except ImportError as error:
        assert "pip install captum" in str(error), error
    else:
        raise AssertionError(statement)
with installed("captum"):
    from captum.attr import LayerGradCam as Named
assert Named is LayerGradCam
print("whole")
"""
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[3])}
    result = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, check=False, env=environment)
    assert result.stdout.strip() == "whole", result.stderr


SAVING = """
import sys
import torch
tensors = {name: value.detach() for name, value in list(globals().items()) if isinstance(value, torch.Tensor)}
torch.save(tensors, sys.argv[1])
"""

CLASSIFIER = """
import torch
from captum.attr import LayerAttribution, LayerGradCam


class ImageClassifier(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1, self.conv4 = torch.nn.Conv2d(3, 8, 5, stride=3), torch.nn.Conv2d(8, 50, 3)
        self.head = torch.nn.Linear(50, 10)

    def forward(self, x):
        return self.head(self.conv4(self.conv1(x).relu()).relu().mean((2, 3))).softmax(1)


torch.manual_seed(0)
print(LayerGradCam.__module__)
"""


def readme() -> str:
    """The examples in captum's README, which explain one model by other methods than ours."""
    text = str(importlib.metadata.metadata("captum").get_payload())
    blocks = re.findall("```python\n(.*?)```", text, re.DOTALL)
    assert len(blocks) > 5
    return "\n".join([*blocks, SAVING])


def documentation() -> str:
    """The example in the documentation of captum's LayerGradCam, with the classifier that it speaks of."""
    examples = doctest.DocTestParser().get_examples(originals.original("captum", "attr").LayerGradCam.attribute.__doc__)
    assert len(examples) >= 5
    return "".join([CLASSIFIER, *(example.source for example in examples), SAVING])


def run_here(script: Path, output: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Tensor]:
    monkeypatch.setattr(sys, "argv", [str(script), str(output)])
    runpy.run_path(str(script), run_name="__main__")
    return torch.load(output)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(("example", "uses_ours"), ((readme, False), (documentation, True)))
def test_examples_run_unchanged(
    example: Callable[[], str],
    uses_ours: bool,
    captum: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    script, output = tmp_path / "script.py", tmp_path / "found.pt"
    script.write_text(example())
    expected = run_here(script, output, monkeypatch)
    assert "diffcam_fast" not in capsys.readouterr().out
    # As `python -m diffcam_fast.compat captum script.py found.pt` has it.
    main(["captum", str(script), str(output)])
    assert ("diffcam_fast" in capsys.readouterr().out) is uses_ours
    found = torch.load(output)
    assert found.keys() == expected.keys() and len(found) > 2
    for name, other in expected.items():
        assert torch.allclose(found[name], other, rtol=COMPAT_SHARE_OF_RANGE, atol=COMPAT_SHARE_OF_RANGE), name


def test_documented_example_with_a_changed_import(
    captum: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    script = tmp_path / "script.py"
    script.write_text(documentation().replace("from captum.attr import", "from diffcam_fast.compat.captum.attr import"))
    found = run_here(script, tmp_path / "found.pt", monkeypatch)
    assert found["attr"].shape == (2, 1, 8, 8) and found["upsampled_attr"].shape == (2, 1, 32, 32)
    assert capsys.readouterr().out.startswith("diffcam_fast.compat.captum")
