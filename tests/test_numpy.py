"""The ops on NumPy arrays against the ops on tensors, compiled and not."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

import diffcam_fast as dcf
from diffcam_fast import numpy as functions
from diffcam_fast.reference.cam import METHODS

RNG = np.random.default_rng(0)
ACTIVATIONS = RNG.random((3, 17, 7, 5), dtype=np.float32)
GRADIENTS = RNG.standard_normal((3, 2, 17, 7, 5), dtype=np.float32)
LOGITS = RNG.standard_normal((4, 11)).astype(np.float32)


def test_the_forced_instruction_set_serves(cpu_backend: str) -> None:
    if cpu_backend == "reference":
        pytest.skip("the reference has no instruction set")
    from diffcam_fast import _C

    assert _C.cpu_capability() == cpu_backend.removeprefix("cpu-")


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.float16])
def test_cam_equals_tensors(cpu_backend: str, method: str, dtype: type) -> None:
    activations, gradients = ACTIVATIONS.astype(dtype), GRADIENTS.astype(dtype)
    found = functions.cam(activations, gradients, method)
    expected = dcf.cam(torch.from_numpy(activations), torch.from_numpy(gradients), method).numpy()
    assert found.dtype == expected.dtype
    np.testing.assert_allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize("name", ["flipped", "read-only", "fortran", "strided", "record field"])
def test_any_memory_layout(cpu_backend: str, name: str) -> None:
    layouts = {
        "flipped": lambda a: np.ascontiguousarray(a[..., ::-1])[..., ::-1],
        "read-only": lambda a: a.copy(),
        "fortran": np.asfortranarray,
        "strided": lambda a: np.repeat(np.where(True, a, np.nan), 2, axis=-1)[..., ::2],
        "record field": lambda a: _record_field(a),
    }
    activations, gradients = layouts[name](ACTIVATIONS), layouts[name](GRADIENTS)
    if name == "read-only":
        activations.flags.writeable = False
    np.testing.assert_array_equal(activations, ACTIVATIONS)
    expected = functions.cam(ACTIVATIONS, GRADIENTS)
    np.testing.assert_allclose(functions.cam(activations, gradients), expected, atol=1e-5)


def _record_field(array: np.ndarray) -> np.ndarray:
    records = np.zeros(array.shape, dtype=[("tag", "u1"), ("value", "f4")])
    records["value"] = array
    return records["value"]


def test_bfloat16_by_name(cpu_backend: str) -> None:
    ml_dtypes = pytest.importorskip("ml_dtypes")
    activations = ACTIVATIONS.astype(ml_dtypes.bfloat16)
    gradients = GRADIENTS.astype(ml_dtypes.bfloat16)
    expected = functions.cam(activations.astype(np.float32), gradients.astype(np.float32))
    np.testing.assert_allclose(functions.cam(activations, gradients), expected, atol=1e-5)


def test_shapes_follow_the_gradients(cpu_backend: str) -> None:
    assert functions.cam(ACTIVATIONS, GRADIENTS).shape == (3, 2, 7, 5)
    assert functions.cam(ACTIVATIONS, GRADIENTS[:, 0]).shape == (3, 7, 5)
    assert functions.cam(ACTIVATIONS, GRADIENTS[..., 0, 0]).shape == (3, 2, 7, 5)
    assert functions.cam(ACTIVATIONS, GRADIENTS[:, 0, :, 0, 0]).shape == (3, 7, 5)


def test_same_bits_whatever_the_number_of_threads() -> None:
    found = [functions.cam(ACTIVATIONS, GRADIENTS, threads=threads) for threads in (1, 2, 5)]
    np.testing.assert_array_equal(found[0], found[1])
    np.testing.assert_array_equal(found[0], found[2])


@pytest.mark.parametrize(
    "options",
    [{}, {"top_k": 3}, {"baseline": "expected", "temperature": 2.0}, {"baseline": "finer", "ranks": (1, 4)}],
)
@pytest.mark.parametrize("classes", [[0, 3, 10, 5], [[0, 1], [2, 3], [4, 5], [10, 9]]])
def test_logit_difference_equals_tensors(cpu_backend: str, options: dict, classes: list) -> None:
    chosen = np.asarray(classes, dtype=np.int32)
    found = functions.logit_difference(LOGITS, chosen, **options)
    expected = dcf.logit_difference(torch.from_numpy(LOGITS), torch.from_numpy(chosen), **options)
    for got, want in zip(found, expected, strict=True):
        assert (got is None) == (want is None)
        if got is not None and want is not None:
            assert got.shape == tuple(want.shape)
            np.testing.assert_allclose(got, want.numpy(), atol=2e-6)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: functions.cam(torch.rand(1, 2, 3, 3), GRADIENTS), TypeError, "activations: expected a numpy.ndarray"),
        (lambda: functions.cam(ACTIVATIONS.astype(int), GRADIENTS), TypeError, "activations: .*got int64"),
        (lambda: functions.cam(ACTIVATIONS.astype(">f4"), GRADIENTS), TypeError, "native byte order; got >f4"),
        (lambda: functions.cam(ACTIVATIONS, GRADIENTS.astype(np.float64)), TypeError, "gradients: expected the dtype"),
        (lambda: functions.cam(ACTIVATIONS, GRADIENTS[:2]), ValueError, "gradients: expected shape"),
        (lambda: functions.cam(ACTIVATIONS, GRADIENTS, "cam"), ValueError, "method: expected one of"),
        (lambda: functions.cam(ACTIVATIONS, GRADIENTS, threads=0), ValueError, "threads: expected a positive int"),
        (lambda: functions.logit_difference(LOGITS, LOGITS[:, 0]), TypeError, "classes: .*integers; got float32"),
        (
            lambda: functions.logit_difference(LOGITS, np.full(4, 11)),
            ValueError,
            "classes: expected indices from 0 to 10 .*got .*11",
        ),
        (lambda: functions.logit_difference(LOGITS, np.zeros(4, int), top_k=11), ValueError, "top_k: expected 1 to 10"),
        (lambda: functions.logit_difference(LOGITS[0], np.zeros(4, int)), ValueError, "logits: expected shape"),
    ],
)
def test_errors(cpu_backend: str, call: object, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        call()  # type: ignore[operator]


def test_non_finite_stays_in_its_image(cpu_backend: str) -> None:
    activations = ACTIVATIONS.copy()
    activations[1, 0, 0, 0] = math.nan
    found = functions.cam(activations, GRADIENTS)
    assert np.isnan(found[1]).all() and np.isfinite(found[[0, 2]]).all()
