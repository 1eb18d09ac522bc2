"""`logit_difference` against the float64 reference, and the facts that make it worth having."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import diffcam_fast as dcf
from diffcam_fast.backends import use_backend
from diffcam_fast.reference.logit_difference import BASELINES, TEMPERED
from diffcam_fast.reference.logit_difference import logit_difference as reference
from tests.tolerances import LOGIT_DIFFERENCE

pytestmark = pytest.mark.usefixtures("poisoned_memory")

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
OP = torch.ops.diffcam_fast.logit_difference.default


def _embedded(values: Tensor) -> Tensor:
    """The same values as every second element of a larger tensor whose other elements are NaN."""
    wide = torch.full([2 * size for size in values.shape], math.nan, dtype=values.dtype)
    return wide[::2, ::2].copy_(values)


def _with_margin(values: Tensor) -> Tensor:
    """The same values side by side, each image's behind a NaN and before another."""
    wide = torch.full((values.shape[0], values.shape[1] + 2), math.nan, dtype=values.dtype)
    return wide[:, 1:-1].copy_(values)


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda values: values.contiguous(),
    "transposed": lambda values: values.t().contiguous().t(),
    "strided": _embedded,
    "margin": _with_margin,
    "expanded": lambda values: values[:1].expand_as(values),
}


def _canonical(
    baseline: str,
    top_k: int | None = None,
    temperature: float = 1.0,
    alpha: float = 1.0,
    ranks: tuple[int, ...] = (1, 2, 3),
) -> tuple[Any, ...]:
    """The op's arguments after logits and classes."""
    return baseline, top_k or 0, temperature, alpha, list(ranks) if baseline == "finer" else []


