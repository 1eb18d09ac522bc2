"""`cam` and its backward on a GPU, every backend, against the float64 reference on the CPU."""

from __future__ import annotations

import math

import torch

import diffcam_fast as dcf
from diffcam_fast.reference.cam import METHODS, NORMALIZATIONS
from diffcam_fast.reference.cam import cam as reference_cam
from diffcam_fast.reference.cam import cam_backward as reference_backward
from tests.gpu.cases import BACKENDS, DEVICE, DTYPES, Failures, each, forced, generator, largest, poisoned_memory
from tests.gpu.problems import FINISHES, LAYOUTS, compare_maps, problem, problems
from tests.tolerances import HALF_ERROR_RATIO, MAP_SHARE_OF_RANGE, REORDERED_SUM

OP = torch.ops.diffcam_fast.cam.default
BACKWARD = torch.ops.diffcam_fast.cam_backward.default


@each(backend=BACKENDS, method=METHODS, dtype=DTYPES)
def test_agrees_with_float64_reference(backend: str, method: str, dtype: torch.dtype) -> None:
    failures = Failures()
    with forced(backend), poisoned_memory(), torch.no_grad():
        for index, given in enumerate(problems(dtype)):
            finish = FINISHES[index % len(FINISHES)]
            found = OP(given.activations, given.gradients, method, *finish)
            compare_maps(failures, found, given, method, finish)
    failures.report()


@each(backend=BACKENDS, method=METHODS)
def test_many_images_and_targets(backend: str, method: str) -> None:
    """More maps than there are blocks on the device, and more targets than kernels hold at a time."""
    failures = Failures()
    with forced(backend), poisoned_memory(), torch.no_grad():
        for shape, targets in (((700, 16, 7, 7), 1), ((3, 40, 7, 7), 37), ((2, 5, 14, 14), 130)):
            for layout in ("contiguous", "channels-last"):
                given = problem(shape, targets, torch.float32, layout, layout)
                found = OP(given.activations, given.gradients, method, *FINISHES[0])
                compare_maps(failures, found, given, method, FINISHES[0])
    failures.report()


@each(backend=BACKENDS, method=METHODS)
def test_same_bits_from_run_to_run(backend: str, method: str) -> None:
    failures = Failures()
    with forced(backend), torch.no_grad():
        for shape in ((1, 2048, 7, 7), (9, 257, 14, 14), (2, 64, 56, 56)):
            for layout in ("contiguous", "channels-last"):
                given = problem(shape, 2, torch.bfloat16, layout, layout)
                first = OP(given.activations, given.gradients, method, *FINISHES[0])
                for _ in range(20):
                    # What a kernel keeps beside its results lies in memory that held something else before.
                    torch.full((1 << 16,), math.nan, device=DEVICE)
                    again = OP(given.activations, given.gradients, method, *FINISHES[0])
                    failures.same(again, first, given.name)
    failures.report()


@each(backend=BACKENDS, method=METHODS)
def test_non_finite_input_stays_in_its_image(backend: str, method: str) -> None:
    failures = Failures()
    with forced(backend), torch.no_grad():
        for shape in ((4, 21, 7, 7), (4, 600, 14, 14)):
            activations = torch.rand(shape, generator=generator(4))
            gradients = torch.randn(shape, generator=generator(5))
            dirty_activations, dirty_gradients = activations.clone(), gradients.clone()
            for poison in (math.nan, math.inf, -math.inf):
                dirty_activations[1, 3, 2, 4] = poison
                dirty_gradients[2, 20, 6, 6] = math.nan
                options = (method, True, "minmax", 1e-7)
                expected = reference_cam(dirty_activations, dirty_gradients.unsqueeze(1), *options)
                for layout in ("contiguous", "channels-last", "strided"):
                    lay_out = LAYOUTS[layout]
                    clean = dcf.cam(lay_out(activations.to(DEVICE)), lay_out(gradients.to(DEVICE)), method)
                    found = dcf.cam(lay_out(dirty_activations.to(DEVICE)), lay_out(dirty_gradients.to(DEVICE)), method)
                    what = f"{shape}, {poison}, {layout}"
                    failures.same(found[[0, 3]], clean[[0, 3]], f"{what}: other images")
                    failures.same(found.isfinite(), expected.squeeze(1).isfinite(), f"{what}: what is finite")
    failures.report()


