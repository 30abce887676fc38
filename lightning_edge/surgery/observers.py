"""Observers of activations: from all values seen to the one range that eight bits are spread over."""

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

_BINS = 2**14  # over -limit..limit; at least an eighth of them between zero and the largest value seen
_LEVELS = 256
_CANDIDATES = torch.linspace(0.02, 1.0, 99)
_ROUNDS = 3


class RangeObserver(Protocol):
    """What calibration needs of an observer: a class of the user's own may stand for ours."""

    def observe(self, values: Tensor) -> None:
        """Take in the values of one batch, of any shape, finite and not empty."""

    def range(self) -> tuple[Tensor, Tensor]:
        """Return the smallest and the largest number to represent, scalars."""


class MinMaxObserver:
    """The smallest and the largest value of all batches: nothing is clipped, and one outlier decides.

    >>> observer = MinMaxObserver(); observer.observe(torch.tensor([-1.0, 2.0])); observer.range()
    (tensor(-1.), tensor(2.))
    """

    def __init__(self) -> None:
        self._range: tuple[Tensor, Tensor] | None = None

    def observe(self, values: Tensor) -> None:
        """Widen the range to these values."""
        low, high = torch.aminmax(values.detach().float())
        if self._range is not None:
            low, high = torch.minimum(low, self._range[0]), torch.maximum(high, self._range[1])
        self._range = low, high

    def range(self) -> tuple[Tensor, Tensor]:
        """Return the extremes."""
        return _seen(self._range)


class MovingAverageObserver:
    """Exponential averages of the smallest and of the largest value of each batch, beginning with the first one's.

    Args:
        averaging: Weight of a new batch, in (0, 1].

    >>> observer = MovingAverageObserver(averaging=0.5)
    >>> for batch in (torch.tensor([0.0, 1.0]), torch.tensor([0.0, 3.0])): observer.observe(batch)
    >>> observer.range()
    (tensor(0.), tensor(2.))
    """

    def __init__(self, *, averaging: float = 0.1) -> None:
        if not 0.0 < averaging <= 1.0:
            raise ValueError(f"averaging must lie in (0, 1], got {averaging}")
        self.averaging = averaging
        self._range: tuple[Tensor, Tensor] | None = None

    def observe(self, values: Tensor) -> None:
        """Move the range towards that of these values."""
        low, high = torch.aminmax(values.detach().float())
        if self._range is not None:
            low, high = (old.lerp(new, self.averaging) for old, new in zip(self._range, (low, high), strict=True))
        self._range = low, high

    def range(self) -> tuple[Tensor, Tensor]:
        """Return the averages."""
        return _seen(self._range)


class PercentileObserver:
    """The range that holds all but the outermost values: what lies beyond on one side are 100 - ``percentile`` %.

    Args:
        percentile: In (50, 100].

    >>> observer = PercentileObserver(percentile=99.0)
    >>> observer.observe(torch.linspace(0, 1, 100_001)); round(float(observer.range()[1]), 2)
    0.99
    """

    def __init__(self, *, percentile: float = 99.99) -> None:
        if not 50.0 < percentile <= 100.0:
            raise ValueError(f"percentile must lie in (50, 100], got {percentile}: 99.9 leaves out one in a thousand")
        self.percentile = percentile
        self._histogram = Histogram()

    def observe(self, values: Tensor) -> None:
        """Count the values."""
        self._histogram.add(values)

    def range(self) -> tuple[Tensor, Tensor]:
        """Return the percentiles, to the resolution of the histogram."""
        low, high = self._histogram.extremes()
        counts, edges = self._histogram.counts, self._histogram.edges()
        allowed = counts.sum() * (1.0 - self.percentile / 100.0)
        below = int(torch.searchsorted(counts.cumsum(0), allowed, right=True))
        above = int(torch.searchsorted(counts.flip(0).cumsum(0), allowed, right=True))
        return torch.maximum(low, edges[min(below, _BINS - 1)]), torch.minimum(high, edges[max(_BINS - above, 1)])


