"""NISSIM, MOD, VID and PSNR against other implementations and by hand; batches change nothing."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from diffcam_fast.robustness.region_shift import RegionShift, mod, nissim, psnr, vid
from diffcam_fast.robustness.structural_similarity import structural_similarity

metrics = pytest.importorskip("skimage.metrics")


def maps(*shape, seed=0):
    """Smooth maps from 0 to 1, as explanations are."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(math.prod(shape[:-2]), 1, 4, 5, generator=generator, dtype=torch.float64)
    return torch.nn.functional.interpolate(coarse, shape[-2:], mode="bicubic").clamp(0, 1).reshape(shape)


def scipy_ssim(first, second):
    """Structural similarity from SciPy's Gaussian filter, all positions."""
    from scipy.ndimage import gaussian_filter

    def mean(values):
        return gaussian_filter(values, 1.5, mode="mirror", truncate=3.5)

    means = mean(first), mean(second)
    variances = mean(first**2) - means[0] ** 2 + mean(second**2) - means[1] ** 2
    covariance = mean(first * second) - means[0] * means[1]
    luminance = (2 * means[0] * means[1] + 1e-4) / (means[0] ** 2 + means[1] ** 2 + 1e-4)
    return float((luminance * (2 * covariance + 9e-4) / (variances + 9e-4)).mean())


@pytest.mark.parametrize("size", [(32, 32), (14, 23), (11, 64)])
def test_nissim_is_that_of_scipys_filter(size):
    first, second = maps(6, *size), maps(6, *size, seed=1)
    expected = [(1 - scipy_ssim(one, other)) / 2 for one, other in zip(first.numpy(), second.numpy(), strict=True)]
    np.testing.assert_allclose(nissim(first, second), expected, rtol=0, atol=1e-12)
    np.testing.assert_allclose(nissim(first.float(), second.float()), expected, rtol=0, atol=2e-6)


def test_inside_the_border_it_is_that_of_scikit_image():
    """Of maps that are constant for five positions from the border on, scikit-image leaves out what is 1 there."""
    first, second = torch.full((2, 60, 60), 0.5, dtype=torch.float64)
    first[15:45, 15:45], second[15:45, 15:45] = maps(2, 30, 30)
    similarity = metrics.structural_similarity(
        first.numpy(), second.numpy(), data_range=1.0, gaussian_weights=True, sigma=1.5, use_sample_covariance=False
    )
    expected = (similarity * 50**2 + (60**2 - 50**2)) / 60**2
    assert float(nissim(first[None], second[None])) == pytest.approx((1 - expected) / 2, abs=1e-12)


@pytest.mark.parametrize("size", [(1, 1), (2, 3), (4, 4), (7, 7), (7, 20), (32, 32)])
def test_it_is_the_house_s_structural_similarity(size):
    from diffcam_fast.robustness.agreement import ssim

    first, second = maps(5, *size), maps(5, *size, seed=1)
    torch.testing.assert_close(nissim(first, second), (1 - ssim(first, second)) / 2, rtol=0, atol=1e-12)


def test_data_range_is_a_unit():
    first, second = maps(3, 12, 12), maps(3, 12, 12, seed=1)
    torch.testing.assert_close(nissim(255 * first, 255 * second, data_range=255), nissim(first, second))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_equal_maps_are_exactly_0(dtype):
    constant = torch.full((1, 9, 9), 0.3, dtype=dtype)
    for same in (maps(40, 32, 32).to(dtype), maps(7, 7, 7).to(dtype), constant, torch.zeros(2, 5, 8, dtype=dtype)):
        assert torch.equal(nissim(same, same.clone()), torch.zeros(len(same), dtype=nissim(same, same).dtype))


def test_nearly_equal_maps_are_not_below_0():
    """Where rounding takes the similarity above 1."""
    same = maps(500, 32, 32).float()
    nearly = same * (1 + 1e-7)
    assert not torch.equal(same, nearly)
    assert (structural_similarity(same, nearly) > 1).any()
    assert (nissim(same, nearly) >= 0).all()


