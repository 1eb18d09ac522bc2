"""Logit differences and their cotangents in Triton: one program a row of logits and target.

Rivals are a prefix of an order: of the logits, descending, or of their distances to the class's, ascending. A short
prefix is selected one rival after the other; for a long one the rows are sorted first. Either way the last rival is
a threshold that tells for every class whether it is a member, so cotangents are written densely, each element once.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import triton_op, wrap_triton

from diffcam_fast.backends.triton.launching import NARROW, block, float_bits, on_device_of
from diffcam_fast.backends.triton.tiles import from_bits, multiple
from diffcam_fast.reference import logit_difference as reference
from diffcam_fast.reference.cam import accumulation_dtype
from diffcam_fast.reference.logit_difference import FINER_EPS as _FINER_EPS

FINER_EPS = tl.constexpr(_FINER_EPS)

# Selection takes a pass over the row for each rival. So many places of 4 bits fit into one 64-bit argument.
_MOST_SELECTED = 15
_BLOCK = 2048
_LOGITS_PER_THREAD = 8


@triton.jit
def _load_logits(row, k, count, stride, WIDE: tl.constexpr, ACCUMULATOR: tl.constexpr):
    if WIDE:
        k = k.to(tl.int64)
    return tl.load(row + k * stride, mask=(k >= 0) & (k < count), other=0).to(ACCUMULATOR)


@triton.jit
def _sort_key(x, own, NEAREST: tl.constexpr):
    """Integers whose descending order is that of the rivals, as PyTorch sorts: NaN is the largest number.

    The smallest integer is left for classes that do not compete.
    """
    INTEGER: tl.constexpr = tl.int64 if x.dtype == tl.float64 else tl.int32
    LARGEST: tl.constexpr = 0x7FFFFFFFFFFFFFFF if x.dtype == tl.float64 else 0x7FFFFFFF
    if NEAREST:
        x = -tl.abs(x - own)
    broken = x != x
    # Both zeros are equal.
    bits = tl.where(x == 0, 0.0, x).to(INTEGER, bitcast=True)
    key = tl.where(bits < 0, bits ^ LARGEST, bits)
    return tl.where(broken, (1 - LARGEST) if NEAREST else LARGEST, key)


@triton.jit
def _is_at_or_before(key, k, last_key, last_k):
    """Whether a class is the given one or comes before it in the order; ties go to the lower index."""
    return (key > last_key) | ((key == last_key) & (k <= last_k))


@triton.jit
def _next_rival(row, c, own, last_key, last_k, count, stride, NEAREST: tl.constexpr, WIDE: tl.constexpr,
                BLOCK: tl.constexpr):  # fmt: skip
    """The class other than `c` that comes next after a given place in the order, and its key."""
    NONE: tl.constexpr = -0x7FFFFFFFFFFFFFFF - 1 if own.dtype == tl.float64 else -0x7FFFFFFF - 1
    lanes = tl.arange(0, BLOCK)
    best_key = tl.full((BLOCK,), NONE, last_key.dtype)
    best_k = tl.full((BLOCK,), 0x7FFFFFFF, tl.int32)
    for start in range(0, count, BLOCK):
        k = start + lanes
        key = _sort_key(_load_logits(row, k, count, stride, WIDE, own.dtype), own, NEAREST)
        competes = (k < count) & (k != c) & ~_is_at_or_before(key, k, last_key, last_k)
        better = competes & (key > best_key)
        best_key = tl.where(better, key, best_key)
        best_k = tl.where(better, k, best_k)
    key = tl.max(best_key, 0)
    return key, tl.min(tl.where(best_key == key, best_k, 0x7FFFFFFF), 0)


@triton.jit
def _largest(row, skipped, count, stride, WIDE: tl.constexpr, ACCUMULATOR: tl.constexpr, BLOCK: tl.constexpr):
    """The largest logit but that of class `skipped`; NaN where there is one."""
    lanes = tl.arange(0, BLOCK)
    high = tl.full((BLOCK,), float("-inf"), ACCUMULATOR)
    broken = tl.zeros((BLOCK,), tl.int32)
    for start in range(0, count, BLOCK):
        k = start + lanes
        x = _load_logits(row, k, count, stride, WIDE, ACCUMULATOR)
        counts = (k < count) & (k != skipped)
        high = tl.where(counts & (x > high), x, high)
        broken = tl.where(counts & (x != x), 1, broken)
    return tl.where(tl.max(broken, 0) > 0, float("nan"), tl.max(high, 0))


@triton.jit
def _with_strongest(
    row, c, own, delta, cotangent, rivals, differences, compared, temperature, count, stride,
    BASELINE: tl.constexpr, SELECT: tl.constexpr, WIDE: tl.constexpr, PLACES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Contrast a class with all others, or with the strongest of them."""
    ACCUMULATOR: tl.constexpr = own.dtype
    INTEGER: tl.constexpr = tl.int64 if own.dtype == tl.float64 else tl.int32
    lanes = tl.arange(0, BLOCK)
    last_key = tl.full((), 0x7FFFFFFFFFFFFFFF if own.dtype == tl.float64 else 0x7FFFFFFF, INTEGER)
    last_k = tl.full((), -1, tl.int32)
    first_k = tl.full((), -1, tl.int32)

    if SELECT == "all":
        members = count - 1
        centre = _largest(row, c, count, stride, WIDE, ACCUMULATOR, BLOCK)
    elif SELECT == "few":
        members = tl.maximum(compared, 1)
        places = tl.arange(0, PLACES)
        found = tl.full((PLACES,), -1, tl.int32)
        for place in range(members):
            last_key, last_k = _next_rival(row, c, own, last_key, last_k, count, stride, False, WIDE, BLOCK)
            found = tl.where(places == place, last_k, found)
        first_k = tl.max(tl.where(places == 0, found, -1), 0)
        centre = _load_logits(row, first_k, count, stride, WIDE, ACCUMULATOR)
        strongest = _load_logits(row, found, count, stride, WIDE, ACCUMULATOR)
        tl.store(rivals + places, found, mask=places < compared)
        tl.store(differences + places, own - strongest, mask=places < compared)
    else:
        members = compared
        first_k = tl.load(rivals).to(tl.int32)
        last_k = tl.load(rivals + compared - 1).to(tl.int32)
        centre = _load_logits(row, first_k, count, stride, WIDE, ACCUMULATOR)
        last_key = _sort_key(_load_logits(row, last_k, count, stride, WIDE, ACCUMULATOR), own, False)

    sums = tl.zeros((BLOCK,), ACCUMULATOR)
    weighted = tl.zeros((BLOCK,), ACCUMULATOR)
    if BASELINE != "max":
        for start in range(0, count, BLOCK):
            k = start + lanes
            x = _load_logits(row, k, count, stride, WIDE, ACCUMULATOR)
            member = (k < count) & (k != c)
            if SELECT != "all":
                member = member & _is_at_or_before(_sort_key(x, own, False), k, last_key, last_k)
            centred = x - centre
            if BASELINE == "mean":
                sums += tl.where(member, centred, 0)
            else:
                e = tl.exp(centred / temperature)
                sums += tl.where(member, e, 0)
                # A logit of minus infinity has no weight, and must not turn the sum into NaN.
                weighted += tl.where(member & (e != 0), e * centred, 0)
    total = tl.sum(sums, 0)
    mean = tl.sum(weighted, 0) / total

    # What is left is one number, for which float64 costs nothing.
    value = tl.zeros((), tl.float64)
    if BASELINE == "mean":
        value = total.to(tl.float64) / members
    elif BASELINE == "logsumexp":
        value = temperature.to(tl.float64) * tl.log(total.to(tl.float64))
    elif BASELINE == "expected":
        value = mean.to(tl.float64)
    tl.store(delta, ((own.to(tl.float64) - centre.to(tl.float64)) - value).to(ACCUMULATOR))

    for start in range(0, count, BLOCK):
        k = start + lanes
        if BASELINE == "max":
            derivative = tl.where(k == first_k, 1.0, 0.0).to(ACCUMULATOR)
        else:
            x = _load_logits(row, k, count, stride, WIDE, ACCUMULATOR)
            if BASELINE == "mean":
                derivative = tl.full((BLOCK,), 1.0, ACCUMULATOR) / members
            else:
                centred = x - centre
                derivative = tl.exp(centred / temperature) / total
                if BASELINE == "expected":
                    centred = tl.where(derivative > 0, centred, 0)
                    derivative = derivative * (1 + (centred - mean) / temperature)
            if SELECT != "all":
                member = _is_at_or_before(_sort_key(x, own, False), k, last_key, last_k)
                derivative = tl.where(member, derivative, 0)
        tl.store(cotangent + k, tl.where(k == c, 1, -derivative), mask=k < count)


