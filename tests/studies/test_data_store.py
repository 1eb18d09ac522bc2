"""What was made once is kept, checked and not made again."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks.studies.data_store import arrays

RECIPE = {"images": 3, "rate": 0.1}


class Maker:
    """Counts how often it makes."""

    def __init__(self):
        self.count = 0

    def __call__(self):
        self.count += 1
        return {"weight": np.arange(6.0).reshape(2, 3), "count": np.array(self.count)}


def test_made_once(tmp_path):
    make = Maker()
    first = arrays(tmp_path / "new", "head", RECIPE, make)
    second = arrays(tmp_path / "new", "head", dict(reversed(RECIPE.items())), make)
    assert make.count == 1
    assert first.keys() == second.keys() == {"weight", "count"}
    np.testing.assert_array_equal(second["weight"], [[0, 1, 2], [3, 4, 5]])
    assert second["count"].shape == ()


def test_another_recipe_is_made_anew(tmp_path):
    make = Maker()
    arrays(tmp_path, "head", RECIPE, make)
    assert arrays(tmp_path, "head", {**RECIPE, "rate": 0.2}, make)["count"] == 2
    assert arrays(tmp_path, "head", RECIPE, make)["count"] == 1


def change(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("suffix", [".npz", ".sha256"])
@pytest.mark.parametrize("damage", [change, lambda path: path.unlink()], ids=["changed", "missing"])
def test_what_was_damaged_is_made_anew(tmp_path, suffix, damage):
    make = Maker()
    arrays(tmp_path, "head", RECIPE, make)
    (path,) = tmp_path.glob(f"*{suffix}")
    damage(path)
    assert arrays(tmp_path, "head", RECIPE, make)["count"] == 2
    assert arrays(tmp_path, "head", RECIPE, make)["count"] == 2


def test_python_objects_are_refused(tmp_path):
    with pytest.raises(TypeError, match="names: got an array of Python objects, expected numbers"):
        arrays(tmp_path, "head", RECIPE, lambda: {"names": np.array(["a", None], dtype=object)})
    assert list(tmp_path.iterdir()) == []


def test_an_interrupted_making_leaves_nothing(tmp_path):
    def make():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        arrays(tmp_path, "head", RECIPE, make)
    assert list(tmp_path.iterdir()) == []