def test_opposite_maps_are_near_1():
    checks = (torch.arange(32)[:, None] + torch.arange(32)) % 2.0
    assert 0.9 < float(nissim(checks[None], 1 - checks[None])) <= 1


def test_shapes_and_dtypes():
    original = maps(4, 9, 8).float()
    attacked = maps(3, 4, 9, 8, seed=1).half()
    found = nissim(original, attacked)
    assert found.shape == (3, 4)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found[1], nissim(original, attacked[1]))
    assert nissim(original.double(), attacked.double()).dtype == torch.float64
    assert nissim(original[:0], attacked[0, :0]).shape == (0,)
    assert nissim(original[0], original[1]).shape == ()


def test_many_pairs_are_each_their_own():
    """More than are worked on at a time."""
    first, second = maps(300, 32, 32).float(), maps(300, 32, 32, seed=1).float()
    together = nissim(first, second)
    alone = torch.stack([nissim(first[index : index + 1], second[index : index + 1])[0] for index in (0, 63, 64, 299)])
    torch.testing.assert_close(together[[0, 63, 64, 299]], alone, rtol=0, atol=1e-6)


def test_gradients_pass_also_after_inference_mode():
    with torch.inference_mode():
        structural_similarity(maps(1, 13, 6), maps(1, 13, 6, seed=1))
    first, second = maps(2, 13, 6).requires_grad_(), maps(2, 13, 6, seed=1)
    assert torch.autograd.gradcheck(lambda values: nissim(values, second), (first,))


def test_mod_and_vid_by_hand():
    """Two images at three strengths."""
    dissimilarities = torch.tensor([[0.10, 0.30], [0.20, 0.40], [0.60, 0.20]], dtype=torch.float64)
    assert mod(dissimilarities).tolist() == pytest.approx([0.2, 0.3, 0.4])
    # About 0.3: (-0.1, 0, 0.1), so the mean square is 0.02 / 3.
    assert float(vid(mod(dissimilarities))) == pytest.approx(math.sqrt(0.02 / 3))
    # The first image about 0.3: (-0.2, -0.1, 0.3); the second about 0.3: (0, 0.1, -0.1).
    assert vid(dissimilarities).tolist() == pytest.approx([math.sqrt(0.14 / 3), math.sqrt(0.02 / 3)])
    assert float(vid(torch.tensor([0.7]))) == 0.0


def test_psnr_by_hand():
    """A difference of 0.1 everywhere is 20 dB, of 0.01 40 dB; of 1 of 10 values by 1, 10 dB."""
    original = torch.zeros(3, 1, 2, 5)
    attacked = torch.stack((torch.full((1, 2, 5), 0.1), torch.full((1, 2, 5), -0.01), torch.zeros(1, 2, 5)))
    attacked[2, 0, 1, 3] = 1
    assert psnr(original, attacked).tolist() == pytest.approx([20, 40, 10], abs=1e-4)
    assert psnr(255 * original, 255 * attacked, data_range=255).tolist() == pytest.approx([20, 40, 10], abs=1e-4)
    assert psnr(attacked, attacked).tolist() == [math.inf] * 3


@pytest.mark.parametrize("sizes", [(12,), (1, 4, 7), (0, 12)])
def test_streaming_is_the_whole(sizes):
    original, attacked = maps(12, 10, 10), maps(3, 12, 10, 10, seed=1)
    whole = nissim(original, attacked)
    shift = RegionShift((0.01, 0.05, 0.1), bins=8)
    for mine, theirs in zip(original.split(sizes), attacked.split(sizes, dim=1), strict=True):
        shift.update(mine, list(theirs))
    assert shift.count == 12
    torch.testing.assert_close(shift.mod, whole.mean(1))
    torch.testing.assert_close(shift.spread, whole.std(1, correction=0))
    assert shift.vid == pytest.approx(float(whole.mean(1).std(correction=0)))
    assert shift.mean_image_vid == pytest.approx(float(whole.std(0, correction=0).mean()))
    for row, values in zip(shift.histogram, whole, strict=True):
        assert row.tolist() == np.histogram(values, bins=8, range=(0, 1))[0].tolist()


