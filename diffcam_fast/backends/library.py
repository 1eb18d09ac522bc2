"""The `torch.library` namespace of the package: schemas, and the reference implementation behind each of them.

An op exists, and is correct, as soon as it is defined here. Compiled implementations are registered on the same names
for the device they serve and take precedence there.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

NAMESPACE = "diffcam_fast"

_library = torch.library.Library(NAMESPACE, "DEF")

#: The reference implementation of every op, by op name.
references: dict[str, Callable[..., Any]] = {}

#: Called with an op's name and arguments before its reference serves a call; raises where another backend is forced.
_before_reference: Callable[[str, tuple[Any, ...]], None] | None = None


def define(name: str, schema: str, reference: Callable[..., Any]) -> None:
    """Define `diffcam_fast::<name>` and let `reference` serve every device that no compiled implementation serves.

    Args:
        name: op name, the stem that all its files share.
        schema: arguments and results in the `torch.library` schema language, without the name.
        reference: plain PyTorch function with the schema's arguments in order.
    """

    def serve(*arguments: Any) -> Any:
        if _before_reference is not None:
            _before_reference(name, arguments)
        return reference(*arguments)

    references[name] = reference
    _library.define(f"{name}{schema}", tags=(torch.Tag.pt2_compliant_tag,))
    _library.impl(name, serve, "CompositeExplicitAutograd")


def guard_references(check: Callable[[str, tuple[Any, ...]], None] | None) -> None:
    """Have `check` called before a reference serves; None removes it."""
    global _before_reference
    _before_reference = check
