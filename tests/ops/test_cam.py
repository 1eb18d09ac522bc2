"""`cam` against the float64 reference, over everything that networks hand it."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor

import diffcam_fast as dcf
from diffcam_fast.backends.library import references
from diffcam_fast.reference.cam import METHODS, NORMALIZATIONS, raw_cam
from diffcam_fast.reference.cam import cam as reference_cam
from tests.tolerances import HALF_ERROR_RATIO, MAP_SHARE_OF_RANGE, REORDERED_SUM

pytestmark = pytest.mark.usefixtures("poisoned_memory")

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
OP = torch.ops.diffcam_fast.cam.default
BACKWARD = torch.ops.diffcam_fast.cam_backward.default


def _embedded(values: Tensor) -> Tensor:
    """The same values as every second element of a larger tensor whose other elements are NaN."""
    wide = torch.full([2 * size for size in values.shape], math.nan, dtype=values.dtype)
    view = wide[tuple(slice(None, None, 2) for _ in values.shape)]
    return view.copy_(values)


def _channels_last(values: Tensor) -> Tensor:
    """Channels innermost in memory, whatever the rank."""
    return values.movedim(1, -1).contiguous().movedim(-1, 1)


def _token_slice(values: Tensor) -> Tensor:
    """Channels last, behind a first position that is cut off: a transformer's tokens without the class token."""
    flat = values.flatten(2).transpose(1, 2)
    tokens = torch.cat([torch.full_like(flat[:, :1], math.nan), flat], 1)
    return tokens[:, 1:].transpose(1, 2).unflatten(2, values.shape[2:])


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda values: values.contiguous(),
    "channels-last": _channels_last,
    "strided": _embedded,
    "tokens": _token_slice,
}


def _lay_out_targets(gradients: Tensor, layout: str) -> Tensor:
    """Apply a layout to (N, T, C, *S) gradients, image and target taken together."""
    images, targets = gradients.shape[:2]
    if images * targets == 0:
        return gradients
    laid_out = LAYOUTS[layout](gradients.flatten(0, 1))
    return laid_out.unflatten(0, (images, targets))


def _assert_agree(found: Tensor, activations: Tensor, gradients: Tensor, options: tuple) -> None:
    """Maps agree with the float64 reference, on the float64 values of the same inputs."""
    exact = reference_cam(activations.double(), gradients.double(), *options)
    expected_dtype = torch.float64 if activations.dtype == torch.float64 else torch.float32
    assert found.dtype == expected_dtype
    assert found.shape == exact.shape
    assert found.is_contiguous()
    if exact.numel() == 0:
        return
    unit = _range_of_raw_maps(activations, gradients, options)
    error = ((found.double() - exact).abs() / unit).amax()
    if activations.dtype in MAP_SHARE_OF_RANGE:
        assert error <= MAP_SHARE_OF_RANGE[activations.dtype]
    else:
        plain = reference_cam(activations, gradients, *options)
        own_error = ((plain.double() - exact).abs() / unit).amax()
        assert error <= HALF_ERROR_RATIO * own_error + MAP_SHARE_OF_RANGE[torch.float32]


def _range_of_raw_maps(activations: Tensor, gradients: Tensor, options: tuple) -> Tensor:
    """The range that each map had before ReLU, in units of the finished map.

    Where ReLU leaves the tip of a map whose bulk is negative, normalisation magnifies the tip, and its rounding too.
    """
    method, _, normalize, eps = options
    raw = raw_cam(activations.double(), gradients.double(), method)
    positions = tuple(range(2, raw.dim()))
    if normalize == "none":
        return raw.abs().amax(positions, keepdim=True).clamp_min(1e-12)
    finished = raw.relu() if options[1] else raw
    low = finished.amin(positions, keepdim=True) if normalize == "minmax" else 0
    span = finished.amax(positions, keepdim=True) - low + eps
    raw_range = raw.amax(positions, keepdim=True) - raw.amin(positions, keepdim=True)
    return (raw_range / span).clamp_min(1)


sizes = st.sampled_from([1, 2, 3, 4, 5, 7, 8, 9, 13, 16, 17, 31, 49, 50, 65])


