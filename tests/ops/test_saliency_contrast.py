"""`saliency_contrast` against the float64 reference, its definition, and what it must not do."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from diffcam_fast.backends import use_backend
from diffcam_fast.ops.saliency_contrast import saliency_contrast
from diffcam_fast.reference.saliency_contrast import saliency_contrast as reference
from tests.tolerances import HALF_ERROR_RATIO, MAP_SHARE_OF_RANGE

pytestmark = pytest.mark.usefixtures("poisoned_memory")

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
OP = torch.ops.diffcam_fast.saliency_contrast.default


def _with_gaps(values: Tensor) -> Tensor:
    """The same values as every second element of a larger tensor whose other elements are NaN."""
    wide = torch.full([2 * size for size in values.shape], math.nan, dtype=values.dtype)
    return wide[tuple(slice(None, None, 2) for _ in values.shape)].copy_(values)


def _off_by_one(values: Tensor) -> Tensor:
    """Contiguous, but one element past an aligned address."""
    buffer = torch.full((values.numel() + 1,), math.nan, dtype=values.dtype)
    return buffer[1:].view(values.shape).copy_(values)


#: Of tensors whose channels are dimension `channel`.
LAYOUTS: dict[str, Callable[[Tensor, int], Tensor]] = {
    "contiguous": lambda values, channel: values.contiguous(),
    "channels last": lambda values, channel: values.movedim(channel, -1).contiguous().movedim(-1, channel),
    "gaps": lambda values, channel: _with_gaps(values),
    "off by one": lambda values, channel: _off_by_one(values),
    "last first": lambda values, channel: values.transpose(-1, -2).contiguous().transpose(-1, -2),
    "one image": lambda values, channel: values[:1].expand_as(values),
    "one channel": lambda values, channel: values.narrow(channel, 0, 1).expand_as(values),
    "one line": lambda values, channel: values[..., :1].expand_as(values),
}


def random_maps(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    """Normally distributed, each image and channel with an energy of another order."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(shape, generator=generator, dtype=torch.float64)
    sizes = torch.rand(*shape[:-1], 1, generator=generator, dtype=torch.float64) * 4 - 2
    return (values * 10**sizes).to(dtype)


def assert_right(found: Tensor, saliency: Tensor, rivals: Tensor, per_channel: bool) -> None:
    """That a contrast (N, T, C, *S) is the float64 reference's, but for rounding, in units of each image's range."""
    wide = saliency.dtype == torch.float64
    assert found.dtype == (torch.float64 if wide else torch.float32) and found.is_contiguous()
    assert found.shape == rivals.shape
    if found.numel() == 0:
        return
    exact = reference(saliency.double(), rivals.double(), per_channel)
    axes = tuple(range(2, exact.dim()))
    # Maps of energy 1 have values of this size, also where their difference has none.
    usual = math.prod(exact.shape[3 if per_channel else 2 :]) ** -0.5
    span = exact.amax(axes, keepdim=True).clamp_min(usual)
    error = ((found.double() - exact) / span).abs().amax().item()
    if saliency.dtype in MAP_SHARE_OF_RANGE:
        assert error <= MAP_SHARE_OF_RANGE[saliency.dtype]
    else:
        own = ((reference(saliency, rivals, per_channel).double() - exact) / span).abs().amax().item()
        assert error <= HALF_ERROR_RATIO * own + MAP_SHARE_OF_RANGE[torch.float32]


# --- values


@st.composite
def problems(draw: st.DrawFn) -> dict[str, Any]:
    side = st.sampled_from([1, 2, 3, 7, 16, 17, 40])
    return {
        "images": draw(st.integers(0, 3)),
        "targets": draw(st.integers(0, 3)),
        "channels": draw(st.sampled_from([1, 2, 3, 9])),
        "size": tuple(draw(st.lists(side, min_size=1, max_size=3).filter(lambda sizes: math.prod(sizes) <= 5000))),
        "dtype": draw(st.sampled_from(DTYPES)),
        "layout": draw(st.sampled_from(sorted(LAYOUTS))),
        "rival_layout": draw(st.sampled_from(sorted(LAYOUTS))),
        "per_channel": draw(st.booleans()),
        "seed": draw(st.integers(0, 2**31)),
    }


