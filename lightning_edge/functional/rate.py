"""Rate-aware scalar clusters: a value pays for its distance to a centroid and for the length of that centroid's code.

For one value w the cheapest centroid minimizes (w - c)^2 + offset(c), and w^2 is the same for all: so each centroid is
a straight line in w, the cheapest ones are the lower envelope of k lines, and every region is an interval between two
boundaries, as in plain k-means. Assignment is a search of boundaries, whatever the code lengths are.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lightning_edge.functional.floats import sortable_bits

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]

# Values in flight. On the CPU a chunk stays in the cache and below the size at which torch starts threads, which cost
# more than they bring here and stall when another process has the cores.
_CPU_CHUNK, _GPU_CHUNK = 1 << 15, 1 << 22
_TABLE_SHIFT = 14  # keys of 18 bits: 512 bins to each power of two
IMPORTANCE_CLASSES = 32
_LEAST_IMPORTANCE = 2.0**-IMPORTANCE_CLASSES
_MAX_ITERATIONS = 1000
_STILL = 1e-6


@dataclass(frozen=True)
class Cells:
    """The values of one importance class, merged into sorted points.

    ``points`` are their weighted means, ``counts`` how many values each stands for, ``mass`` their summed importance.
    """

    importance: float
    points: Floats
    counts: Floats
    mass: Floats


def chunks(values: Tensor) -> Iterator[slice]:
    """Yield slices over the first dimension, at the same bounds on every machine: no sum depends on the threads.

    >>> list(chunks(torch.zeros(3)))
    [slice(0, 32768, None)]
    """
    step = _GPU_CHUNK if values.is_cuda else _CPU_CHUNK
    return (slice(start, start + step) for start in range(0, len(values), step))


def log_bins(values: Tensor, shift: int) -> Tensor:
    """Return the logarithmic bin of each value, int32 from 0 to 2**(32 - shift) - 1, in the order of the values.

    Raises:
        ValueError: If a value is not finite.

    >>> log_bins(torch.tensor([-1.0, 0.0, 1.0, 1.001]), 14)
    tensor([ 66047, 131072, 196096, 196096], dtype=torch.int32)
    """
    return (sortable_bits(values, what="values") >> shift) + (1 << 31 - shift)


def code_lengths(codes: Tensor, clusters: int) -> Tensor:
    """Return the ideal length in bits of each cluster's code, -log2 of its share of all codes, float64 (clusters,).

    A cluster that does not occur gets the length of half an occurrence: long, and finite.

    Raises:
        ValueError: If ``codes`` is empty.

    >>> code_lengths(torch.tensor([0, 0, 0, 1]), 3)
    tensor([0.4150, 2.0000, 3.0000], dtype=torch.float64)
    """
    if codes.numel() == 0:
        raise ValueError("codes must not be empty, got a tensor of no elements")
    counts = torch.bincount(codes.flatten(), minlength=clusters).double()
    return -(counts.clamp(min=0.5) / codes.numel()).log2()


def assign_1d(
    values: Tensor,
    centroids: Tensor,
    *,
    bits: Tensor | None = None,
    rate: float = 0.0,
    weights: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Return the cheapest centroid of each value: the least ``weight * (value - centroid)**2 + rate * bits``.

    Without ``weights`` the assignment is exact. With them, values are told apart by 32 classes of importance, each a
    factor of two wide and represented by its mean (all below 2**-31 of the largest are one class), and the assignment
    is exact for these means. Weights change nothing without a rate. Equal costs go to the smaller centroid.

    Args:
        values: Numbers, any shape.
        centroids: Shape (k,), any order.
        bits: Code length of each centroid, shape (k,), as :func:`code_lengths` returns it; None: nearest centroid.
        rate: Price of one bit in the unit of the weighted squared error, >= 0.
        weights: Importance of each value, >= 0, shape of ``values``; all zero counts as all equal.
        out: Where the indices go, int32 and contiguous, shape of ``values``; None: a new tensor.

    Returns:
        int32 indices into ``centroids``, shape of ``values``.

    Raises:
        ValueError: If there are no centroids, a value is not finite, or a shape, ``rate`` or ``weights`` is wrong.

    >>> assign_1d(torch.tensor([0.4, 0.6]), torch.tensor([0.0, 1.0]), bits=torch.tensor([0.1, 3.3]), rate=0.1)
    tensor([0, 0], dtype=torch.int32)
    """
    check_rate(rate)
    if centroids.dim() != 1 or len(centroids) == 0:
        raise ValueError(f"centroids must be of shape (k,), k >= 1, got {tuple(centroids.shape)}")
    if bits is not None and bits.shape != centroids.shape:
        raise ValueError(f"bits must be one per centroid, got {tuple(bits.shape)} for {len(centroids)} centroids")
    table = centroids.detach().cpu().double().numpy()
    lengths = np.zeros(len(table)) if bits is None else bits.detach().cpu().double().numpy()
    flat = values.detach().flatten()
    codes = torch.empty(flat.shape, dtype=torch.int32, device=flat.device) if out is None else out.view(-1)
    if weights is None or rate == 0.0 or bits is None:
        regions = _Regions(table, rate * lengths, flat, lookup=flat.numel() >= _CPU_CHUNK and not flat.is_cuda)
        for part in chunks(flat):
            codes[part] = regions.assign(flat[part])
        return codes.view(values.shape)
    importance = Importance(weights, values)
    classes = {
        number: _Regions(table, rate / (mean * importance.largest) * lengths, flat, lookup=False)
        for number, mean in importance.class_means().items()
    }
    for part in chunks(flat):
        owner = importance.classes(importance(part))
        for number, regions in classes.items():
            mine = (owner == number).nonzero().flatten()
            codes[part][mine] = regions.assign(flat[part][mine])
    return codes.view(values.shape)