def test_streaming_at_strength_0_is_exactly_0():
    original = maps(5, 16, 16).float()
    shift = RegionShift((0,))
    assert shift.update(original, original[None].clone()).eq(0).all()
    assert shift.mod.tolist() == [0.0]
    assert (shift.vid, shift.mean_image_vid, shift.spread.tolist()) == (0.0, 0.0, [0.0])
    assert shift.histogram[0, 0] == 5


def test_before_any_image():
    shift = RegionShift((0.1, 0.2))
    assert shift.mod.isnan().all()
    assert math.isnan(shift.mean_image_vid)


def test_what_cannot_be_compared_is_refused_and_not_counted():
    original = maps(2, 8, 8)
    shift = RegionShift((0.1, 0.2))
    broken = torch.stack((original, original))
    broken[1, 0, 3, 3] = math.nan
    for attacked, message in (
        (original, r"attacked: expected \(E, N, H, W\) for 2 strengths"),
        (maps(2, 3, 8, 8), r"got \(2, 3, 8, 8\) for original \(2, 8, 8\)"),
        (broken, "expected finite maps"),
    ):
        with pytest.raises(ValueError, match=message):
            shift.update(original, attacked)
    assert shift.count == 0
    assert shift.histogram.sum() == 0


@pytest.mark.parametrize("function", [nissim, psnr])
def test_bad_pairs_are_refused(function):
    good = torch.zeros(2, 3, 4, 4)
    with pytest.raises(TypeError, match=r"original: expected a torch\.Tensor; got ndarray"):
        function(np.zeros((2, 3, 4)), good)
    with pytest.raises(TypeError, match=r"attacked: expected a floating point tensor; got torch\.uint8"):
        function(good, good.byte())
    with pytest.raises(
        ValueError, match=r"attacked: expected a shape that goes with .*\(2, 3, 4, 4\); got \(3, 3, 4, 4\)"
    ):
        function(good, torch.zeros(3, 3, 4, 4))
    with pytest.raises(ValueError, match="attacked: expected the device of original, cpu; got meta"):
        function(good, good.to("meta"))
    with pytest.raises(ValueError, match=r"data_range: expected a positive number; got 0"):
        function(good, good, data_range=0)
    with pytest.raises(TypeError, match="data_range: expected a number; got str"):
        function(good, good, data_range="1")
    with pytest.raises(ValueError, match="original: expected shape"):
        function(torch.zeros(3), torch.zeros(3))


def test_bad_dissimilarities_are_refused():
    with pytest.raises(ValueError, match=r"expected one or more images; got shape \(3, 0\)"):
        mod(torch.zeros(3, 0))
    with pytest.raises(ValueError, match="expected one or more strengths"):
        vid(torch.zeros(0, 4))
    with pytest.raises(TypeError, match=r"dissimilarities: expected a torch\.Tensor; got list"):
        vid([0.1])


@pytest.mark.parametrize(
    ("strengths", "options", "error", "message"),
    [
        ((), {}, ValueError, "strengths: expected one or more"),
        ((0.1, 0.1), {}, ValueError, "each once"),
        (("a",), {}, TypeError, "strengths: expected a number; got str"),
        ((0.1,), {"bins": 0}, ValueError, "bins: expected at least 1"),
        ((0.1,), {"bins": 1.5}, TypeError, "bins: expected an integer"),
        ((0.1,), {"data_range": -1}, ValueError, "data_range"),
    ],
)
def test_bad_arguments_are_refused(strengths, options, error, message):
    with pytest.raises(error, match=message):
        RegionShift(strengths, **options)