def tensors(problem: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Saliency and rivals of a problem."""
    images, rest = problem["images"], (problem["channels"], *problem["size"])
    saliency = random_maps(images, *rest, dtype=problem["dtype"], seed=problem["seed"])
    rivals = random_maps(images, problem["targets"], *rest, dtype=problem["dtype"], seed=problem["seed"] + 1)
    return LAYOUTS[problem["layout"]](saliency, 1), LAYOUTS[problem["rival_layout"]](rivals, 2)


@given(problem=problems())
def test_agrees_with_float64_reference(cpu_backend: str, torch_threads: int, problem: dict[str, Any]) -> None:
    saliency, rivals = tensors(problem)
    found = saliency_contrast(saliency, rivals, per_channel=problem["per_channel"])
    assert_right(found, saliency, rivals, problem["per_channel"])


@pytest.mark.parametrize("per_channel", [True, False])
def test_is_what_the_definition_says(cpu_backend: str, per_channel: bool) -> None:
    """Written down with PyTorch's own norm, rival by rival."""
    saliency, rivals = random_maps(2, 3, 6, 5), random_maps(2, 4, 3, 6, 5, seed=1)
    found = saliency_contrast(saliency, rivals, per_channel=per_channel)
    axes = (1, 2) if per_channel else (0, 1, 2)
    for image in range(2):
        for target in range(4):
            own, other = saliency[image].double(), rivals[image, target].double()
            unit = own / torch.linalg.vector_norm(own, dim=axes, keepdim=True)
            unit -= other / torch.linalg.vector_norm(other, dim=axes, keepdim=True)
            assert torch.allclose(found[image, target].double(), unit.clamp_min(0), rtol=0, atol=1e-6)


def test_worked_by_hand(cpu_backend: str) -> None:
    saliency = torch.tensor([[[3.0, 4.0], [0.0, 2.0]]])
    rivals = torch.tensor([[[0.0, -5.0], [1.0, 0.0]]])
    # Energies 5 and 2, 5 and 1: (.6 - 0, .8 + 1), (0 - 1, 1 - 0).
    found = saliency_contrast(saliency, rivals)
    assert torch.allclose(found, torch.tensor([[[0.6, 1.8], [0.0, 1.0]]]))
    # All channels together: energies sqrt(29) and sqrt(26).
    a, b = math.sqrt(29), math.sqrt(26)
    found = saliency_contrast(saliency, rivals, per_channel=False)
    assert torch.allclose(found, torch.tensor([[[3 / a, 4 / a + 5 / b], [0.0, 2 / a]]]))


def test_size_of_the_maps_does_not_matter(cpu_backend: str) -> None:
    """A saliency of probabilities is far smaller than one of logits, and says the same."""
    saliency, rivals = random_maps(2, 3, 30, 20), random_maps(2, 2, 3, 30, 20, seed=1)
    for per_channel in (True, False):
        expected = saliency_contrast(saliency, rivals, per_channel=per_channel)
        for own, other in ((2.0**-130, 2.0**10), (2.0**100, 2.0**-100), (2.0**-60, 2.0**110)):
            found = saliency_contrast(saliency * own, rivals * other, per_channel=per_channel)
            # Of numbers near the smallest that float32 has, some digits are lost before they arrive.
            assert (found - expected).abs().amax() <= (1e-4 if own < 2.0**-126 else 1e-6)
        tiny, huge = torch.full((1, 3, 4, 4), 1e-44), torch.full((1, 3, 4, 4), 3e38)
        assert torch.allclose(saliency_contrast(tiny, -huge, per_channel=per_channel).std(), torch.tensor(0.0))
        assert saliency_contrast(tiny, -huge, per_channel=per_channel).amin() > 0.28
    wide, far = random_maps(1, 2, 9, dtype=torch.float64), random_maps(1, 2, 9, dtype=torch.float64, seed=1)
    expected = saliency_contrast(wide, far)
    for scale in (1e-300, 1e300):
        assert torch.allclose(saliency_contrast(wide * scale, far), expected, rtol=0, atol=1e-13)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_map_has_nothing_more_than_itself(cpu_backend: str, dtype: torch.dtype) -> None:
    for layout in LAYOUTS.values():
        saliency = layout(random_maps(2, 3, 13, 7, dtype=dtype), 1)
        for per_channel in (True, False):
            assert not saliency_contrast(saliency, saliency, per_channel=per_channel).any()
    assert not saliency_contrast(saliency, random_maps(2, 3, 13, 7, dtype=dtype) * 0 + saliency).any()


def test_energy_zero_counts_as_zeros(cpu_backend: str) -> None:
    saliency, rivals = random_maps(2, 3, 6, 5), random_maps(2, 3, 6, 5, seed=1)
    saliency[0, 1] = 0
    rivals[1, 2] = 0
    found = saliency_contrast(saliency, rivals)
    assert found.isfinite().all()
    unit = rivals / torch.linalg.vector_norm(rivals, dim=(2, 3), keepdim=True)
    assert torch.allclose(found[0, 1], -unit[0, 1].clamp_max(0), atol=1e-7)
    unit = saliency / torch.linalg.vector_norm(saliency, dim=(2, 3), keepdim=True)
    assert torch.allclose(found[1, 2], unit[1, 2].clamp_min(0), atol=1e-7)
    for per_channel in (True, False):
        nothing = torch.zeros(2, 3, 6, 5)
        assert not saliency_contrast(nothing, nothing, per_channel=per_channel).any()


def test_several_rivals_are_each_by_itself(cpu_backend: str, torch_threads: int) -> None:
    saliency, rivals = random_maps(2, 3, 30, 41), random_maps(2, 4, 3, 30, 41, seed=1)
    for per_channel in (True, False):
        together = saliency_contrast(saliency, rivals, per_channel=per_channel)
        for target in range(4):
            alone = saliency_contrast(saliency, rivals[:, target], per_channel=per_channel)
            assert alone.shape == saliency.shape and torch.equal(together[:, target], alone)


@pytest.mark.parametrize("per_channel", [True, False])
@pytest.mark.parametrize("shape", [(1, 5, 1, 300, 280), (8, 1, 3, 224, 224)])
def test_same_bits_whatever_the_number_of_threads(shape: tuple[int, ...], per_channel: bool) -> None:
    """Few rows, whose rivals are shared out, and many."""
    saliency, rivals = random_maps(shape[0], *shape[2:]), random_maps(*shape, seed=1)
    before = torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(saliency_contrast(saliency, rivals, per_channel=per_channel))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(found[0], other) for other in found[1:])
    assert_right(found[0], saliency, rivals, per_channel)