@each(backend=BACKENDS)
def test_edges(backend: str) -> None:
    failures = Failures()
    with forced(backend), torch.no_grad():
        for shape, targets in (
            ((0, 3, 4, 4), 1),
            ((2, 3, 4, 4), 0),
            ((2, 0, 4, 4), 1),
            ((2, 3, 0, 4), 1),
            ((1, 3, 1, 1), 2),
        ):
            gradients = torch.randn(shape[0], targets, *shape[1:], device=DEVICE)
            found = dcf.cam(torch.rand(shape, device=DEVICE), gradients)
            failures.check(found.shape == (shape[0], targets, *shape[2:]), f"{shape}: shape {tuple(found.shape)}")
            failures.same(found, torch.zeros_like(found), f"{shape}: zeros")
        for normalize in ("minmax", "max"):
            ones = torch.ones(2, 8, 6, 6, device=DEVICE)
            sign = 1 if normalize == "minmax" else -1
            found = dcf.cam(ones, sign * ones, normalize=normalize)
            failures.same(found, torch.zeros(2, 6, 6), f"a constant map, {normalize}")
    failures.report()


@each(backend=BACKENDS, method=METHODS)
def test_constant_gradients_equal_their_expansion(backend: str, method: str) -> None:
    failures = Failures()
    with forced(backend), torch.no_grad():
        activations = torch.rand(2, 33, 7, 5, generator=generator(3)).to(DEVICE)
        weights = torch.randn(2, 4, 33, generator=generator(4)).to(DEVICE)
        expanded = weights[..., None, None].expand(2, 4, 33, 7, 5)
        difference = dcf.cam(activations, weights, method) - dcf.cam(activations, expanded, method)
        failures.at_most(largest(difference), REORDERED_SUM, "expansion")
    failures.report()


@each(backend=BACKENDS, method=METHODS, dtype=DTYPES)
def test_backward_agrees_with_float64_reference(backend: str, method: str, dtype: torch.dtype) -> None:
    failures = Failures()
    shapes = ((1, 512, 7, 7), (3, 67, 14, 14), (2, 19, 17, 21), (3, 33, 50), (2, 17, 3, 5, 7))
    wanted = ((True, True), (True, False), (False, True))
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    with forced(backend), poisoned_memory():
        for index, given in enumerate(problems(dtype, shapes)):
            a, g = given.plain_activations, given.plain_gradients
            grad_raw = torch.randn((a.shape[0], g.shape[1], *a.shape[2:]), generator=generator(index), dtype=wide)
            needs = wanted[index % len(wanted)]
            found = BACKWARD(grad_raw.to(DEVICE), given.activations, given.gradients, method, *needs)
            exact = reference_backward(grad_raw.double(), a.double(), g.double(), method, *needs)
            plain = reference_backward(grad_raw, a, g, method, *needs)
            for name, got, want, own, needed, like in zip(
                ("activations", "gradients"), found, exact, plain, needs, (a, g), strict=True
            ):
                what = f"{given.name}: of {name}"
                if not needed:
                    failures.check(got.numel() == 0, f"{what}: not asked for")
                    continue
                failures.check(
                    got.shape == like.shape and got.dtype == dtype, f"{what}: {tuple(got.shape)} {got.dtype}"
                )
                scale = max(largest(want), 1e-6)
                error = largest(got.cpu().double() - want) / scale
                if dtype in MAP_SHARE_OF_RANGE:
                    allowed = MAP_SHARE_OF_RANGE[dtype]
                else:
                    own_error = largest(own.double() - want) / scale
                    allowed = HALF_ERROR_RATIO * own_error + MAP_SHARE_OF_RANGE[torch.float32]
                failures.at_most(error, allowed, what)
    failures.report()


@each(backend=BACKENDS)
def test_backward_has_the_same_bits_from_run_to_run(backend: str) -> None:
    failures = Failures()
    with forced(backend):
        for method in METHODS:
            given = problem((5, 130, 14, 14), 2, torch.float32, "channels-last", "contiguous")
            grad_raw = torch.randn(5, 2, 14, 14, generator=generator(1)).to(DEVICE)
            first = BACKWARD(grad_raw, given.activations, given.gradients, method, True, True)
            for _ in range(10):
                torch.full((1 << 16,), math.nan, device=DEVICE)
                again = BACKWARD(grad_raw, given.activations, given.gradients, method, True, True)
                for one, other in zip(first, again, strict=True):
                    failures.same(one, other, method)
    failures.report()


@each(backend=BACKENDS, method=METHODS)
def test_gradcheck(backend: str, method: str) -> None:
    with forced(backend):
        activations = torch.rand(2, 3, 3, 2, generator=generator(5), dtype=torch.float64).to(DEVICE).requires_grad_()
        for shape in ((2, 2, 3), (2, 2, 3, 3, 2)):
            gradients = torch.randn(shape, generator=generator(6), dtype=torch.float64).to(DEVICE).requires_grad_()
            for normalize in NORMALIZATIONS:
                assert torch.autograd.gradcheck(
                    lambda a, g, normalize=normalize: OP(a, g, method, True, normalize, 1e-3), (activations, gradients)
                )