def check_rate(rate: float) -> None:
    """Raise a ValueError unless ``rate`` is a finite number of at least 0.

    >>> check_rate(0.5)
    """
    if not 0.0 <= rate < float("inf"):
        raise ValueError(f"rate must be a finite number >= 0, the price of one bit in squared error, got {rate!r}")


class Importance:
    """The weights of a weighted k-means, relative to the largest and with a floor, read in chunks.

    The floor of 2**-32 keeps every mean defined: a cluster of weights that are all zero has its plain mean. Weights
    that one number for each row was expanded to are never copied.
    """

    def __init__(self, weights: Tensor, values: Tensor) -> None:
        if weights.shape != values.shape:
            raise ValueError(
                f"weights must have the shape of values, {tuple(values.shape)}, got {tuple(weights.shape)}"
            )
        by_row = weights.dim() > 1 and not any(weights.stride()[1:])
        self._columns = weights[0].numel() if by_row and len(weights) else 1
        self._numbers = weights.detach().flatten(1)[:, 0] if self._columns > 1 else weights.detach().flatten()
        self._all = self._numbers[:1].expand(weights.numel())  # no memory: what chunks are counted of
        low, high = (float(bound) for bound in self._numbers.aminmax()) if weights.numel() else (0.0, 0.0)
        if not (low >= 0.0 and high < float("inf")):
            raise ValueError(f"weights must be finite and >= 0, got values from {low} to {high}")
        self.largest = high or 1.0
        self._known = high > 0.0

    def __call__(self, part: slice) -> Tensor:
        """Return the importance of a part, float64, from 2**-32 to 1."""
        chunk = self._read(part).double()
        return (chunk / self.largest).clamp_(min=_LEAST_IMPORTANCE) if self._known else torch.ones_like(chunk)

    def _read(self, part: slice) -> Tensor:
        if self._columns == 1:
            return self._numbers[part]
        start, stop, _ = part.indices(len(self._all))
        rows = torch.arange(start, stop, device=self._numbers.device) // self._columns
        return self._numbers.index_select(0, rows)

    @staticmethod
    def classes(importance: Tensor) -> Tensor:
        """Return 0 for the least importance up to 31 for the largest."""
        return torch.frexp(importance).exponent.clamp_(max=0) + (IMPORTANCE_CLASSES - 1)

    def class_means(self) -> dict[int, float]:
        """Return the mean importance of every class that occurs."""
        counts, sums = torch.zeros(2, IMPORTANCE_CLASSES, dtype=torch.float64, device=self._numbers.device)
        for part in chunks(self._all):
            importance = self(part)
            number = self.classes(importance)
            add_by(counts, number)
            add_by(sums, number, importance)
        return {number: float(sums[number] / counts[number]) for number in counts.nonzero().flatten().tolist()}


def add_by(table: Tensor, index: Tensor, values: Tensor | None = None) -> None:
    """Add the float64 ``values``, or ones, to the places of ``table`` that ``index`` names, in a fixed order.

    >>> table = torch.zeros(3).double()
    >>> add_by(table, torch.tensor([0, 2, 0])); table
    tensor([2., 0., 1.], dtype=torch.float64)
    """
    if not table.is_cuda:  # one value after the other
        table.index_add_(0, index, table.new_ones(1).expand(len(index)) if values is None else values)
        return
    lengths = torch.bincount(index, minlength=len(table))
    if values is None:
        table += lengths
        return
    # Atomic additions come in the order of the threads: sort, so that every rank gets the same bits.
    table += torch.segment_reduce(values[index.argsort(stable=True)], "sum", lengths=lengths, initial=0.0)