@st.composite
def problems(draw: st.DrawFn) -> dict:
    rank = draw(st.integers(1, 3))
    small = st.integers(1, 5)
    spatial = (*(draw(small) for _ in range(rank - 1)), draw(sizes))
    return {
        "shape": (draw(st.integers(1, 3)), draw(sizes), *spatial),
        "targets": draw(st.integers(1, 3)),
        "dtype": draw(st.sampled_from(DTYPES)),
        "activations_layout": draw(st.sampled_from(sorted(LAYOUTS))),
        "gradients_layout": draw(st.sampled_from([*sorted(LAYOUTS), "constant", "expanded"])),
        "method": draw(st.sampled_from(METHODS)),
        "relu": draw(st.booleans()),
        "normalize": draw(st.sampled_from(NORMALIZATIONS)),
        "seed": draw(st.integers(0, 2**31)),
    }


def _tensors(problem: dict) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(problem["seed"])
    shape, targets, dtype = problem["shape"], problem["targets"], problem["dtype"]
    activations = torch.rand(shape, generator=generator, dtype=torch.float64).to(dtype)
    layout = problem["gradients_layout"]
    if layout in ("constant", "expanded"):
        gradients = torch.randn((shape[0], targets, shape[1]), generator=generator, dtype=torch.float64).to(dtype)
        if layout == "expanded":
            gradients = gradients.reshape(*gradients.shape, *[1] * (len(shape) - 2))
            gradients = gradients.expand(shape[0], targets, *shape[1:])
    else:
        full = (shape[0], targets, *shape[1:])
        gradients = torch.randn(full, generator=generator, dtype=torch.float64).to(dtype)
        gradients = _lay_out_targets(gradients, layout)
    return LAYOUTS[problem["activations_layout"]](activations), gradients


def test_poison_is_in_place() -> None:
    assert torch.empty(3).isnan().all()


@given(problem=problems())
def test_agrees_with_float64_reference(cpu_backend: str, torch_threads: int, problem: dict) -> None:
    activations, gradients = _tensors(problem)
    # Read as gradients per position: see test_one_spatial_dimension_reads_equal_shapes_as_positions.
    assume(gradients.shape != activations.shape)
    # Values near zero divide by nearly nothing under "max" without ReLU: that ratio is no measure of the kernel.
    relu = problem["relu"] or problem["normalize"] == "max"
    options = (problem["method"], relu, problem["normalize"], 1e-3)
    found = dcf.cam(
        activations,
        gradients,
        options[0],
        relu=relu,
        normalize=None if options[2] == "none" else options[2],
        eps=options[3],
    )
    _assert_agree(found, activations, gradients, options)


# The last two are large enough for the order in which large inputs are read.
@pytest.mark.parametrize(
    "shape",
    [(1, 2048, 7, 7), (3, 320, 14, 14), (2, 19, 57, 61), (1, 3, 112, 112), (13, 1030, 7, 7), (3, 1030, 13, 14)],
)
@pytest.mark.parametrize("layout", sorted(LAYOUTS))
@pytest.mark.parametrize("method", METHODS)
def test_sizes_of_real_networks(cpu_backend: str, shape: tuple[int, ...], layout: str, method: str) -> None:
    generator = torch.Generator().manual_seed(1)
    activations = LAYOUTS[layout](torch.rand(shape, generator=generator))
    gradients = LAYOUTS[layout](torch.randn(shape, generator=generator))
    # Raw maps too: a factor that a whole map is off by is gone after normalisation.
    for relu, normalize in ((True, "minmax"), (False, None)):
        found = dcf.cam(activations, gradients, method, relu=relu, normalize=normalize)
        options = (method, relu, normalize or "none", 1e-7)
        _assert_agree(found.unsqueeze(1), activations, gradients.unsqueeze(1), options)


# Short planes have kernels of their own for each number of vectors in a plane: every one, with a partial vector and
# without, and channels for more than one block and chain of them.
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("method", METHODS)
def test_planes_of_every_length(cpu_backend: str, dtype: torch.dtype, method: str) -> None:
    generator = torch.Generator().manual_seed(8)
    # The elements that one load brings, by instruction set and dtype, that many times, and all but one of them more.
    sizes = (2, 4, 8, 16, 32)
    for positions in sorted({size * groups + more for size in sizes for groups in range(14) for more in (0, size - 1)}):
        if not 0 < positions < 225:
            continue
        shape = (2, 150, positions, 1)
        activations = torch.rand(shape, generator=generator).to(dtype)
        gradients = torch.randn(shape, generator=generator).to(dtype)
        found = dcf.cam(activations, gradients, method, relu=False, normalize=None)
        _assert_agree(found.unsqueeze(1), activations, gradients.unsqueeze(1), (method, False, "none", 1e-7))


