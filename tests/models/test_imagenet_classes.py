"""The names of classes, and finding one of them."""

from __future__ import annotations

import pytest

from diffcam_fast.models import class_name, find_class, imagenet_labels

LABELS = imagenet_labels()


def find(query):
    return find_class(query, LABELS, len(LABELS))


def test_the_thousand_names():
    assert len(LABELS) == 1000
    assert len(set(LABELS)) == 1000
    assert all(label == label.strip() and label for label in LABELS)


@pytest.mark.parametrize(
    ("index", "name"),
    [(0, "tench"), (243, "bull mastiff"), (282, "tiger cat"), (285, "Egyptian cat"), (999, "toilet tissue")],
)
def test_the_order_is_imagenets(index, name):
    assert LABELS[index] == name


def test_the_order_is_torchvisions():
    torchvision = pytest.importorskip("tests.helpers.torchvision_cpu")
    categories = torchvision.models.ResNet50_Weights.DEFAULT.meta["categories"]
    differing = [index for index in range(1000) if categories[index] != LABELS[index]]
    assert differing == [134, 264, 474, 517, 639]  # ours say which crane, which cardigan and which maillot


def test_every_name_and_every_index_finds_its_class():
    assert [find(label) for label in LABELS] == list(range(1000))
    assert [find(str(index)) for index in range(1000)] == list(range(1000))


@pytest.mark.parametrize("query", ["TIGER CAT", "tiger_cat", " Tiger-cat ", "282", 282])
def test_case_and_separators_do_not_matter(query):
    assert find(query) == 282


def test_a_name_of_several_classes_lists_them():
    with pytest.raises(ValueError, match=r"134 crane \(bird\), 517 crane \(machine\)"):
        find("Crane")
    with pytest.raises(ValueError, match="1 twin, 2 twin"):
        find_class("twin", ["other", "twin", "twin"], 3)


@pytest.mark.parametrize(
    ("query", "suggestion"), [("tigercat", "282 tiger cat"), ("siamese", "284 Siamese cat"), ("cran", "134 crane")]
)
def test_an_unknown_name_lists_close_ones(query, suggestion):
    with pytest.raises(ValueError, match=suggestion):
        find(query)


@pytest.mark.parametrize("query", ["", "zzzzzz", "x" * 1000, "\x1b[2J", "1.5", "\N{SUPERSCRIPT TWO}"])
def test_nonsense_is_an_error(query):
    with pytest.raises(ValueError, match="no class is called"):
        find(query)


@pytest.mark.parametrize("query", ["1000", "-1", "99999999999999999999"])
def test_an_index_out_of_range(query):
    with pytest.raises(ValueError, match="expected 0 to 999"):
        find(query)


def test_classes_without_names():
    assert class_name(17, None) == "class 17"
    assert find_class("17", None, 20) == 17
    with pytest.raises(ValueError, match="have no names"):
        find_class("cat", None, 20)
