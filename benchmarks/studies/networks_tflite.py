"""Reading the weights of convolutions out of a TensorFlow Lite file.

Such a file is a FlatBuffer: tables that point to one another by offsets. Only what leads from the model to the weights
of its convolutions is read here, after the public schema of TensorFlow Lite; every offset is checked by the functions
that follow it.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

# Positions of fields in the schema's tables.
_MODEL_OPERATOR_CODES, _MODEL_SUBGRAPHS, _MODEL_BUFFERS = 1, 2, 4
_SUBGRAPH_TENSORS, _SUBGRAPH_OPERATORS = 0, 3
_TENSOR_SHAPE, _TENSOR_TYPE, _TENSOR_BUFFER, _TENSOR_NAME, _TENSOR_QUANTIZATION = range(5)
_QUANTIZATION_SCALE, _QUANTIZATION_ZERO_POINT = 2, 3
_OPERATOR_CODE, _OPERATOR_INPUTS = 0, 1
_CODE_BUILTIN = 0
_BUFFER_DATA = 0

_CONVOLUTION = 3
_TYPES = {0: np.dtype("<f4"), 2: np.dtype("<i4"), 3: np.dtype("u1")}


@dataclass(frozen=True)
class Convolution:
    """Weights (outputs, inputs, height, width) and bias (outputs,), float32."""

    name: str
    weight: np.ndarray
    bias: np.ndarray


def read_convolutions(content: bytes) -> list[Convolution]:
    """The convolutions of the first subgraph, in the order in which they run, with dequantised weights.

    A stored number q stands for `scale * (q - zero point)`, with one scale a tensor.

    Raises:
        ValueError: not such a file, or one that is quantised in another way.
    """
    try:
        model = _Table.root(content)
        codes = [code.integer(_CODE_BUILTIN, "b") for code in model.tables(_MODEL_OPERATOR_CODES)]
        buffers = list(model.tables(_MODEL_BUFFERS))
        graph = next(model.tables(_MODEL_SUBGRAPHS))
        tensors = list(graph.tables(_SUBGRAPH_TENSORS))
        found = []
        for operator in graph.tables(_SUBGRAPH_OPERATORS):
            if codes[operator.integer(_OPERATOR_CODE, "I")] != _CONVOLUTION:
                continue
            _, weight, bias = (tensors[index] for index in operator.numbers(_OPERATOR_INPUTS, np.dtype("<i4")))
            kernel = _values(weight, buffers).transpose(0, 3, 1, 2)
            found.append(Convolution(weight.text(_TENSOR_NAME), np.ascontiguousarray(kernel), _values(bias, buffers)))
        return found
    except (struct.error, IndexError, StopIteration, KeyError, UnicodeDecodeError) as error:
        raise ValueError(f"not a TensorFlow Lite model that can be read ({type(error).__name__}: {error})") from error


def _values(tensor: _Table, buffers: list[_Table]) -> np.ndarray:
    """The tensor's numbers, float32."""
    kind = _TYPES[tensor.integer(_TENSOR_TYPE, "b")]
    shape = tuple(tensor.numbers(_TENSOR_SHAPE, np.dtype("<i4")))
    stored = buffers[tensor.integer(_TENSOR_BUFFER, "I")].numbers(_BUFFER_DATA, np.dtype("u1"))
    values = stored.view(kind).reshape(shape)
    if kind.kind == "f":
        return values.copy()
    (quantization,) = tensor.table(_TENSOR_QUANTIZATION)
    scale = quantization.numbers(_QUANTIZATION_SCALE, np.dtype("<f4"))
    zero_point = quantization.numbers(_QUANTIZATION_ZERO_POINT, np.dtype("<i8"))
    if scale.size != 1 or zero_point.size > 1:
        raise ValueError(f"{tensor.text(_TENSOR_NAME)}: got {scale.size} scales, expected one")
    offset = int(zero_point[0]) if zero_point.size else 0
    return ((values.astype(np.float64) - offset) * float(scale[0])).astype(np.float32)


@dataclass(frozen=True)
class _Table:
    """A table in a FlatBuffer: where it begins, and where its fields are said to be."""

    content: bytes
    start: int

    @classmethod
    def root(cls, content: bytes) -> _Table:
        return cls(content, _number(content, 0, "I"))

    def integer(self, field: int, kind: str) -> int:
        """A number of a kind that `struct` knows; 0 where the field is left out."""
        place = self._place(field)
        return _number(self.content, place, kind) if place else 0

    def text(self, field: int) -> str:
        return self.numbers(field, np.dtype("u1")).tobytes().decode()

    def numbers(self, field: int, kind: np.dtype) -> np.ndarray:
        """A vector of numbers; empty where the field is left out."""
        place = self._place(field)
        if not place:
            return np.empty(0, kind)
        start, length = self._vector(place)
        if start + length * kind.itemsize > len(self.content):
            raise IndexError(f"a vector of {length} numbers at {start} ends outside the file")
        return np.frombuffer(self.content, kind, length, start)

    def table(self, field: int) -> Iterator[_Table]:
        """The table that a field points to, or none."""
        place = self._place(field)
        if place:
            yield _Table(self.content, place + _number(self.content, place, "I"))

    def tables(self, field: int) -> Iterator[_Table]:
        """The tables of a vector of tables."""
        place = self._place(field)
        if place:
            start, length = self._vector(place)
            for entry in range(start, start + 4 * length, 4):
                yield _Table(self.content, entry + _number(self.content, entry, "I"))

    def _vector(self, place: int) -> tuple[int, int]:
        start = place + _number(self.content, place, "I")
        return start + 4, _number(self.content, start, "I")

    def _place(self, field: int) -> int:
        """Where a field's value is, or 0 where it is left out."""
        fields = self.start - _number(self.content, self.start, "i")
        if 4 + 2 * field >= _number(self.content, fields, "H"):
            return 0
        offset = _number(self.content, fields + 4 + 2 * field, "H")
        return self.start + offset if offset else 0


def _number(content: bytes, place: int, kind: str) -> int:
    if place < 0:  # struct would count from the end
        raise IndexError(f"an offset points to {place}, before the file")
    return int(struct.unpack_from(f"<{kind}", content, place)[0])
