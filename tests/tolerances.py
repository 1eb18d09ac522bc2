"""Every tolerance of the suite, in one place, with the reason for its size."""

from __future__ import annotations

import torch

#: Maps against the float64 reference, as a share of the map's range. float32 rounds sums of thousands of products.
MAP_SHARE_OF_RANGE = {torch.float32: 1e-5, torch.float64: 1e-12}

#: Half precisions: the input itself is rounded, so the reference run in that dtype errs too. At most this many times
#: the reference's own error, plus float32 rounding.
HALF_ERROR_RATIO = 2.0

#: Logit differences and cotangents, absolute, for logits of order 10.
LOGIT_DIFFERENCE = {torch.float32: 2e-6, torch.float64: 1e-13}

#: Two orders of summation of the same float32 numbers, as a share of range.
REORDERED_SUM = 1e-5

#: Maps of whole networks against another library's, as a share of range.
PEER_SHARE_OF_RANGE = 1e-4

#: Values of pictures in uint8: two orders of rounding, and another library's.
PIXEL = 1

#: Triton's interpreter cuts off what does not fit into bfloat16: one unit in its last place, as a share of the largest.
INTERPRETED_BFLOAT16 = 2**-7

#: Maps of a drop-in against the library whose names it has, as a share of range: what users are promised.
COMPAT_SHARE_OF_RANGE = 1e-5

#: Probabilities of a network whose logits all got the same number added, in float32: what is promised.
GAUGE_PROBABILITY = 1e-6

#: Maps of logit differences of such a network, as a share of range, in float32: what is promised.
GAUGE_SHARE_OF_RANGE = 1e-4

#: captum rounds the weights of its quadrature to float32.
CAPTUM_WEIGHTS = 1e-6
