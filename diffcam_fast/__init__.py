"""Contrastive class activation maps at full speed.

See the README for a tour, `Explainer` for maps of a model, `cam`, `logit_difference`, `overlay` and
`saliency_contrast` for the ops, and the packages `robustness` and `saliency` for attacks and input saliency.
"""

from diffcam_fast import backends, numpy
from diffcam_fast.explain import (
    DiffGradCAM,
    DiffGradCAMPlusPlus,
    Explainer,
    Explanation,
    Finer,
    Logit,
    LogitDifference,
    LogProbability,
    Probability,
    tokens_to_positions,
)
from diffcam_fast.ops import LogitDifferenceResult, cam, logit_difference, overlay, saliency_contrast

__all__ = [
    "Explainer",
    "Explanation",
    "DiffGradCAM",
    "DiffGradCAMPlusPlus",
    "LogitDifference",
    "Finer",
    "Logit",
    "Probability",
    "LogProbability",
    "tokens_to_positions",
    "cam",
    "logit_difference",
    "LogitDifferenceResult",
    "overlay",
    "saliency_contrast",
    "backends",
    "numpy",
]

__version__ = "0.1.0"

backends.arrange_from_environment()