# --- edges


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("per_channel", [True, False])
def test_what_is_not_finite_stays_where_it_is(cpu_backend: str, value: float, per_channel: bool) -> None:
    saliency, rivals = random_maps(3, 2, 6, 5), random_maps(3, 2, 2, 6, 5, seed=1)
    clean = saliency_contrast(saliency, rivals, per_channel=per_channel)
    saliency[0, 1, 2, 3] = value
    rivals[2, 1, 0, 0, 0] = value
    found = saliency_contrast(saliency, rivals, per_channel=per_channel)
    broken = torch.zeros(3, 2, 2, dtype=torch.bool)
    broken[0, :, 1 if per_channel else slice(None)] = True
    broken[2, 1, 0 if per_channel else slice(None)] = True
    assert found[broken].isnan().all()
    assert torch.equal(found[~broken], clean[~broken])


@pytest.mark.parametrize("shape", [(0, 2, 3, 6, 5), (2, 0, 3, 6, 5), (2, 1, 0, 6, 5), (2, 1, 3, 0, 5), (2, 1, 3, 0)])
def test_empty(cpu_backend: str, shape: tuple[int, ...]) -> None:
    for per_channel in (True, False):
        found = saliency_contrast(torch.zeros(shape[0], *shape[2:]), torch.zeros(shape), per_channel=per_channel)
        assert found.shape == shape and found.is_contiguous()


