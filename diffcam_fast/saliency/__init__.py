"""Explanations of single input values, and what tells them apart for two classes.

`gradient`, `gradient_times_input`, `guided_backpropagation`, and `integrated_gradients` (which needs captum: the extra
`saliency`) are saliencies; `contrastive_saliency` shows what speaks for a class and not for its rivals, by any of them;
`filter_similarity` and `average_difference` say how alike two of them are.
"""

from diffcam_fast.saliency.contrast import ContrastiveSaliency, contrastive_saliency
from diffcam_fast.saliency.gradients import Saliency, gradient, gradient_times_input
from diffcam_fast.saliency.guided import guided_backpropagation
from diffcam_fast.saliency.integrated_gradients import IntegratedGradients, integrated_gradients
from diffcam_fast.saliency.measures import average_difference, filter_similarity

__all__ = [
    "gradient",
    "gradient_times_input",
    "guided_backpropagation",
    "integrated_gradients",
    "IntegratedGradients",
    "Saliency",
    "contrastive_saliency",
    "ContrastiveSaliency",
    "filter_similarity",
    "average_difference",
]