@triton.jit
def _with_nearest(
    row, c, own, delta, cotangent, rivals, differences, compared, places_of_ranks, selected, alpha, count, stride,
    WIDE: tl.constexpr, PLACES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """FinerCAM's target (Zhang et al. 2025), as the reference has it.

    `places_of_ranks` holds, 4 bits a rank, one more than a rank's place among the results; 0: it is not wanted.
    """
    ACCUMULATOR: tl.constexpr = own.dtype
    INTEGER: tl.constexpr = tl.int64 if own.dtype == tl.float64 else tl.int32
    lanes = tl.arange(0, BLOCK)
    places = tl.arange(0, PLACES)
    found = tl.full((PLACES,), -1, tl.int32)
    last_key = tl.full((), 0x7FFFFFFFFFFFFFFF if own.dtype == tl.float64 else 0x7FFFFFFF, INTEGER)
    last_k = tl.full((), -1, tl.int32)
    rest = tl.cast(places_of_ranks, tl.int64)
    for _ in range(selected):
        last_key, last_k = _next_rival(row, c, own, last_key, last_k, count, stride, True, WIDE, BLOCK)
        found = tl.where(places == (rest & 15) - 1, last_k, found)
        rest = rest >> 4

    centre = _largest(row, -1, count, stride, WIDE, ACCUMULATOR, BLOCK)
    sums = tl.zeros((BLOCK,), ACCUMULATOR)
    for start in range(0, count, BLOCK):
        k = start + lanes
        x = _load_logits(row, k, count, stride, WIDE, ACCUMULATOR)
        sums += tl.where(k < count, tl.exp(x - centre), 0)
    total = tl.sum(sums, 0)

    inside = places < compared
    nearest = _load_logits(row, found, count, stride, WIDE, ACCUMULATOR)
    tl.store(rivals + places, found, mask=inside)
    tl.store(differences + places, own - nearest, mask=inside)
    weights = tl.where(inside, (tl.exp(nearest - centre) / total).to(tl.float64), 0)
    contrasts = own.to(tl.float64) - alpha * nearest.to(tl.float64)
    weight = tl.sum(weights, 0)
    scale = 1 / (weight + FINER_EPS)
    difference = tl.sum(tl.where(inside, weights * contrasts, 0), 0) * scale
    tl.store(delta, difference.to(ACCUMULATOR))

    shared = (difference * scale * -FINER_EPS).to(ACCUMULATOR)
    added = tl.where(inside, scale * weights * (contrasts - alpha - difference), 0).to(ACCUMULATOR)
    to_own = (scale * weight).to(ACCUMULATOR)
    for start in range(0, count, BLOCK):
        k = start + lanes
        x = _load_logits(row, k, count, stride, WIDE, ACCUMULATOR)
        value = shared * (tl.exp(x - centre) / total)
        value += tl.sum(tl.where(k[:, None] == found[None, :], added[None, :], 0), 1)
        value += tl.where(k == c, to_own, 0)
        tl.store(cotangent + k, value, mask=k < count)


@triton.jit
def _take(
    logits, classes, order, rivals, differences, targets, count, compared, image_stride, class_stride,
    classes_image, classes_target, WIDE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The first `compared` of a row's classes, in an order given, but the target's own."""
    ACCUMULATOR: tl.constexpr = differences.dtype.element_ty
    program = tl.program_id(0).to(tl.int64)
    image = program // targets
    row = logits + image * image_stride
    order += image * count
    lanes = tl.arange(0, BLOCK)
    chosen = tl.load(classes + image * classes_image + program % targets * classes_target)
    if (chosen >= 0) & (chosen < count):
        own = _load_logits(row, chosen, count, class_stride, WIDE, ACCUMULATOR)
        own_places = tl.full((BLOCK,), 0x7FFFFFFF, tl.int32)
        for start in range(0, count, BLOCK):
            place = start + lanes
            k = tl.load(order + place, mask=place < count, other=-1)
            own_places = tl.where(k == chosen, place, own_places)
        own_place = tl.min(own_places, 0)
        for start in range(0, compared, BLOCK):
            place = start + lanes
            inside = place < compared
            rival = tl.load(order + place + (place >= own_place), mask=inside, other=-1)
            x = _load_logits(row, rival, count, class_stride, WIDE, ACCUMULATOR)
            tl.store(rivals + program * compared + place, rival, mask=inside)
            tl.store(differences + program * compared + place, own - x, mask=inside)


@triton.jit
def _contrast(
    logits, classes, deltas, cotangents, rivals, differences, targets, count, compared, places_of_ranks,
    selected, temperature_bits, alpha_bits, image_stride, class_stride, classes_image, classes_target,
    BASELINE: tl.constexpr, SELECT: tl.constexpr, WIDE: tl.constexpr, VECTOR: tl.constexpr, PLACES: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """One row and target."""
    ACCUMULATOR: tl.constexpr = deltas.dtype.element_ty
    count = multiple(count, VECTOR)
    image_stride = multiple(image_stride, VECTOR)
    program = tl.program_id(0).to(tl.int64)
    image = program // targets
    row = logits + image * image_stride
    chosen = tl.load(classes + image * classes_image + program % targets * classes_target)
    delta = deltas + program
    cotangent = cotangents + program * count
    rivals += program * compared
    differences += program * compared
    if (chosen >= 0) & (chosen < count):
        c = chosen.to(tl.int32)
        own = _load_logits(row, c, count, class_stride, WIDE, ACCUMULATOR)
        if BASELINE == "finer":
            alpha = from_bits(alpha_bits, tl.float64)
            _with_nearest(row, c, own, delta, cotangent, rivals, differences, compared, places_of_ranks, selected,
                          alpha, count, class_stride, WIDE, PLACES, BLOCK)  # fmt: skip
        else:
            temperature = from_bits(temperature_bits, ACCUMULATOR)
            _with_strongest(row, c, own, delta, cotangent, rivals, differences, compared, temperature, count,
                            class_stride, BASELINE, SELECT, WIDE, PLACES, BLOCK)  # fmt: skip
    else:
        # No class: nothing can be read, and nobody is told but by the result.
        nothing = tl.full((BLOCK,), float("nan"), ACCUMULATOR)
        tl.store(delta, tl.full((), float("nan"), ACCUMULATOR))
        for start in range(0, count, BLOCK):
            k = start + tl.arange(0, BLOCK)
            tl.store(cotangent + k, nothing, mask=k < count)
            tl.store(rivals + k, tl.full((BLOCK,), -1, tl.int64), mask=k < compared)
            tl.store(differences + k, nothing, mask=k < compared)


def logit_difference(
    logits: Tensor,
    classes: Tensor,
    baseline: str,
    top_k: int,
    temperature: float,
    alpha: float,
    ranks: list[int],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`diffcam_fast.reference.logit_difference.logit_difference`, its arguments and results, on a GPU.

    A target whose class is out of range gets NaN, and rivals of -1.
    """
    with on_device_of(logits):
        return _logit_difference(logits, classes, baseline, top_k, temperature, alpha, ranks, traced=False)


@triton_op("diffcam_fast_triton::logit_difference", mutates_args=())
def logit_difference_op(
    logits: Tensor,
    classes: Tensor,
    baseline: str,
    top_k: int,
    temperature: float,
    alpha: float,
    ranks: list[int],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`logit_difference` as an op that `torch.compile` sees through."""
    return _logit_difference(logits, classes, baseline, top_k, temperature, alpha, ranks, traced=True)


def _logit_difference(
    logits: Tensor,
    classes: Tensor,
    baseline: str,
    top_k: int,
    temperature: float,
    alpha: float,
    ranks: list[int],
    traced: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dtype = accumulation_dtype(logits.dtype)
    images, targets = classes.shape
    count = logits.shape[1]
    finer = baseline == "finer"
    selected = max(ranks) if finer else max(top_k, 1)
    if finer and selected > _MOST_SELECTED:
        return _finer_of_many(logits, classes, alpha, ranks)
    compared = len(ranks) if finer else top_k
    delta = logits.new_empty((images, targets), dtype=dtype)
    cotangent = logits.new_empty((images, targets, count), dtype=dtype)
    rivals = classes.new_empty((images, targets, compared))
    differences = logits.new_empty((images, targets, compared), dtype=dtype)
    if images * targets == 0:
        return delta, cotangent, rivals, differences

    wide = bool(count * logits.stride(1) >= NARROW)
    size = block(count, _BLOCK, 64)
    warps = block(size // (32 * _LOGITS_PER_THREAD), 8)
    select = "few"
    if top_k == 0 and baseline not in ("max", "finer"):
        select = "all"
    elif selected > _MOST_SELECTED:
        select = "given"
        order = logits.to(dtype).sort(dim=-1, descending=True, stable=True).indices
        launch = wrap_triton(_take) if traced else _take
        launch[(images * targets,)](
            logits, classes, order, rivals, differences, targets, count, compared, *logits.stride(), *classes.stride(),
            WIDE=wide, BLOCK=size, num_warps=warps,
        )  # fmt: skip
    places_of_ranks = sum((place + 1) << (4 * (rank - 1)) for place, rank in enumerate(ranks))
    # As 1000 is. Multiples of 16 are seen anyway.
    rows_align = logits.stride(1) == 1 and logits.stride(0) % 4 == 0 and count % 4 == 0 and count % 16 != 0
    launch = wrap_triton(_contrast) if traced else _contrast
    launch[(images * targets,)](
        logits, classes, delta, cotangent, rivals, differences, targets, count, compared, places_of_ranks,
        selected, float_bits(temperature), float_bits(alpha), *logits.stride(), *classes.stride(),
        BASELINE=baseline, SELECT=select, WIDE=wide, VECTOR=4 if rows_align else 1,
        PLACES=block(selected if select == "few" else 1, 16), BLOCK=size, num_warps=warps,
    )  # fmt: skip
    return delta, cotangent, rivals, differences


def _finer_of_many(
    logits: Tensor, classes: Tensor, alpha: float, ranks: list[int]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """FinerCAM over ranks too high to select one by one: PyTorch sorts, and the rest is small beside that."""
    known = ((classes >= 0) & (classes < logits.shape[1])).unsqueeze(-1)
    delta, cotangent, rivals, differences = reference.logit_difference(
        logits, classes.clamp(0, logits.shape[1] - 1), "finer", 0, 1.0, alpha, ranks
    )
    return (
        delta.where(known.squeeze(-1), torch.nan),
        cotangent.where(known, torch.nan),
        rivals.where(known, -1),
        differences.where(known, torch.nan),
    )
