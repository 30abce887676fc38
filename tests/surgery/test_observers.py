import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_edge.surgery.observers import (
    OBSERVERS,
    Histogram,
    HistogramObserver,
    MinMaxObserver,
    MovingAverageObserver,
    PercentileObserver,
    observer_factory,
)


def values(seed=0, count=5000):
    return torch.randn(count, generator=torch.Generator().manual_seed(seed))


def squared_error(data, low, high):
    scale = max((high - low) / 255, 2**-12)
    zero = round(-low / scale)
    codes = (torch.round(data / scale) + zero).clamp(0, 255)
    return float(((codes - zero) * scale - data).double().square().sum())


def test_minmax_is_the_range_of_all_batches():
    observer = MinMaxObserver()
    for batch in (torch.tensor([1.0, 2.0]), torch.tensor([-3.0, 0.0])):
        observer.observe(batch)
    assert [float(end) for end in observer.range()] == [-3.0, 2.0]


def test_percentiles_leave_out_the_outermost_values():
    observer = PercentileObserver(percentile=90.0)
    data = torch.linspace(-1, 1, 10_001)
    observer.observe(data)
    low, high = observer.range()
    assert float(low) == pytest.approx(-0.8, abs=1e-3)
    assert float(high) == pytest.approx(0.8, abs=1e-3)


@given(st.integers(0, 50))
@settings(max_examples=10, deadline=None)
def test_the_histogram_s_range_is_as_good_as_any_of_a_grid(seed):
    data = values(seed) ** 3  # a long tail
    observer = HistogramObserver()
    observer.observe(data)
    low, high = (float(end) for end in observer.range())
    ends = [fraction / 10 for fraction in range(1, 11)]
    best = min(squared_error(data, a * float(data.min()), b * float(data.max())) for a in ends for b in ends)
    assert squared_error(data, low, high) <= 1.02 * best


def test_the_order_of_the_batches_does_not_matter():
    batches = [values(seed, 100) * scale for seed, scale in enumerate((0.01, 3.0, 0.5))]
    histograms = []
    for order in (batches, batches[::-1]):
        histogram = Histogram()
        for batch in order:
            histogram.add(batch)
        histograms.append(histogram)
    assert histograms[0].limit == histograms[1].limit
    # A value on the edge of two fine bins may have been rounded into either.
    assert float((histograms[0].counts - histograms[1].counts).abs().sum()) <= 4


@pytest.mark.parametrize("name", OBSERVERS)
def test_constants_and_zeros_have_a_range(name):
    for data in (torch.zeros(10), torch.ones(10), -torch.ones(10)):
        observer = OBSERVERS[name]()
        observer.observe(data)
        low, high = observer.range()
        assert float(low) <= float(high)
        assert torch.isfinite(torch.stack([low, high])).all()


@pytest.mark.parametrize("name", OBSERVERS)
def test_an_observer_that_has_seen_nothing_says_so(name):
    with pytest.raises(ValueError, match="observer must have seen values"):
        OBSERVERS[name]().range()


def test_bad_arguments_are_refused():
    with pytest.raises(ValueError, match="observer must be one of .* got 'best'"):
        observer_factory("best")
    with pytest.raises(ValueError, match="percentile must lie in"):
        PercentileObserver(percentile=50.0)
    with pytest.raises(ValueError, match="averaging must lie in"):
        MovingAverageObserver(averaging=0.0)
    assert observer_factory(MinMaxObserver) is MinMaxObserver