# Where channels are next to each other, their rows are read several at a time, and of long rows more.
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("method", METHODS)
def test_rows_of_channels_long_and_short(cpu_backend: str, dtype: torch.dtype, method: str) -> None:
    generator = torch.Generator().manual_seed(9)
    long_row = 1024 // dtype.itemsize
    for channels in (long_row - 1, long_row, long_row + 33):
        for positions in (1, 2, 3, 5, 8, 11, 15, 17, 49):
            shape = (2, channels, positions, 1)
            activations = _channels_last(torch.rand(shape, generator=generator).to(dtype))
            gradients = _channels_last(torch.randn(shape, generator=generator).to(dtype))
            found = dcf.cam(activations, gradients, method, relu=False, normalize=None)
            _assert_agree(found.unsqueeze(1), activations, gradients.unsqueeze(1), (method, False, "none", 1e-7))


@pytest.mark.parametrize("layout", ["contiguous", "channels-last"])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("shape", [(1, 2048, 7, 7), (5, 67, 13, 11), (2, 8, 64, 64), (5, 24, 50, 61), (13, 1030, 7, 7)])
def test_same_bits_whatever_the_number_of_threads(layout: str, method: str, shape: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(2)
    activations = LAYOUTS[layout](torch.rand(shape, generator=generator))
    gradients = LAYOUTS[layout](torch.randn(shape, generator=generator))
    before = torch.get_num_threads()
    try:
        found = []
        for threads in (1, 2, 3, 2):
            torch.set_num_threads(threads)
            found.append(dcf.cam(activations, gradients, method))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(found[0], other) for other in found[1:])


@pytest.mark.parametrize("layout", ["contiguous", "channels-last"])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_many_targets_of_few_channels(cpu_backend: str, dtype: torch.dtype, method: str, layout: str) -> None:
    # More targets than are taken at a time, and rows of channels too short to be split.
    generator = torch.Generator().manual_seed(5)
    activations = LAYOUTS[layout](torch.rand(3, 24, 33, 41, generator=generator).to(dtype))
    gradients = _lay_out_targets(torch.randn(3, 17, 24, 33, 41, generator=generator).to(dtype), layout)
    found = dcf.cam(activations, gradients, method)
    _assert_agree(found, activations, gradients, (method, True, "minmax", 1e-7))


def test_constant_gradients_equal_their_expansion(cpu_backend: str) -> None:
    generator = torch.Generator().manual_seed(3)
    activations = torch.rand(2, 33, 7, 5, generator=generator)
    weights = torch.randn(2, 4, 33, generator=generator)
    expanded = weights[..., None, None].expand(2, 4, 33, 7, 5)
    for method in METHODS:
        torch.testing.assert_close(
            dcf.cam(activations, weights, method), dcf.cam(activations, expanded, method), atol=REORDERED_SUM, rtol=0
        )
        torch.testing.assert_close(
            dcf.cam(activations, weights[:, 0], method),
            dcf.cam(activations, weights, method)[:, 0],
            atol=REORDERED_SUM,
            rtol=0,
        )


def test_one_spatial_dimension_reads_equal_shapes_as_positions() -> None:
    activations, gradients = torch.rand(2, 5, 5), torch.randn(2, 5, 5)
    expected = reference_cam(activations, gradients.unsqueeze(1), "gradcam", True, "minmax", 1e-7)
    torch.testing.assert_close(dcf.cam(activations, gradients), expected.squeeze(1))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("layout", ["contiguous", "channels-last", "strided"])
def test_non_finite_input_stays_in_its_image(cpu_backend: str, method: str, poison: float, layout: str) -> None:
    generator = torch.Generator().manual_seed(4)
    activations = torch.rand(4, 21, 7, 7, generator=generator)
    gradients = torch.randn(4, 21, 7, 7, generator=generator)
    clean = dcf.cam(LAYOUTS[layout](activations), LAYOUTS[layout](gradients), method)
    activations[1, 3, 2, 4] = poison
    gradients[2, 20, 6, 6] = math.nan
    found = dcf.cam(LAYOUTS[layout](activations), LAYOUTS[layout](gradients), method)
    torch.testing.assert_close(found[[0, 3]], clean[[0, 3]], atol=0, rtol=0)
    expected = reference_cam(activations, gradients.unsqueeze(1), method, True, "minmax", 1e-7).squeeze(1)
    assert torch.equal(found.isfinite(), expected.isfinite())


def test_constant_map_becomes_zeros(cpu_backend: str) -> None:
    activations = torch.ones(2, 8, 6, 6)
    gradients = torch.ones(2, 8, 6, 6)
    assert torch.equal(dcf.cam(activations, gradients), torch.zeros(2, 6, 6))
    assert torch.equal(dcf.cam(activations, -gradients, normalize="max"), torch.zeros(2, 6, 6))


