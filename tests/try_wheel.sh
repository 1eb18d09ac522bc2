#!/usr/bin/env bash
# Installs the newest wheel of a folder into an empty environment and uses it there, far from the checkout.
set -euo pipefail

python=$(realpath --no-symlinks "$1")
wheel=$(ls -t "$(realpath "$2")"/*.whl | head -n 1)
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
torch=$("$python" -c 'import torch; print(torch.__version__.split("+")[0])')
"$python" -m venv "$folder/environment"
"$folder/environment/bin/python" -m pip install --quiet "torch==$torch"
"$folder/environment/bin/python" -m pip install --quiet "$wheel"
cd "$folder"
environment/bin/python - <<'PYTHON'
import numpy
import torch

import diffcam_fast as dcf
from diffcam_fast import backends
from diffcam_fast.backends import native

assert backends.absent_because("cpu") is None, backends.absent_because("cpu")
activations, gradients = torch.rand(2, 8, 7, 7), torch.randn(2, 8, 7, 7)
maps = dcf.cam(activations, gradients)
with backends.use_backend("reference"):
    torch.testing.assert_close(maps, dcf.cam(activations, gradients))
numpy.testing.assert_allclose(dcf.numpy.cam(activations.numpy(), gradients.numpy()), maps.numpy(), atol=1e-6)
network = torch.nn.Sequential(
    torch.nn.Conv2d(3, 8, 3), torch.nn.ReLU(), torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Linear(8, 5)
)
explanation = dcf.Explainer(network)(torch.rand(2, 3, 16, 16))
assert explanation.maps.shape == (2, 1, 16, 16)
print(f"the wheel works: kernels for {native.cpu_capability()}, torch {torch.__version__}")
PYTHON
# What needs an extra says which.
if environment/bin/diffcam info 2>message; then echo "diffcam ran without its extra" >&2; exit 1; fi
grep -q "diffcam_fast\[cli\]" message
