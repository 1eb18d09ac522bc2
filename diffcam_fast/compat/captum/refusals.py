"""What is refused, as errors that code written for captum catches, too: it asserts, or lets autograd complain."""

from __future__ import annotations


class InvalidValue(ValueError, AssertionError):
    """An argument has no valid value."""


class InvalidType(TypeError, AssertionError):
    """An argument is of no valid type."""


class NoGradient(ValueError, RuntimeError):
    """There is no way back from the output to the layer."""