def test_inputs_stay_as_they_are(cpu_backend: str) -> None:
    saliency, rivals = random_maps(2, 3, 6, 5), random_maps(2, 2, 3, 6, 5, seed=1)
    before = saliency.clone(), rivals.clone()
    found = saliency_contrast(saliency, rivals)
    assert not found.requires_grad
    assert torch.equal(saliency, before[0]) and torch.equal(rivals, before[1])
    with torch.inference_mode():
        assert torch.equal(saliency_contrast(saliency, rivals), found)
    with torch.no_grad():
        assert not saliency_contrast(saliency.requires_grad_(), rivals).requires_grad


@pytest.mark.parametrize(
    ("own", "others", "message"),
    [
        ((3, 6), (3, 6), r"saliency: expected shape \(N, C, \*S\) with 1 to 3 spatial dimensions; got \(3, 6\)"),
        ((2, 3, 1, 1, 1, 1), (2, 3, 1, 1, 1, 1), "saliency: expected shape"),
        ((2, 3, 6), (2, 3, 5), r"rivals: expected shape \(2, 3, 6\) or \(2, T, 3, 6\) .*; got \(2, 3, 5\)"),
        ((2, 3, 6), (3, 4, 3, 6), r"rivals: expected shape .*; got \(3, 4, 3, 6\)"),
        ((2, 3, 6), (2, 3), r"rivals: expected shape .*; got \(2, 3\)"),
    ],
)
def test_wrong_shapes_are_named(own: tuple[int, ...], others: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        saliency_contrast(torch.zeros(own), torch.zeros(others))


def test_wrong_arguments_are_named() -> None:
    maps = torch.zeros(2, 3, 6)
    with pytest.raises(TypeError, match=r"saliency: expected a torch.Tensor; got list"):
        saliency_contrast([1.0], maps)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"rivals: expected a torch.Tensor; got NoneType"):
        saliency_contrast(maps, None)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"saliency: expected dtype float32.*; got torch.int64"):
        saliency_contrast(maps.long(), maps.long())
    with pytest.raises(TypeError, match=r"rivals: expected the dtype of saliency, torch.float32; got torch.float16"):
        saliency_contrast(maps, maps.half())
    with pytest.raises(TypeError, match="per_channel: expected True or False; got str"):
        saliency_contrast(maps, maps, per_channel="channel")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="rivals: expected the device of saliency, cpu; got meta"):
        saliency_contrast(maps, maps.to("meta"))


def test_op_called_directly_refuses_what_it_cannot_read(cpu_backend: str) -> None:
    saliency, rivals = torch.zeros(2, 3, 4, 5), torch.zeros(2, 2, 3, 4, 5)
    if cpu_backend == "reference":
        pytest.skip("PyTorch checks what it computes with")
    for wrong in (
        (saliency[:1], rivals),
        (saliency[:, :2], rivals),
        (saliency[..., :4], rivals),
        (saliency, saliency),
        (saliency.double(), rivals),
        (saliency.int(), rivals.int()),
        (torch.zeros(2, 3), torch.zeros(2, 2, 3)),
    ):
        with pytest.raises(RuntimeError):
            OP(*wrong, True)


# --- gradients, torch.library and torch.compile