@pytest.mark.parametrize(
    ("shape", "targets"),
    [((0, 3, 4, 4), 1), ((2, 3, 4, 4), 0), ((2, 0, 4, 4), 1), ((2, 3, 0, 4), 1), ((1, 3, 1, 1), 2)],
)
def test_empty_and_smallest(cpu_backend: str, shape: tuple[int, ...], targets: int) -> None:
    activations = torch.rand(shape)
    gradients = torch.randn(shape[0], targets, *shape[1:])
    found = dcf.cam(activations, gradients)
    assert found.shape == (shape[0], targets, *shape[2:])
    assert torch.equal(found, torch.zeros_like(found))


# --- autograd


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("constant", [False, True])
def test_gradcheck(cpu_backend: str, method: str, constant: bool) -> None:
    generator = torch.Generator().manual_seed(5)
    activations = torch.rand(2, 3, 3, 2, generator=generator, dtype=torch.float64).requires_grad_()
    shape = (2, 2, 3) if constant else (2, 2, 3, 3, 2)
    gradients = torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()
    for normalize in NORMALIZATIONS:
        for relu in (True, False):
            assert torch.autograd.gradcheck(
                lambda a, g, relu=relu, normalize=normalize: dcf.cam(
                    a, g, method, relu=relu, normalize=None if normalize == "none" else normalize, eps=1e-3
                ),
                (activations, gradients),
            )
            # The op by itself differentiates its own finish, as a compiled graph or another library calls it.
            assert torch.autograd.gradcheck(
                lambda a, g, relu=relu, normalize=normalize: OP(a, g, method, relu, normalize, 1e-3),
                (activations, gradients),
            )


@given(problem=problems(), needs=st.sampled_from([(True, True), (True, False), (False, True)]))
def test_backward_agrees_with_float64_reference(
    cpu_backend: str, torch_threads: int, problem: dict, needs: tuple[bool, bool]
) -> None:
    activations, gradients = _tensors(problem)
    images, targets, spatial = problem["shape"][0], problem["targets"], problem["shape"][2:]
    generator = torch.Generator().manual_seed(problem["seed"] + 1)
    grad_raw = torch.randn((images, targets, *spatial), generator=generator)
    dtype = activations.dtype
    grad_raw = grad_raw.double() if dtype == torch.float64 else grad_raw
    found = BACKWARD(grad_raw, activations, gradients, problem["method"], *needs)

    def plain(dtype: torch.dtype) -> list[Tensor]:
        maps_dtype = torch.float64 if dtype == torch.float64 else torch.float32
        return list(
            references["cam_backward"](
                grad_raw.to(maps_dtype), activations.to(dtype), gradients.to(dtype), problem["method"], *needs
            )
        )

    for got, exact, own, needed, like in zip(
        found, plain(torch.float64), plain(dtype), needs, (activations, gradients), strict=True
    ):
        if not needed:
            assert got.numel() == 0
            continue
        assert got.shape == like.shape and got.dtype == like.dtype
        scale = exact.abs().amax().clamp_min(1e-6)
        error = (got.double() - exact).abs().amax() / scale
        if dtype in MAP_SHARE_OF_RANGE:
            assert error <= MAP_SHARE_OF_RANGE[dtype]
        else:
            own_error = (own.double() - exact).abs().amax() / scale
            assert error <= HALF_ERROR_RATIO * own_error + MAP_SHARE_OF_RANGE[torch.float32]


def test_training_on_maps_lowers_the_loss(cpu_backend: str) -> None:
    generator = torch.Generator().manual_seed(6)
    activations = torch.rand(2, 8, 6, 6, generator=generator)
    gradients = torch.randn(2, 8, 6, 6, generator=generator).requires_grad_()
    wanted = torch.zeros(2, 6, 6)
    wanted[:, 0] = 1
    optimizer = torch.optim.Adam([gradients], lr=0.05)
    losses = []
    for _ in range(200):
        loss = (dcf.cam(activations, gradients, "hirescam", relu=False) - wanted).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.1 * losses[0]


# --- torch.library and torch.compile


