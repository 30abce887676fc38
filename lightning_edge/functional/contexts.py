"""What has been decoded of a weight tensor, as the context of what comes next.

Weights are no noise: rows and kernels differ in energy, neighbours in a kernel have like signs. The codes of a tensor
are taken column by column, all rows of a column at once; each code gets a context from codes of earlier columns:

* energy: mean magnitudes of the row so far, of the row's neighbourhood in the kernel's plane, and of that neighbourhood
  over all rows, added up as logarithms;
* direction: left + above - half of above left, a plane through the neighbours, which predicts the sign.

All of it is whole-number arithmetic, so that every decoder finds the same contexts.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Integers = NDArray[np.int64]
Geometry = tuple[int, int, int]
"""Planes of a row, height and width of each: (in_channels, kernel height, kernel width) of a convolution."""

MEAN_UNIT = 64
"""Means of magnitudes are kept in 1 / 64."""
MAX_LEVEL = 1 << 8
"""Levels are smaller than this in magnitude."""
ENERGY_WEIGHTS = ((4, 6, 6), (6, 4, 6), (8, 2, 8))
DIRECTIONS: dict[int, tuple[int, ...]] = {1: (), 3: (-14, 14), 5: (-30, -10, 10, 30), 7: (-40, -20, -6, 6, 20, 40)}
"""Number of directions and their borders, in tenths of the mean magnitude."""
_NEIGHBOURS = ((0, 1), (0, 2), *((dy, dx) for dy in (1, 2) for dx in (-2, -1, 0, 1, 2)))
_PRIORS = (8, 2, 1)


class Neighbourhood:
    """The columns decoded so far, and what they say about the next one.

    Args:
        rows: Rows of the tensor.
        geometry: What the columns are.
        mean: Mean magnitude of all levels, in units of 1 / :data:`MEAN_UNIT`, at least 1: what is expected of the
            unknown.

    >>> seen = Neighbourhood(2, (1, 1, 2), mean=64)
    >>> seen.put(np.array([3, -3])); seen.directions()
    array([ 6, -6])
    """

    def __init__(self, rows: int, geometry: Geometry, *, mean: int) -> None:
        planes, height, width = geometry
        self._rows, self._mean, self._column = rows, mean, 0
        self._size, self._width = height * width, width
        self._levels = np.zeros((planes * self._size, rows), dtype=np.int32)
        self._row_sums = np.zeros(rows, dtype=np.int64)
        self._offsets = [_offsets(place, width) for place in range(self._size)]

    def put(self, levels: Integers) -> None:
        """Take in the levels of the next column: signed numbers, zero for what matters least."""
        self._levels[self._column] = levels
        self._row_sums += np.abs(levels)
        self._column += 1

    def energies(self) -> tuple[Integers, Integers, int]:
        """Return logarithms, 16 to the octave, of the mean magnitude of row, neighbourhood, and neighbourhood column.

        Shapes (rows,), (rows,) and a number, for the column that comes next.
        """
        column, mean = self._column, self._mean
        offsets = self._offsets[column % self._size]
        row = (MEAN_UNIT * self._row_sums + _PRIORS[0] * mean) // (column + _PRIORS[0])
        near = np.abs(self._levels[column - offsets]).sum(0, dtype=np.int64)
        count, total = len(offsets), int(near.sum())
        kernel = (MEAN_UNIT * near + _PRIORS[1] * mean) // (count + _PRIORS[1])
        everywhere = (MEAN_UNIT * total + self._rows * _PRIORS[2] * mean) // (self._rows * (count + _PRIORS[2]))
        logarithms = _logarithm(np.concatenate([row, kernel, [everywhere]]))
        return logarithms[: self._rows], logarithms[self._rows : -1], int(logarithms[-1])

    def directions(self) -> Integers:
        """Return 2 x left + 2 x above - above left of the column that comes next, shape (rows,); 0 for what is not."""
        left, above, corner = self._sides()
        plane: Integers = 2 * (left + above) - corner
        return plane

    def touching(self) -> Integers:
        """Return how many of left and above are not zero, shape (rows,)."""
        left, above, _ = self._sides()
        count: Integers = (left != 0).astype(np.int64) + (above != 0)
        return count

    def _sides(self) -> tuple[Integers, Integers, Integers]:
        place = self._column % self._size
        row, column = divmod(place, self._width)
        none = np.zeros(self._rows, dtype=np.int64)

        def at(offset: int) -> Integers:
            levels: Integers = self._levels[self._column - offset].astype(np.int64)
            return levels

        left = at(1) if column else none
        above = at(self._width) if row else none
        corner = at(self._width + 1) if row and column else none
        return left, above, corner


@dataclass(frozen=True)
class Contexts:
    """How energies and directions become the number of a context.

    Args:
        weighting: Index into :data:`ENERGY_WEIGHTS`.
        base: Smallest weighted energy of the second class.
        step: Width of a class.
        energies: Number of classes of energy.
        directions: Number of directions, a key of :data:`DIRECTIONS`; 0 for a mask, whose neighbours are counted.
    """

    weighting: int
    base: int
    step: int
    energies: int
    directions: int

    @property
    def count(self) -> int:
        """Number of contexts."""
        return self.energies * (self.directions or 3)

    def of(self, seen: Neighbourhood, *, mean: int) -> Integers:
        """Return the context of every row for the next column, shape (rows,)."""
        weighted = weigh(seen.energies(), self.weighting)
        if self.directions == 0:
            return self.combine(weighted, seen.touching())
        return self.combine(weighted, direction_class(seen.directions(), self.directions, mean=mean))

    def combine(self, weighted: Integers, classes: Integers) -> Integers:
        """Return the contexts of weighted energies and of classes of direction or touching neighbours."""
        energy = np.minimum(np.maximum((weighted - self.base) // self.step, 0), self.energies - 1)
        return energy * (self.directions or 3) + classes


def weigh(energies: tuple[Integers, Integers, Integers | int], weighting: int) -> Integers:
    """Return the weighted sum of the three logarithms.

    >>> weigh((np.array([1]), np.array([2]), 3), 0)
    array([34])
    """
    weights = ENERGY_WEIGHTS[weighting]
    return weights[0] * energies[0] + weights[1] * energies[1] + weights[2] * energies[2]


def direction_class(directions: Integers, count: int, *, mean: int) -> Integers:
    """Return which of ``count`` classes each direction falls into.

    >>> direction_class(np.array([-9, 0, 9]), 3, mean=64)
    array([0, 1, 2])
    """
    borders = np.array(DIRECTIONS[count], dtype=np.int64) * mean
    return np.searchsorted(borders, 10 * MEAN_UNIT * directions, side="left")


def mean_level(levels: Integers) -> int:
    """Return the mean magnitude in units of 1 / :data:`MEAN_UNIT`, at least 1.

    >>> mean_level(np.array([1, -2]))
    96
    """
    return max(1, round(MEAN_UNIT * float(np.abs(levels).mean())))


def geometries(shape: tuple[int, ...]) -> list[Geometry]:
    """Return what the columns of a tensor of this shape can be; of a matrix, planes that its inputs may come from.

    >>> geometries((20, 1, 5, 5)), geometries((10, 32))
    ([(1, 5, 5)], [(32, 1, 1), (8, 2, 2), (2, 4, 4)])
    """
    columns = int(np.prod(shape[1:], dtype=np.int64))
    if len(shape) > 2:
        width = shape[-1]
        height = shape[-2] if len(shape) > 3 else 1
        return [(columns // (height * width), height, width)]
    sides = range(2, 33)
    return [(columns, 1, 1), *((columns // side**2, side, side) for side in sides if columns % side**2 == 0)]


def _offsets(place: int, width: int) -> Integers:
    """Return how far back the neighbours of a place in a plane lie, those that are inside."""
    row, column = divmod(place, width)
    inside = [dy * width + dx for dy, dx in _NEIGHBOURS if dy <= row and 0 <= column - dx < width]
    return np.array(inside, dtype=np.int64)


def _logarithm(values: Integers) -> Integers:
    """Return 16 x log2 of whole numbers below 2**24, straight lines between powers of two: upper bits of a float32."""
    bits = np.maximum(values, 1).astype(np.float32).view(np.int32)
    return (bits >> 19).astype(np.int64) - (127 << 4)
