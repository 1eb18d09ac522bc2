"""Cotangents of many classes by what they have in common.

The cotangent of a class's score is a one-hot vector at the class, and rivals' weights which most classes of an image
share: with a thousand classes they need not be written down a thousand times. Only the strongest classes, which are
among their own rivals' rivals, have weights of their own.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from diffcam_fast.ops.logit_difference import logit_difference


class SharedCotangent(NamedTuple):
    """``cotangent[n, t] = own[n, t] one_hot(classes[n, t]) + sum_r mix[n, t, r] shared[n, r]``.

    None in place of `own` stands for ones, in place of `mix` and `shared` for nothing that is shared.
    """

    classes: Tensor
    """(N, T), int64."""

    own: Tensor | None = None
    """(N, T)."""

    mix: Tensor | None = None
    """(N, T, R)."""

    shared: Tensor | None = None
    """(N, R, K)."""

    def targets(self, some: slice) -> SharedCotangent:
        """Some of the targets."""
        return SharedCotangent(
            self.classes[:, some],
            None if self.own is None else self.own[:, some],
            None if self.mix is None else self.mix[:, some],
            self.shared,
        )

    def times(self, weight: Tensor) -> Tensor:
        """``cotangent @ weight``, (N, T, C), for a weight (K, C)."""
        product = torch.embedding(weight, self.classes)
        if self.own is not None:
            product *= self.own.unsqueeze(2)
        if self.mix is None or self.shared is None:
            return product
        return torch.baddbmm(product, self.mix, self.shared @ weight)


class SharedScores(NamedTuple):
    """As `Scores`, with the cotangents by what they share."""

    delta: Tensor
    cotangent: SharedCotangent
    rivals: Tensor | None = None


def one_hot_scores(logits: Tensor, classes: Tensor) -> SharedScores:
    """Scores that are the classes' logits."""
    return SharedScores(logits.gather(1, classes), SharedCotangent(classes))


def difference_scores(
    logits: Tensor, classes: Tensor, baseline: str, top_k: int | None, temperature: float
) -> SharedScores:
    """Logit differences, as `diffcam_fast.logit_difference` defines them."""
    strongest = _strongest(logits, (top_k or 1) + 1)
    special = strongest[:, :-1]
    if top_k is None and baseline != "max":
        exact = logit_difference(logits, special, baseline=baseline, temperature=temperature)
        delta, own, mix, shared = _all_rivals(logits, classes, baseline, temperature)
        rivals = None
    else:
        # The classes that are not among the top k have the same rivals, with the same weights.
        k = top_k or 1
        every = logit_difference(logits, strongest, baseline=baseline, top_k=k, temperature=temperature)
        assert every.rivals is not None
        other = strongest[:, -1:]
        shared = every.cotangent[:, -1:].scatter(2, other.unsqueeze(2), 0.0)
        beta = logits.gather(1, other) - every.delta[:, -1:]
        delta = logits.gather(1, classes) - beta
        own = torch.ones_like(delta)
        mix = torch.ones_like(delta).unsqueeze(2)
        exact = type(every)(every.delta[:, :-1], every.cotangent[:, :-1], None, None)
        rivals = None
        if top_k is not None:
            rivals = _picked(every.rivals, classes, special)
    same = classes.unsqueeze(2) == special.unsqueeze(1)
    is_special = same.any(2)
    one = same.to(logits.dtype)
    delta = torch.where(is_special, (one * exact.delta.unsqueeze(1)).sum(2), delta)
    own = own.masked_fill(is_special, 0.0)
    mix = torch.cat([mix.masked_fill(is_special.unsqueeze(2), 0.0), one], 2)
    return SharedScores(delta, SharedCotangent(classes, own, mix, torch.cat([shared, exact.cotangent], 1)), rivals)


def pairwise_scores(logits: Tensor, classes: Tensor, top_k: int) -> SharedScores:
    """Differences from each of the `top_k` strongest rivals: targets ``(N, T * top_k)``, a class's together."""
    strongest = _strongest(logits, top_k + 1)
    every = logit_difference(logits, strongest, baseline="max", top_k=top_k)
    assert every.rivals is not None
    rivals = _picked(every.rivals, classes, strongest[:, :-1])
    each = classes.unsqueeze(2).expand_as(rivals)
    delta = logits.gather(1, each.flatten(1)) - logits.gather(1, rivals.flatten(1))
    shared = torch.zeros((*strongest.shape, logits.shape[1]), dtype=logits.dtype, device=logits.device)
    shared.scatter_(2, strongest.unsqueeze(2), 1.0)
    mix = -(rivals.flatten(1).unsqueeze(2) == strongest.unsqueeze(1)).to(logits.dtype)
    cotangent = SharedCotangent(each.flatten(1), torch.ones_like(delta), mix, shared)
    return SharedScores(delta, cotangent, rivals)


def _strongest(logits: Tensor, count: int) -> Tensor:
    # Ties to the lower index, as everywhere; topk does not promise that.
    return logits.sort(dim=1, descending=True, stable=True).indices[:, :count]


def _picked(rivals: Tensor, classes: Tensor, special: Tensor) -> Tensor:
    """Rivals (N, T, k) of classes, from those of the special ones (N, s + 1, k), the last row being all others'."""
    same = classes.unsqueeze(2) == special.unsqueeze(1)
    row = torch.where(same.any(2), same.to(torch.int64).argmax(2), special.shape[1])
    return rivals.gather(1, row.unsqueeze(2).expand(-1, -1, rivals.shape[2]))


def _all_rivals(
    logits: Tensor, classes: Tensor, baseline: str, temperature: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Delta, own, mix and shared where all other classes are rivals; exact but for the strongest class."""
    count = logits.shape[1]
    centred = logits - logits.amax(1, keepdim=True)
    z = centred.gather(1, classes)
    if baseline == "mean":
        total = centred.sum(1, keepdim=True)
        delta = z - (total - z) / (count - 1)
        own = torch.full_like(z, count / (count - 1))
        mix = torch.full_like(z, -1 / (count - 1)).unsqueeze(2)
        return delta, own, mix, torch.ones_like(logits).unsqueeze(1)
    p = (centred / temperature).softmax(1)
    chosen = p.gather(1, classes)
    others = 1 - chosen  # at least a half, for all but the strongest class
    if baseline == "logsumexp":
        everything = temperature * (centred / temperature).logsumexp(1, keepdim=True)
        delta = z - everything - temperature * torch.log1p(-chosen)
        return delta, 1 / others, (-1 / others).unsqueeze(2), p.unsqueeze(1)
    weighted = p * centred
    beta = (weighted.sum(1, keepdim=True) - chosen * z) / others
    own = 1 + chosen / others * (1 + (z - beta) / temperature)
    mix = torch.stack([-(1 - beta / temperature) / others, -1 / (temperature * others)], 2)
    return z - beta, own, mix, torch.stack([p, weighted], 1)