@pytest.mark.parametrize("per_channel", [True, False])
def test_gradients_are_those_of_finite_differences(cpu_backend: str, per_channel: bool) -> None:
    saliency = random_maps(2, 3, 4, 3, dtype=torch.float64).requires_grad_()
    for shape in ((2, 2, 3, 4, 3), (2, 3, 4, 3)):
        rivals = random_maps(*shape, dtype=torch.float64, seed=1).requires_grad_()
        assert torch.autograd.gradcheck(
            lambda own, others: saliency_contrast(own, others, per_channel=per_channel), (saliency, rivals)
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("per_channel", [True, False])
def test_gradients_are_those_of_plain_pytorch(cpu_backend: str, dtype: torch.dtype, per_channel: bool) -> None:
    saliency = random_maps(2, 3, 6, 5, dtype=dtype).requires_grad_()
    rivals = LAYOUTS["channels last"](random_maps(2, 4, 3, 6, 5, dtype=dtype, seed=1), 2).requires_grad_()
    weight = random_maps(2, 4, 3, 6, 5, seed=2)
    (saliency_contrast(saliency, rivals, per_channel=per_channel) * weight).sum().backward()
    own, others = saliency.detach().double().requires_grad_(), rivals.detach().double().requires_grad_()
    axes = (2, 3) if per_channel else (1, 2, 3)
    unit = own / torch.linalg.vector_norm(own, dim=axes, keepdim=True)
    rival_axes = tuple(axis + 1 for axis in axes)
    difference = unit.unsqueeze(1) - others / torch.linalg.vector_norm(others, dim=rival_axes, keepdim=True)
    (difference.relu() * weight.double()).sum().backward()
    for found, exact in ((saliency.grad, own.grad), (rivals.grad, others.grad)):
        assert found is not None and exact is not None and found.dtype == dtype
        allowed = MAP_SHARE_OF_RANGE[torch.float32] + (2**-8 if dtype == torch.bfloat16 else 0)
        assert ((found.double() - exact).abs() <= allowed * exact.abs().amax()).all()


def test_only_wanted_gradients_and_none_of_energy_zero(cpu_backend: str) -> None:
    saliency, rivals = torch.zeros(1, 1, 2, 2), random_maps(1, 1, 2, 2)
    saliency_contrast(saliency.requires_grad_(), rivals).sum().backward()
    assert saliency.grad is not None and not saliency.grad.any() and rivals.grad is None
    saliency_contrast(random_maps(1, 1, 2, 2, seed=1), rivals.requires_grad_()).sum().backward()
    assert rivals.grad is not None and rivals.grad.isfinite().all() and rivals.grad.any()


@pytest.fixture(params=("auto", "reference"))
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """What serves by default, and the reference; for what no instruction set can change."""
    with use_backend(request.param):
        yield request.param


@pytest.mark.parametrize("per_channel", [True, False])
def test_opcheck(backend: str, per_channel: bool) -> None:
    for saliency, rivals in (
        (random_maps(2, 3, 4, 5).requires_grad_(), random_maps(2, 2, 3, 4, 5, seed=1).requires_grad_()),
        (LAYOUTS["channels last"](random_maps(2, 3, 4, 5), 1), LAYOUTS["gaps"](random_maps(2, 1, 3, 4, 5), 2)),
        (random_maps(2, 3, 4, dtype=torch.bfloat16), random_maps(2, 0, 3, 4, dtype=torch.bfloat16)),
    ):
        torch.library.opcheck(OP, (saliency, rivals, per_channel))


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_into_one_graph(dynamic: bool) -> None:
    torch._dynamo.reset()

    def weigh(saliency: Tensor, rivals: Tensor) -> Tensor:
        return (
            saliency_contrast(saliency * 2, rivals, per_channel=False)
            + saliency_contrast(saliency, rivals[:, 0])[:, None]
        )

    compiled = torch.compile(weigh, fullgraph=True, dynamic=dynamic)
    for count, size in ((2, 6), (5, 9)) if dynamic else ((2, 6),):
        saliency, rivals = random_maps(count, 3, size, 8), random_maps(count, 2, 3, size, 8, seed=1)
        assert torch.allclose(compiled(saliency, rivals), weigh(saliency, rivals), atol=1e-6)
        saliency.requires_grad_()
        compiled(saliency, rivals).sum().backward()
        found, saliency.grad = saliency.grad, None
        weigh(saliency, rivals).sum().backward()
        assert found is not None and torch.allclose(found, saliency.grad, atol=1e-5 * saliency.grad.abs().amax())
