"""The ops: one file each, with schema, shape inference, autograd and the documented Python function."""

from diffcam_fast.ops.cam import cam
from diffcam_fast.ops.logit_difference import LogitDifferenceResult, logit_difference
from diffcam_fast.ops.overlay import overlay
from diffcam_fast.ops.saliency_contrast import saliency_contrast

__all__ = ["LogitDifferenceResult", "cam", "logit_difference", "overlay", "saliency_contrast"]