class HistogramObserver:
    """The range of the smallest squared error between the values and their 256 levels, clipping included.

    Both ends are searched in turn over 99 fractions of the extremes, on a histogram whose bins are at least eight times
    finer than the levels. (torchao's observer of this name searches greedily, and stops at the first step that does not
    help.)

    >>> observer = HistogramObserver()
    >>> observer.observe(torch.cat([torch.linspace(0, 1, 10_000_000), torch.tensor([9.0])]))
    >>> float(observer.range()[1]) < 2
    True
    """

    def __init__(self) -> None:
        self._histogram = Histogram()

    def observe(self, values: Tensor) -> None:
        """Count the values."""
        self._histogram.add(values)

    def range(self) -> tuple[Tensor, Tensor]:
        """Return the best ends found."""
        smallest, largest = self._histogram.extremes()
        edges, counts = self._histogram.edges(), self._histogram.counts
        occupied = counts > 0
        centers, counts = ((edges[1:] + edges[:-1]) / 2)[occupied], counts[occupied]
        low, high = smallest.clamp(max=0.0), largest.clamp(min=0.0)
        candidates = _CANDIDATES.to(centers.device)
        for _ in range(_ROUNDS):
            if largest > 0:
                highs = candidates * largest
                high = highs[_squared_errors(centers, counts, low.expand_as(highs), highs).argmin()]
            if smallest < 0:
                lows = candidates * smallest
                low = lows[_squared_errors(centers, counts, lows, high.expand_as(lows)).argmin()]
        return low, high


class Histogram:
    """Counts of values in equal bins between -limit and limit, a power of two that grows with the values.

    Doubling the limit merges bins in pairs, so that nothing is ever estimated, and the order of the batches does not
    matter.

    >>> histogram = Histogram(); histogram.add(torch.tensor([0.5, -3.0])); int(histogram.counts.sum()), histogram.limit
    (2, 4.0)
    """

    def __init__(self) -> None:
        self.counts = torch.zeros(_BINS, dtype=torch.float64)
        self.limit = 0.0
        self._extremes = MinMaxObserver()

    def add(self, values: Tensor) -> None:
        """Count values of any shape."""
        values = values.detach().float().flatten()
        self._extremes.observe(values)
        needed = float(torch.maximum(*(end.abs() for end in self._extremes.range())))
        if self.limit == 0.0 and needed > 0.0:
            self.limit = 2.0 ** int(torch.tensor(needed).log2().ceil())
        while self.limit < needed:
            self._double()
        # All zeros so far: they belong into the bin that starts at zero, whatever the limit.
        limit = self.limit or 1.0
        self.counts = self.counts.to(values.device)
        self.counts += torch.histc(values, _BINS, min=-limit, max=limit).double()

    def extremes(self) -> tuple[Tensor, Tensor]:
        """Return the smallest and the largest value, exactly."""
        return self._extremes.range()

    def edges(self) -> Tensor:
        """Return the ends of the bins, ascending, one more than bins."""
        limit = self.limit or 1.0
        return torch.linspace(-limit, limit, _BINS + 1, device=self.counts.device)

    def _double(self) -> None:
        merged = torch.zeros_like(self.counts)
        merged[_BINS // 4 : -_BINS // 4] = self.counts.view(-1, 2).sum(1)
        self.counts, self.limit = merged, 2 * self.limit


OBSERVERS: dict[str, Callable[[], RangeObserver]] = {
    "minmax": MinMaxObserver,
    "moving_average": MovingAverageObserver,
    "percentile": PercentileObserver,
    "histogram": HistogramObserver,
}
"""The observers by the names that ``observer=`` takes."""


def observer_factory(observer: str | Callable[[], RangeObserver]) -> Callable[[], RangeObserver]:
    """Return what makes a new observer: by its name, or the callable itself.

    Raises:
        ValueError: If there is none of that name.

    >>> type(observer_factory("minmax")()).__name__
    'MinMaxObserver'
    """
    if callable(observer):
        return observer
    if observer not in OBSERVERS:
        raise ValueError(f"observer must be one of {list(OBSERVERS)} or a callable that makes one, got {observer!r}")
    return OBSERVERS[observer]


def _seen(found: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor]:
    if found is None:
        raise ValueError("observer must have seen values before it has a range, got none: observe a batch first")
    return found


def _squared_errors(values: Tensor, counts: Tensor, lows: Tensor, highs: Tensor) -> Tensor:
    """Return the summed squared error of each candidate range, rounding and clipping as the int8 network does."""
    scale = ((highs - lows) / (_LEVELS - 1)).clamp(min=2**-12).unsqueeze(1)
    zero = torch.round(-lows.unsqueeze(1) / scale)
    rounded = (torch.round(values / scale) + zero).clamp(0, _LEVELS - 1) - zero
    return ((values - rounded * scale).double().square() * counts).sum(1)
