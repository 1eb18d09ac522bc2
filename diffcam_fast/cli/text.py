"""Text that goes to a terminal or becomes a file's name, whatever a hostile file was called."""

from __future__ import annotations

import unicodedata

_LONGEST_NAME = 60
_RESERVED = {"con", "prn", "aux", "nul", *(f"{port}{number}" for port in ("com", "lpt") for number in range(1, 10))}


def displayed(text: object) -> str:
    """The text with control characters, line breaks and undecodable bytes written out, so that it only ever reads."""
    return "".join(
        letter if letter.isprintable() else letter.encode("unicode_escape", "backslashreplace").decode("ascii")
        for letter in str(text)
    )


def one_line(text: object) -> str:
    """The text on one line."""
    return displayed(" ".join(str(text).split()))


def safe_name(text: str, fallback: str) -> str:
    """A name for a file that is nothing else on any system: no separators, no dots in front, not too long, not empty.

    Args:
        text: any text.
        fallback: where nothing of the text is left.
    """
    normalized = unicodedata.normalize("NFC", text)
    kept = "".join(letter if letter.isalnum() or letter in "-_." else "_" for letter in normalized)
    name = kept.strip("._- ")
    while len(name.encode()) > _LONGEST_NAME:
        name = name[:-1]
    name = name.rstrip("._- ") or fallback
    return f"{name}_" if name.partition(".")[0].casefold() in _RESERVED else name
