from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_edge.functional.pruning import pruned_count, smallest_masks


def reference(scores, count):
    """Sort everything, ties by index."""
    flat = torch.cat([score.flatten() for score in scores])
    order = sorted(range(len(flat)), key=lambda i: (float(flat[i]), i))
    kept = torch.ones(len(flat), dtype=torch.bool)
    kept[torch.tensor(order[:count], dtype=torch.long)] = False
    return [part.view(score.shape) for part, score in zip(kept.split([s.numel() for s in scores]), scores, strict=True)]


floats = st.floats(width=32, allow_nan=False, allow_infinity=False)
few = st.sampled_from([0.0, -0.0, 1.0, 1.0000001, -1.0, 2.5e-38, 3e38])


@settings(max_examples=100, deadline=None)
@given(st.lists(st.lists(st.one_of(floats, few), min_size=1, max_size=12), min_size=1, max_size=4), st.data())
def test_masks_equal_a_stable_sort(rows, data):
    scores = [torch.tensor(row) for row in rows]
    count = data.draw(st.integers(0, sum(map(len, rows))))
    masks = smallest_masks(scores, count=count)
    assert all(torch.equal(a, b) for a, b in zip(masks, reference(scores, count), strict=True))


def test_the_count_is_exact_when_all_scores_tie():
    masks = smallest_masks([torch.zeros(3, 4), torch.zeros(5)], count=14)
    assert masks[0].sum() == 0
    assert masks[1].tolist() == [False, False, True, True, True]


def test_a_million_scores_agree_with_topk():
    scores = torch.randn(1_000_000, generator=torch.Generator().manual_seed(0)).abs()
    mask = smallest_masks([scores], count=900_000)[0]
    assert int(mask.sum()) == 100_000
    assert scores[mask].min() >= scores[~mask].max()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_scores_that_are_not_finite_are_refused(bad):
    with pytest.raises(ValueError, match="scores must be finite"):
        smallest_masks([torch.tensor([1.0, bad])], count=1)


def test_a_count_out_of_range_is_refused():
    with pytest.raises(ValueError, match=r"count must lie in \[0, 2\], got 3"):
        smallest_masks([torch.zeros(2)], count=3)


@given(st.integers(1, 10**7), st.integers(0, 9999))
def test_pruned_count_is_the_largest_that_is_not_above_the_target(size, parts):
    assert pruned_count(size, parts / 10000) == size * Fraction(parts, 10000) // 1