class _Regions:
    """The intervals of the real line that belong to each centroid."""

    def __init__(self, centroids: Floats, offsets: Floats, like: Tensor, *, lookup: bool) -> None:
        owners, boundaries = envelope(centroids, offsets)
        # Codes are the searched positions themselves when every centroid has a region and they came in order.
        plain = len(owners) == len(centroids) and bool((np.diff(owners) == 1).all())
        self._owners = None if plain else torch.from_numpy(owners.astype(np.int32)).to(like.device)
        exact = torch.from_numpy(boundaries)
        rounded = exact.to(torch.float64 if like.dtype == torch.float64 else torch.float32)
        # A value is at most the boundary if and only if it is at most the boundary rounded down.
        down = torch.nextafter(rounded, torch.full_like(rounded, -torch.inf))
        self._boundaries = torch.where(rounded.double() > exact, down, rounded).to(like.device)
        self._table = _lookup(self._boundaries) if lookup else None

    def assign(self, chunk: Tensor) -> Tensor:
        bins, chunk = log_bins(chunk, _TABLE_SHIFT), chunk.to(self._boundaries.dtype)
        if self._table is None:
            position = torch.bucketize(chunk, self._boundaries, out_int32=True)
        else:
            below, boundary = self._table
            position = below.index_select(0, bins).add_(chunk > boundary.index_select(0, bins))
        return position if self._owners is None else self._owners.index_select(0, position)


def _lookup(boundaries: Tensor) -> tuple[Tensor, Tensor] | None:
    """Return, for each logarithmic bin, the number of boundaries below it and the one inside it (else infinity).

    A look at both finds a region ten times faster than a search does, for 2 MB. None if a bin has several boundaries.
    """
    bins = log_bins(boundaries, _TABLE_SHIFT).numpy()
    inside = np.bincount(bins, minlength=1 << 32 - _TABLE_SHIFT)  # numpy throughout: no threads
    if (inside > 1).any():
        return None
    below = (np.cumsum(inside) - inside).astype(np.int32)
    boundary = np.full(len(inside), np.inf, dtype=boundaries.numpy().dtype)
    boundary[bins] = boundaries
    return torch.from_numpy(below), torch.from_numpy(boundary)


def envelope(centroids: Floats, offsets: Floats) -> tuple[Integers, Floats]:
    """Return which centroids have a region, in ascending order, and the boundaries between their regions.

    Args:
        centroids: Shape (k,), any order.
        offsets: What each costs beyond the squared distance.
    """
    order = np.lexsort((offsets, centroids))
    kept = order[np.diff(centroids[order], prepend=np.nan) != 0]  # of equal centroids, the cheapest
    while True:
        c, cost = centroids[kept], offsets[kept]
        boundaries: Floats = (c[1:] + c[:-1]) / 2 + np.diff(cost) / (2 * np.diff(c))
        # A line whose region is empty between its neighbours is nowhere alone the cheapest, whatever else is removed.
        empty = np.flatnonzero(boundaries[1:] <= boundaries[:-1]) + 1
        if not len(empty):
            return kept, boundaries
        kept = np.delete(kept, empty)


def rate_aware(cells: Sequence[Cells], centroids: Floats, rate: float) -> tuple[Floats, Floats]:
    """Alternate cheapest assignment, means and code lengths (Chou, Lookabaugh, Gray 1989) until they stand still.

    Clusters that run empty disappear. The cost never rises, and the alternation ends when a round lowers it by less
    than a millionth.

    Args:
        cells: The values, by class of importance.
        centroids: Where they start, shape (k,).
        rate: Price of a bit in units of the cells' importance.

    Returns:
        Centroids in ascending order and their code lengths in bits.
    """
    sums = [_Sums(cell) for cell in cells]
    total = sum(float(cell.counts.sum()) for cell in cells)
    lengths, before = np.zeros(len(centroids)), np.inf
    for _ in range(_MAX_ITERATIONS):
        counts, mass, moment, square = np.zeros((4, len(centroids)))
        for cell in sums:
            kept, boundaries = envelope(centroids, rate / cell.importance * lengths)
            edges = np.searchsorted(cell.points, boundaries, side="right")
            for into, cumulative in zip((counts, mass, moment, square), cell.cumulative, strict=True):
                into[kept] += np.diff(cumulative[np.concatenate([[0], edges, [len(cell.points)]])])
        used = counts > 0
        counts, mass, moment, square = counts[used], mass[used], moment[used], square[used]
        centroids, lengths = moment / mass, -np.log2(counts / total)
        cost = float((square - moment * centroids).sum() + rate * (counts * lengths).sum())
        if cost >= before * (1 - _STILL):
            break
        before = cost
    order = np.argsort(centroids)
    return centroids[order], lengths[order]


class _Sums:
    """Cumulative count, importance, first and second moment of the points of one class."""

    def __init__(self, cell: Cells) -> None:
        self.importance, self.points = cell.importance, cell.points
        terms = (cell.counts, cell.mass, cell.mass * cell.points, cell.mass * cell.points**2)
        self.cumulative = [np.concatenate([[0.0], np.cumsum(term)]) for term in terms]
