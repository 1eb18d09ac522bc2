"""How far a model's explanations can be trusted: attacks on maps, and measures of what they did.

Passive fooling (`PassiveFooling`, its losses, `SalienceHoax`), shifted logits (`shift_logits`), adversarial images
(`fgsm`, `bim`, `carlini_wagner`, which need Foolbox: the extra `robustness`), the agreement of maps (`ssim`, `pearson`,
`rmse`, `top_overlap`, `map_entropy`) and what a perturbation does to them (`nissim`, `mod`, `vid`, `RegionShift`).
"""

from diffcam_fast.robustness.adversarial import Adversarial, bim, carlini_wagner, fgsm
from diffcam_fast.robustness.agreement import pearson, rmse, ssim, top_overlap
from diffcam_fast.robustness.fooling import PassiveFooling, Step
from diffcam_fast.robustness.fooling_losses import (
    ActiveLoss,
    CentreOfMassLoss,
    HoaxLoss,
    LocationLoss,
    MapLoss,
    TopKLoss,
)
from diffcam_fast.robustness.hoax import SalienceHoax, map_entropy
from diffcam_fast.robustness.logit_shift import CornerSum, RegionSum, shift_logits
from diffcam_fast.robustness.region_shift import RegionShift, mod, nissim, psnr, vid

__all__ = [
    "PassiveFooling",
    "Step",
    "MapLoss",
    "HoaxLoss",
    "LocationLoss",
    "TopKLoss",
    "CentreOfMassLoss",
    "ActiveLoss",
    "SalienceHoax",
    "map_entropy",
    "shift_logits",
    "CornerSum",
    "RegionSum",
    "fgsm",
    "bim",
    "carlini_wagner",
    "Adversarial",
    "ssim",
    "pearson",
    "rmse",
    "top_overlap",
    "nissim",
    "mod",
    "vid",
    "psnr",
    "RegionShift",
]
