"""Explaining a model: targets, capture of layers, pull-back and the explanation."""

from diffcam_fast.explain.explainer import Explainer
from diffcam_fast.explain.explanation import Explanation
from diffcam_fast.explain.positions import tokens_to_positions
from diffcam_fast.explain.presets import DiffGradCAM, DiffGradCAMPlusPlus
from diffcam_fast.explain.targets import (
    Finer,
    Logit,
    LogitDifference,
    LogProbability,
    Probability,
    Scores,
    Target,
)

__all__ = [
    # explainers
    "Explainer",
    "DiffGradCAM",
    "DiffGradCAMPlusPlus",
    # results
    "Explanation",
    # targets
    "Target",
    "Scores",
    "LogitDifference",
    "Finer",
    "Logit",
    "Probability",
    "LogProbability",
    # transformers
    "tokens_to_positions",
]