@pytest.mark.parametrize("method", METHODS)
def test_opcheck(cpu_backend: str, method: str) -> None:
    generator = torch.Generator().manual_seed(7)
    activations = torch.rand(2, 5, 4, 3, generator=generator).requires_grad_()
    gradients = torch.randn(2, 2, 5, 4, 3, generator=generator).requires_grad_()
    weights = torch.randn(2, 2, 5, generator=generator).requires_grad_()
    channels_last = activations.detach().to(memory_format=torch.channels_last)
    for arguments in (
        (activations, gradients, method, True, "minmax", 1e-7),
        (activations, weights, method, False, "max", 1e-7),
        (channels_last, gradients.detach(), method, True, "none", 1e-7),
    ):
        torch.library.opcheck(OP, arguments)
    grad_raw = torch.randn(2, 2, 4, 3, generator=generator)
    torch.library.opcheck(
        BACKWARD,
        (grad_raw, channels_last, gradients.detach(), method, True, True),
        test_utils=("test_schema", "test_faketensor"),
    )


def test_compile_full_graph() -> None:
    torch._dynamo.reset()

    def explain(activations: Tensor, gradients: Tensor) -> Tensor:
        return dcf.cam(activations * 2, gradients, "layercam") + 1

    compiled = torch.compile(explain, fullgraph=True, dynamic=True)
    for shape in ((2, 5, 4, 3), (3, 6, 7, 7)):
        activations, gradients = torch.rand(shape), torch.randn(shape)
        torch.testing.assert_close(compiled(activations, gradients), explain(activations, gradients))


def test_compile_full_graph_with_gradients() -> None:
    torch._dynamo.reset()

    def loss(activations: Tensor, gradients: Tensor) -> Tensor:
        return dcf.cam(activations, gradients, "gradcam").square().sum()

    activations = torch.rand(2, 5, 4, 3)
    gradients = torch.randn(2, 5, 4, 3)
    results = []
    for function in (loss, torch.compile(loss, fullgraph=True)):
        a, g = activations.clone().requires_grad_(), gradients.clone().requires_grad_()
        results.append(torch.autograd.grad(function(a, g), (a, g)))
    for plain, compiled in zip(*results, strict=True):
        torch.testing.assert_close(compiled, plain)


def test_inference_mode(cpu_backend: str) -> None:
    activations, gradients = torch.rand(1, 4, 3, 3), torch.randn(1, 4, 3, 3)
    expected = dcf.cam(activations, gradients)
    with torch.inference_mode():
        torch.testing.assert_close(dcf.cam(activations.clone(), gradients.clone()), expected)


# --- bad input

GOOD = torch.rand(2, 3, 4, 4)


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        ((GOOD.numpy(), GOOD), {}, TypeError, "activations: expected a torch.Tensor; got ndarray"),
        ((GOOD, None), {}, TypeError, "gradients: expected a torch.Tensor; got NoneType"),
        ((GOOD.long(), GOOD.long()), {}, TypeError, "activations: expected dtype float32, .*got torch.int64"),
        ((GOOD, GOOD.double()), {}, TypeError, "gradients: expected the dtype .*float32; got torch.float64"),
        ((GOOD, GOOD.to("meta")), {}, ValueError, "gradients: expected the device .*cpu; got meta"),
        ((GOOD[0, 0], GOOD[0, 0]), {}, ValueError, r"activations: expected shape .*got \(4, 4\)"),
        ((GOOD, GOOD[:1]), {}, ValueError, r"gradients: expected shape \(2, 3, 4, 4\).*got \(1, 3, 4, 4\)"),
        ((GOOD, GOOD[:, :2]), {}, ValueError, r"gradients: expected shape .*got \(2, 2, 4, 4\)"),
        ((GOOD, GOOD[:, :, :3]), {}, ValueError, r"gradients: expected shape .*got \(2, 3, 3, 4\)"),
        ((GOOD, torch.rand(2, 5, 4)), {}, ValueError, r"gradients: expected shape .*got \(2, 5, 4\)"),
        ((GOOD, GOOD, "cam"), {}, ValueError, "method: expected one of gradcam, .*got 'cam'"),
        ((GOOD, GOOD), {"normalize": "none"}, ValueError, "normalize: expected None, .*got 'none'"),
        ((GOOD, GOOD), {"eps": 0.0}, ValueError, r"eps: expected a positive number; got 0\.0"),
    ],
)
def test_errors_name_the_argument(arguments: tuple, options: dict, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        dcf.cam(*arguments, **options)


def test_ops_called_directly_refuse_what_they_cannot_read() -> None:
    """The compiled ops check what memory safety needs, whoever calls them."""
    with pytest.raises(RuntimeError):
        OP(GOOD, torch.rand(2, 1, 3, 5, 5), "hirescam", True, "minmax", 1e-7)
    with pytest.raises(RuntimeError):
        BACKWARD(torch.rand(2, 1, 5, 5), GOOD, GOOD.unsqueeze(1), "gradcam", True, True)