def _options(class_count: int) -> list[dict[str, Any]]:
    """Every kind of option once."""
    most = class_count - 1
    options: list[dict[str, Any]] = []
    for baseline in BASELINES[:-1]:
        options += [{"baseline": baseline, "top_k": k} for k in (None, most // 2 + 1)]
    for baseline in TEMPERED:
        options += [{"baseline": baseline, "top_k": k, "temperature": t} for k, t in ((None, 0.5), (most, 3.0))]
    options += [{"baseline": "finer", "ranks": (1,)}, {"baseline": "finer", "ranks": (most, 1), "alpha": 0.6}]
    return options


GAUGE_INVARIANT = [option for option in _options(5) if option.get("alpha", 1.0) == 1.0]


def _name(option: Any) -> str:
    return " ".join(f"{key}={value}" for key, value in option.items()) if isinstance(option, dict) else str(option)


def _random(*shape: int, seed: int = 0, scale: float = 3.0, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=generator, dtype=torch.float64) * scale).to(dtype)


def _classes(*shape: int, count: int, seed: int = 0) -> Tensor:
    return torch.randint(0, count, shape, generator=torch.Generator().manual_seed(seed))


def _tolerance(logits: Tensor, temperature: float = 1.0, alpha: float = 1.0, **_: Any) -> float:
    """What the tolerance for logits of order 10 means for these, and these options."""
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    exact = logits.double()
    if not exact.numel():
        return LOGIT_DIFFERENCE[dtype]
    # Only differences between logits matter, but where their factors differ.
    size = (exact.amax() - exact.amin() if alpha == 1 else exact.abs().amax()).item()
    return LOGIT_DIFFERENCE[dtype] * max(1.0, size / 10) * max(1.0, 1 / temperature)


# --- values


@st.composite
def problems(draw: st.DrawFn) -> dict[str, Any]:
    count = draw(st.sampled_from([2, 3, 4, 7, 8, 15, 16, 17, 33, 64, 65, 130]))
    baseline = draw(st.sampled_from(BASELINES))
    option: dict[str, Any] = {"baseline": baseline}
    if baseline == "finer":
        ranks = draw(st.lists(st.integers(1, count - 1), min_size=1, max_size=5, unique=True))
        option |= {"ranks": tuple(ranks), "alpha": draw(st.sampled_from([1.0, 0.6, 0.0, 1.5]))}
    else:
        option["top_k"] = draw(st.none() | st.integers(1, count - 1))
    if baseline in TEMPERED:
        option["temperature"] = draw(st.sampled_from([1.0, 0.5, 3.0]))
    return {
        "shape": (draw(st.integers(0, 4)), count),
        "targets": draw(st.integers(0, 3)),
        "dtype": draw(st.sampled_from(DTYPES)),
        "layout": draw(st.sampled_from(sorted(LAYOUTS))),
        "shift": draw(st.sampled_from([0, 0, 64])),
        "option": option,
        "seed": draw(st.integers(0, 2**31)),
    }


@given(problem=problems())
def test_agrees_with_float64_reference(cpu_backend: str, torch_threads: int, problem: dict[str, Any]) -> None:
    generator = torch.Generator().manual_seed(problem["seed"])
    images, count = problem["shape"]
    # Multiples of 1/4 up to 16 (with the shift, 48 to 80 by halves): exact in every dtype, and rich in ties.
    step = 4 if problem["shift"] == 0 else 2
    exact = torch.randint(-60, 61, (images, count), generator=generator) / 4.0
    exact = (exact * step).round() / step + problem["shift"]
    logits = LAYOUTS[problem["layout"]](exact.to(problem["dtype"]))
    classes = torch.randint(0, count, (images, problem["targets"]), generator=generator)

    found = dcf.logit_difference(logits, classes, **problem["option"])
    expected = reference(logits.double(), classes, *_canonical(**problem["option"]))
    dtype = torch.float64 if problem["dtype"] == torch.float64 else torch.float32
    allowed = _tolerance(logits, **problem["option"])
    for name, got, want in zip(found._fields, found, expected, strict=True):
        if got is None:
            assert want.shape[-1] == 0
            continue
        assert got.shape == want.shape and got.is_contiguous(), name
        if name == "rivals":
            assert torch.equal(got, want)
            continue
        assert got.dtype == dtype
        torch.testing.assert_close(
            got.double(), want, atol=allowed, rtol=0, msg=lambda text, name=name: f"{name}: {text}"
        )


@pytest.mark.parametrize(("dtype", "count"), [(torch.float32, 21841), *((dtype, 1000) for dtype in DTYPES)])
def test_sizes_of_real_classifiers(cpu_backend: str, dtype: torch.dtype, count: int) -> None:
    logits = _random(3, count, dtype=dtype)
    classes = torch.stack([logits.argmax(-1), logits.argmin(-1)], 1)
    for option in ({"baseline": name, "top_k": k} for name in BASELINES[:-1] for k in (None, 5, count // 2)):
        found = dcf.logit_difference(logits, classes, **option)
        expected = reference(logits.double(), classes, *_canonical(**option))
        for got, want in zip(found, expected, strict=True):
            if got is not None:
                torch.testing.assert_close(got.to(want.dtype), want, atol=2 * _tolerance(logits), rtol=0)


@pytest.mark.parametrize("option", _options(1000), ids=_name)
def test_same_bits_whatever_the_number_of_threads(option: dict[str, Any]) -> None:
    logits, classes = _random(37, 1000, dtype=torch.float32), _classes(37, 2, count=1000)
    before = torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2, 3, 2):
            torch.set_num_threads(threads)
            found.append(dcf.logit_difference(logits, classes, **option))
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert all(a is b is None or torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


def test_one_target_an_image_has_no_target_dimension(cpu_backend: str) -> None:
    logits, classes = _random(4, 6), _classes(4, count=6)
    for option in ({"top_k": 2}, {"baseline": "finer"}, {}):
        single = dcf.logit_difference(logits, classes, **option)
        several = dcf.logit_difference(logits, classes.unsqueeze(1), **option)
        for one, many in zip(single, several, strict=True):
            assert one is many is None or torch.equal(one, many.squeeze(1))
    assert single.rivals is None and single.differences is None


@pytest.mark.parametrize("dtype", [torch.int32, torch.int16, torch.int8, torch.uint8])
def test_classes_of_any_integer_dtype(dtype: torch.dtype) -> None:
    logits, classes = _random(4, 6), _classes(4, 2, count=6)
    expected = dcf.logit_difference(logits, classes)
    found = dcf.logit_difference(logits, classes.to(dtype).t().contiguous().t())
    assert torch.equal(found.cotangent, expected.cotangent)


def test_ties_go_to_the_lower_index_and_a_class_is_never_its_own_rival(cpu_backend: str) -> None:
    logits = torch.tensor([[2.0, 5.0, 2.0, 5.0, 5.0, 2.0]])
    classes = torch.tensor([[3, 0, 5]])
    found = dcf.logit_difference(logits, classes, baseline="max", top_k=5)
    assert found.rivals.tolist() == [[[1, 4, 0, 2, 5], [1, 3, 4, 2, 5], [1, 3, 4, 0, 2]]]
    assert found.cotangent[0, 0].tolist() == [0, -1, 0, 1, 0, 0]
    nearest = dcf.logit_difference(logits, classes, baseline="finer", ranks=(1, 2, 3, 4, 5))
    assert nearest.rivals.tolist() == [[[1, 4, 0, 2, 5], [2, 5, 1, 3, 4], [0, 2, 1, 3, 4]]]
    absent = torch.full((1, 4), -math.inf)
    absent[0, 2] = 1.0
    found = dcf.logit_difference(absent, torch.tensor([[1, 2]]), baseline="max", top_k=3)
    assert found.rivals.tolist() == [[[2, 0, 3], [0, 1, 3]]]


def test_ranks_are_reported_in_the_order_given(cpu_backend: str) -> None:
    logits = torch.tensor([[0.0, 1.0, 3.0, 7.0, 15.0]])
    found = dcf.logit_difference(logits, torch.tensor([1]), baseline="finer", ranks=(3, 1))
    assert found.rivals.tolist() == [[3, 0]]
    assert found.differences.tolist() == [[-6.0, 1.0]]


# --- facts


@pytest.mark.parametrize("option", GAUGE_INVARIANT, ids=_name)
@pytest.mark.parametrize("shift", [0.0, 5000.0, -5000.0])
def test_cotangents_sum_to_zero_whatever_is_added_to_all_logits(
    cpu_backend: str, option: dict[str, Any], shift: float
) -> None:
    for dtype, tolerance in LOGIT_DIFFERENCE.items():
        logits = (_random(6, 5) + shift).to(dtype)
        classes = torch.arange(5).expand(6, 5)
        found = dcf.logit_difference(logits, classes, **option)
        assert found.cotangent.sum(-1).abs().amax() <= tolerance
        # The shift rounded the logits; given these, nothing more is lost.
        expected = reference(logits.double(), classes, *_canonical(**option))
        torch.testing.assert_close(found.cotangent.double(), expected[1], atol=10 * tolerance, rtol=0)
        torch.testing.assert_close(found.delta.double(), expected[0], atol=10 * tolerance, rtol=0)


def test_finer_with_another_alpha_is_not_gauge_invariant(cpu_backend: str) -> None:
    found = dcf.logit_difference(_random(6, 5), _classes(6, count=5), baseline="finer", alpha=0.6)
    torch.testing.assert_close(found.cotangent.sum(-1), torch.full((6,), 0.4).double(), atol=1e-6, rtol=0)


def test_two_classes_leave_one_baseline_and_the_softmax_is_its_sigmoid(cpu_backend: str) -> None:
    logits, classes = _random(9, 2), torch.arange(2).expand(9, 2)
    results = [dcf.logit_difference(logits, classes, baseline=name) for name in BASELINES[:-1]]
    results += [dcf.logit_difference(logits, classes, baseline=name, temperature=2.5) for name in TEMPERED]
    for found in results:
        torch.testing.assert_close(found.delta, logits - logits.flip(1), atol=1e-14, rtol=0)
        torch.testing.assert_close(found.delta.sigmoid(), logits.softmax(-1), atol=1e-14, rtol=0)
        assert torch.equal(found.cotangent, torch.tensor([[1.0, -1], [-1, 1]]).double().expand(9, 2, 2))


def test_logsumexp_is_the_log_odds_of_the_class(cpu_backend: str) -> None:
    logits, classes = _random(9, 7).requires_grad_(), torch.arange(7).expand(9, 7)
    found = dcf.logit_difference(logits, classes)
    probabilities = logits.softmax(-1)
    torch.testing.assert_close(found.delta, (probabilities / (1 - probabilities)).log(), atol=1e-12, rtol=0)
    for score in (probabilities, probabilities.log()):
        for c in range(7):
            (gradient,) = torch.autograd.grad(score[:, c].sum(), logits, retain_graph=True)
            factor = (gradient * found.cotangent[:, c]).sum(-1) / found.cotangent[:, c].square().sum(-1)
            assert (factor > 0).all()
            torch.testing.assert_close(gradient, factor.unsqueeze(-1) * found.cotangent[:, c], atol=1e-12, rtol=0)


def test_logsumexp_does_not_vanish_where_the_softmax_saturates(cpu_backend: str) -> None:
    logits = torch.tensor([[120.0, 1.0, 0.0, -3.0]], requires_grad=True)
    probability = logits.softmax(-1)[0, 0]
    assert probability == 1 and torch.autograd.grad(probability, logits)[0].abs().max() == 0
    found = dcf.logit_difference(logits.detach(), torch.tensor([0])).cotangent
    expected = reference(logits.detach().double(), torch.tensor([[0]]), *_canonical("logsumexp"))[1][0]
    assert found.abs().max() == 1
    torch.testing.assert_close(found.double(), expected, atol=1e-7, rtol=0)


def test_baselines_are_ordered(cpu_backend: str) -> None:
    logits, classes = _random(20, 9), _classes(20, count=9)
    own = logits.gather(1, classes.unsqueeze(1)).squeeze(1)
    for top_k, rivals in ((None, 8), (3, 3), (1, 1)):
        beta = {
            name: own - dcf.logit_difference(logits, classes, baseline=name, top_k=top_k).delta
            for name in BASELINES[:-1]
        }
        slack = 1e-13
        assert (beta["mean"] <= beta["logsumexp"] - math.log(rivals) + slack).all()
        assert (beta["logsumexp"] - math.log(rivals) <= beta["max"] + slack).all()
        assert (beta["max"] <= beta["logsumexp"] + slack).all()
        assert (beta["mean"] <= beta["expected"] + slack).all() and (beta["expected"] <= beta["max"] + slack).all()


@pytest.mark.parametrize("option", _options(5), ids=_name)
def test_cotangent_is_the_gradient_of_the_difference(cpu_backend: str, option: dict[str, Any]) -> None:
    logits, classes = _random(6, 5).requires_grad_(), torch.arange(5).expand(6, 5)
    plain = reference(logits, classes, *_canonical(**option))[0]
    found = dcf.logit_difference(logits, classes, **option)
    for target in range(5):
        (by_autograd,) = torch.autograd.grad(plain[:, target].sum(), logits, retain_graph=True)
        torch.testing.assert_close(found.cotangent[:, target].detach(), by_autograd, atol=1e-12, rtol=0)


@pytest.mark.parametrize("alpha", [1.0, 0.6])
@pytest.mark.parametrize("ranks", [(1, 2, 3), (4,), (5, 2)])
def test_finer_is_that_of_pytorch_grad_cam(cpu_backend: str, alpha: float, ranks: tuple[int, ...]) -> None:
    pytest.importorskip("tests.helpers.torchvision_cpu")
    targets = pytest.importorskip("pytorch_grad_cam.utils.model_targets")
    logits, classes = _random(6, 9).requires_grad_(), _classes(6, count=9)
    found = dcf.logit_difference(logits, classes, baseline="finer", alpha=alpha, ranks=ranks)
    for n, row in enumerate(logits):
        # Its own order: of all classes by distance, where place 0 is the class itself.
        order = (row - row[classes[n]]).abs().argsort().tolist()
        score = targets.FinerWeightedTarget(order[0], [order[rank] for rank in ranks], alpha)(row)
        (gradient,) = torch.autograd.grad(score, logits, retain_graph=True)
        torch.testing.assert_close(found.delta[n], score, atol=1e-12, rtol=0)
        torch.testing.assert_close(found.cotangent[n].detach(), gradient[n], atol=1e-12, rtol=0)


# --- edges


@pytest.mark.parametrize("option", _options(5), ids=_name)
@pytest.mark.parametrize(("images", "targets"), [(0, 2), (3, 0), (0, 0)])
def test_empty(cpu_backend: str, option: dict[str, Any], images: int, targets: int) -> None:
    logits = torch.rand(images, 5).requires_grad_()
    found = dcf.logit_difference(logits, torch.zeros(images, targets, dtype=torch.int64), **option)
    assert found.delta.shape == (images, targets) and found.cotangent.shape == (images, targets, 5)
    (found.delta.sum() + found.cotangent.sum()).backward()
    assert torch.equal(logits.grad, torch.zeros(images, 5))


@pytest.mark.parametrize("option", _options(19), ids=_name)
@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
def test_non_finite_logits_stay_in_their_image(cpu_backend: str, option: dict[str, Any], poison: float) -> None:
    logits, classes = _random(4, 19, dtype=torch.float32), torch.tensor([[0, 5]] * 4)
    clean = dcf.logit_difference(logits, classes, **option)
    logits[1, 7], logits[2, 5] = poison, poison
    found = dcf.logit_difference(logits, classes, **option)
    expected = reference(logits, classes, *_canonical(**option))
    for name, got, before, want in zip(found._fields, found, clean, expected, strict=True):
        if got is None:
            continue
        assert torch.equal(got[[0, 3]], before[[0, 3]]), name
        if name == "rivals":
            assert torch.equal(got, want)
        else:
            torch.testing.assert_close(got, want, atol=1e-5, rtol=0, equal_nan=True)


def test_rivals_at_minus_infinity_have_no_weight(cpu_backend: str) -> None:
    logits = _random(3, 6, dtype=torch.float32)
    masked = torch.cat([logits, torch.full((3, 4), -math.inf)], 1)
    classes = _classes(3, 2, count=6)
    for baseline in TEMPERED:
        plain = dcf.logit_difference(logits, classes, baseline=baseline)
        found = dcf.logit_difference(masked, classes, baseline=baseline)
        torch.testing.assert_close(found.delta, plain.delta)
        torch.testing.assert_close(found.cotangent[..., :6], plain.cotangent)
        assert (found.cotangent[..., 6:] == 0).all()


def test_op_called_directly_never_reads_out_of_range(cpu_backend: str) -> None:
    for classes in ([[5]], [[-1]]):
        with pytest.raises((RuntimeError, IndexError)):
            OP(torch.rand(1, 5), torch.tensor(classes), *_canonical("logsumexp"))
    with pytest.raises((RuntimeError, IndexError)):
        OP(torch.rand(1, 5), torch.tensor([[0]]), *_canonical("logsumexp", top_k=5))


# --- autograd


@pytest.fixture(params=("auto", "reference"))
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """What serves by default, and the reference; for what no instruction set can change."""
    with use_backend(request.param):
        yield request.param


@pytest.mark.parametrize("option", _options(4), ids=_name)
def test_gradcheck(backend: str, option: dict[str, Any]) -> None:
    logits, classes = _random(2, 4, scale=1.0).requires_grad_(), _classes(2, 2, count=4)

    def differentiable(z: Tensor) -> tuple[Tensor, ...]:
        found = dcf.logit_difference(z, classes, **option)
        return tuple(part for part in (found.delta, found.cotangent, found.differences) if part is not None)

    assert torch.autograd.gradcheck(differentiable, logits)
    assert torch.autograd.gradgradcheck(lambda z: differentiable(z)[0], logits, fast_mode=True)
    if option["baseline"] not in ("max", "mean"):
        assert torch.autograd.gradgradcheck(lambda z: differentiable(z)[1], logits, fast_mode=True)


@pytest.mark.parametrize("option", _options(5), ids=_name)
def test_backward_is_that_of_the_reference(cpu_backend: str, option: dict[str, Any]) -> None:
    """Through every result at once, and again through the gradient of delta."""
    classes = _classes(3, 2, count=5)
    weights = {"delta": _random(3, 2, seed=1), "cotangent": _random(3, 2, 5, seed=2)}

    def gradients(function: Callable[[Tensor], tuple[Tensor | None, ...]]) -> list[Tensor]:
        logits = _random(3, 5).requires_grad_()
        delta, cotangent, _, differences = function(logits)
        loss = (weights["delta"] * delta).sin().sum() + (weights["cotangent"] * cotangent).sum()
        loss = loss if differences is None else loss + differences.square().sum()
        (first,) = torch.autograd.grad(loss, logits)
        delta = function(logits)[0]
        (inner,) = torch.autograd.grad(delta.square().sum(), logits, create_graph=True)
        (second,) = torch.autograd.grad(inner.square().sum(), logits)
        return [first, second]

    found = gradients(lambda z: dcf.logit_difference(z, classes, **option))
    expected = gradients(lambda z: reference(z, classes, *_canonical(**option)))
    for got, want in zip(found, expected, strict=True):
        torch.testing.assert_close(got, want, atol=1e-10, rtol=0)


@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients_have_the_dtype_of_the_logits(cpu_backend: str, dtype: torch.dtype) -> None:
    logits = _random(3, 5).to(dtype).requires_grad_()
    found = dcf.logit_difference(logits, _classes(3, count=5))
    (gradient,) = torch.autograd.grad(found.delta.sum() + found.cotangent.square().sum(), logits)
    assert gradient.dtype == dtype and gradient.abs().sum() > 0


def test_nothing_is_recorded_where_nothing_requires_a_gradient(cpu_backend: str) -> None:
    logits, classes = _random(3, 5).requires_grad_(), _classes(3, count=5)
    expected = dcf.logit_difference(logits, classes)
    assert expected.delta.requires_grad and expected.cotangent.requires_grad
    with torch.no_grad():
        quiet = dcf.logit_difference(logits, classes)
    with torch.inference_mode():
        inference = dcf.logit_difference(logits.clone(), classes.clone())
    for found in (quiet, inference, dcf.logit_difference(logits.detach(), classes)):
        assert not found.delta.requires_grad and found.cotangent.grad_fn is None
        assert torch.equal(found.cotangent, expected.cotangent)


# --- torch.library and torch.compile


@pytest.mark.parametrize("option", _options(5), ids=_name)
def test_opcheck(backend: str, option: dict[str, Any]) -> None:
    classes = _classes(3, 2, count=5)
    for logits in (_random(3, 5).requires_grad_(), _random(5, 3, dtype=torch.bfloat16).t()):
        torch.library.opcheck(OP, (logits, classes, *_canonical(**option)))


@pytest.mark.parametrize("option", [{"top_k": 2}, {"baseline": "expected"}, {"baseline": "finer"}], ids=_name)
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_into_one_graph(option: dict[str, Any], dynamic: bool) -> None:
    torch._dynamo.reset()

    def explain(logits: Tensor, classes: Tensor) -> Tensor:
        found = dcf.logit_difference(logits * 2, classes, **option)
        return found.delta.unsqueeze(-1) * found.cotangent.exp() + 1

    compiled = torch.compile(explain, fullgraph=True, dynamic=dynamic)
    for images, count in ((3, 6), (5, 9)) if dynamic else ((3, 6),):
        results = []
        for function in (explain, compiled):
            logits = _random(images, count, dtype=torch.float32).requires_grad_()
            value = function(logits, _classes(images, 2, count=count))
            results.append((value.detach(), *torch.autograd.grad(value.sum(), logits)))
            with torch.no_grad():
                results[-1] += (function(logits, _classes(images, count=count)),)
        for plain, graph in zip(*results, strict=True):
            torch.testing.assert_close(graph, plain)
