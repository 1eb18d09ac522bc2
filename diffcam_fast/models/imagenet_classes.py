"""The names of the 1000 ImageNet classes, in the order of torchvision's and timm's classifiers, and finding one.

Names that ImageNet gives to two classes carry what tells them apart in parentheses: "crane (bird)", "crane (machine)".
"""

from __future__ import annotations

import difflib
import functools
import json
from collections.abc import Sequence
from importlib import resources

_MAX_SUGGESTIONS = 5


@functools.cache
def imagenet_labels() -> tuple[str, ...]:
    """The 1000 names, by class index."""
    text = resources.files("diffcam_fast.models").joinpath("imagenet_classes.json").read_text(encoding="utf-8")
    return tuple(json.loads(text))


def class_name(index: int, labels: Sequence[str] | None) -> str:
    """The name of a class, or "class 17" for a model whose classes have no names."""
    return labels[index] if labels is not None else f"class {index}"


def find_class(query: str | int, labels: Sequence[str] | None, class_count: int) -> int:
    """Index of the class that a person named, by index or by name.

    Case, underscores and hyphens do not matter. A name in full comes before a name without its parenthesis.

    Args:
        query: an index ("282" or 282), or a name ("tiger cat").
        labels: the names of the classes, or None where they have none.
        class_count: how many classes the model has.

    Returns:
        The index, from 0 to `class_count - 1`.

    Raises:
        ValueError: an index out of range; a name of several classes (lists them); an unknown one (lists close ones).
    """
    text = str(query).strip()
    if text.lstrip("+-").isdecimal():
        index = int(text)
        if not 0 <= index < class_count:
            raise ValueError(f"class: got index {index}, expected 0 to {class_count - 1}")
        return index
    if labels is None:
        raise ValueError(f"class: got {text!r}, but this model's classes have no names; give an index instead")

    wanted = _fold(text)
    folded = [_fold(label) for label in labels]
    matches = [index for index, label in enumerate(folded) if label == wanted]
    if not matches:
        matches = [index for index, label in enumerate(folded) if label.partition(" (")[0] == wanted]
    if len(matches) == 1:
        return matches[0]
    if matches:
        raise ValueError(f"class: {text!r} names several classes: {_listing(matches, labels)}; give the index")
    close = _close_matches(wanted, folded)
    hint = f"; close to it: {_listing(close, labels)}" if close else ""
    raise ValueError(f"class: no class is called {text!r}{hint}")


def _close_matches(wanted: str, folded: Sequence[str]) -> list[int]:
    """Classes whose name has all the words that were asked for, then those that are spelled alike."""
    words = set(wanted.split())
    containing = [index for index, label in enumerate(folded) if words and words <= set(label.split())]
    short = [label.partition(" (")[0] for label in folded]
    alike = difflib.get_close_matches(wanted, short, n=_MAX_SUGGESTIONS, cutoff=0.7)
    found = containing + [index for name in alike for index, label in enumerate(short) if label == name]
    return list(dict.fromkeys(found))[:_MAX_SUGGESTIONS]


def _fold(name: str) -> str:
    return " ".join(name.casefold().replace("_", " ").replace("-", " ").split())


def _listing(indices: Sequence[int], labels: Sequence[str]) -> str:
    return ", ".join(f"{index} {labels[index]}" for index in indices)
