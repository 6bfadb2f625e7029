"""How the low-rank codec divides a layout: matrices with biases, pairs of dense layers, and chunks of the rest."""

from __future__ import annotations

import math
from functools import lru_cache
from itertools import pairwise
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from edge_runtime.compression.lowrank_pair import MAX_OUTPUTS, MIN_UNITS
from edge_runtime.errors import CodecError

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from edge_runtime.compression.base import Layout, Vector

MAX_RANK = 63
CHUNK = 4096  # elements of a tensor without factors that share a table
CONVOLUTION_WEIGHT = 2.0  # a power of two; an error in a kernel counts at every place it is applied to
_MIN_ELEMENTS = 256
_MAX_SIDE = 1 << 18  # a longer factor of zeros alone would take most budgets
_MAX_ELEMENTS = 1 << 31


class Matrix(NamedTuple):
    """A tensor coded by factors.

    Attributes:
        start: its first element.
        rows: its first dimension.
        columns: all other dimensions.
        bias: first element of its bias ``[rows]``, or -1.
        weight: what its values are multiplied with before they are coded.
    """

    start: int
    rows: int
    columns: int
    bias: int
    weight: float

    @property
    def width(self) -> int:
        """Columns with the bias."""
        return self.columns + (self.bias >= 0)

    @property
    def rank(self) -> int:
        """Most components it may have."""
        return min(self.rows, self.width, MAX_RANK)

    def view(self, vector: Vector) -> NDArray[np.float32]:
        """The matrix without its bias, ``[rows, columns]``."""
        return vector[self.start : self.start + self.rows * self.columns].reshape(self.rows, self.columns)

    def take(self, vector: Vector) -> NDArray[np.float32]:
        """The weighted matrix with its bias as last column, ``[rows, width]``."""
        values = self.view(vector)
        if self.bias >= 0:
            values = np.concatenate([values, vector[self.bias : self.bias + self.rows, None]], 1)
        return values if self.weight == 1.0 else values * np.float32(self.weight)


class Parts(NamedTuple):
    """Matrices, pairs (index of the first of two matrices that follow each other), chunks (start, size, weight)."""

    matrices: tuple[Matrix, ...]
    pairs: tuple[int, ...]
    chunks: tuple[tuple[int, int, float], ...]


def parts(layout: Layout) -> Parts:
    """Both ends derive it from the layout alone.

    A tensor of at least 256 elements and two dimensions is a matrix of its first dimension times the rest (each up to
    2**18); the tensor after it is its bias if the shape fits. Two dense layers with at least 256 units between them
    and at most 64 outputs make a pair. Kernels of convolutions, with their biases, weigh twice as much as the rest.

    Raises:
        CodecError: more than 2**31 elements.
    """
    return _parts(layout.shapes)


@lru_cache(maxsize=8)
def _parts(shapes: tuple[tuple[int, ...], ...]) -> Parts:
    sizes = [math.prod(shape) for shape in shapes]
    if sum(sizes) > _MAX_ELEMENTS:
        raise CodecError(f"{sum(sizes)} parameters are more than the low-rank codec takes")
    matrices: list[Matrix] = []
    dense: list[bool] = []
    chunks: list[tuple[int, int, float]] = []
    start = 0
    bias_of: tuple[int, ...] = (-1,)  # shape that a bias of the tensor before would have
    taken = False
    for index, (shape, size) in enumerate(zip(shapes, sizes, strict=True)):
        weight = CONVOLUTION_WEIGHT if len(shape) > 2 or shape == bias_of else 1.0
        bias_of = shape[:1] if len(shape) > 2 else (-1,)
        if taken:
            taken = False
        elif _is_matrix(shape, size):
            taken = index + 1 < len(shapes) and shapes[index + 1] == shape[:1]
            matrices.append(Matrix(start, shape[0], size // shape[0], start + size if taken else -1, weight))
            dense.append(len(shape) == 2)
        else:
            chunks += [(at, min(CHUNK, start + size - at), weight) for at in range(start, start + size, CHUNK)]
        start += size
    pairs: list[int] = []
    for index, (one, two) in reversed(list(enumerate(pairwise(matrices)))):
        wide = two.columns == one.rows >= MIN_UNITS and 1 < two.rows <= MAX_OUTPUTS
        flat = dense[index] and dense[index + 1] and min(one.bias, two.bias) >= 0
        if wide and flat and (not pairs or index < pairs[-1] - 1):
            pairs.append(index)
    return Parts(tuple(matrices), tuple(reversed(pairs)), tuple(chunks))


def _is_matrix(shape: tuple[int, ...], size: int) -> bool:
    if len(shape) < 2 or size < _MIN_ELEMENTS:
        return False
    return 1 < shape[0] < size and max(shape[0], size // shape[0]) <= _MAX_SIDE
