import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_edge.functional.budgets import erdos_renyi_kernel, global_masks, kept_floor
from lightning_edge.functional.pruning import pruned_count, smallest_masks

shapes = st.lists(
    st.lists(st.integers(1, 9), min_size=1, max_size=4).map(tuple),
    min_size=1,
    max_size=6,
)


def water_level(layers, kept):
    """Return what each layer keeps at the level where min(size, level * sum(dims)) adds up: by bisection."""
    low, high = Fraction(0), Fraction(max(math.prod(layer) for layer in layers))
    for _ in range(80):
        level = (low + high) / 2
        total = sum(min(Fraction(math.prod(layer)), level * sum(layer)) for layer in layers)
        low, high = (level, high) if total < kept else (low, level)
    return [float(min(Fraction(math.prod(layer)), high * sum(layer))) for layer in layers]


@settings(max_examples=100, deadline=None)
@given(shapes, st.integers(0, 100))
def test_budgets_are_the_rounded_water_level_of_the_densities(layers, percent):
    sizes = [math.prod(layer) for layer in layers]
    counts = erdos_renyi_kernel(layers, sparsity=percent / 100)
    exact = water_level(layers, sum(sizes) - sum(counts))
    assert sum(counts) == pruned_count(sum(sizes), percent / 100)
    assert all(0 <= count <= size for count, size in zip(counts, sizes, strict=True))
    assert all(abs(size - count - kept) < 1 + 1e-9 for count, size, kept in zip(counts, sizes, exact, strict=True))


def test_budgets_of_a_convolutional_network_are_those_of_the_paper_by_hand():
    # 54 + 144 + 20 = 218 weights, 109 kept. Shares 3+2+3+3, 4+4+3+3, 10+2. At 109 / 37 = 2.95 a share the last layer
    # would keep 35 of its 20. The others share 89 at 89 / 25 = 3.56: 39.16 and 49.84 kept, 14.84 and 94.16 gone.
    assert erdos_renyi_kernel([(3, 2, 3, 3), (4, 4, 3, 3), (10, 2)], sparsity=0.5) == [15, 94, 0]


def test_dense_layers_are_found_in_more_than_one_round():
    # 99 + 9 + 4 + 1 weights, kept 56: the last three would pass density 1, one after the other.
    assert erdos_renyi_kernel([(9, 11), (3, 3), (2, 2), (1, 1)], sparsity=0.5) == [56, 0, 0, 0]


def test_equal_layers_share_evenly_and_the_first_takes_the_rest():
    assert erdos_renyi_kernel([(4, 4), (4, 4), (4, 4)], sparsity=0.5) == [8, 8, 8]
    assert erdos_renyi_kernel([(5, 5), (5, 5), (5, 5)], sparsity=0.5) == [13, 12, 12]
    assert erdos_renyi_kernel([(2, 2), (2, 2), (2, 2)], sparsity=0.67) == [3, 3, 2]


def test_budgets_at_the_ends_of_the_range_are_nothing_and_everything():
    layers = [(3, 4), (2, 5, 3, 3)]
    assert erdos_renyi_kernel(layers, sparsity=0.0) == [0, 0]
    assert erdos_renyi_kernel(layers, sparsity=1.0) == [12, 90]
    assert erdos_renyi_kernel([], sparsity=0.5) == []


@pytest.mark.parametrize("sparsity", [-0.1, 1.1, math.nan])
def test_a_sparsity_out_of_range_is_refused(sparsity):
    with pytest.raises(ValueError, match=r"sparsity must lie in \[0, 1\]"):
        erdos_renyi_kernel([(2, 2)], sparsity=sparsity)


@pytest.mark.parametrize("shape", [(), (3, 0)])
def test_an_empty_shape_is_refused(shape):
    with pytest.raises(ValueError, match="shapes must have dimensions of at least 1, got"):
        erdos_renyi_kernel([(2, 2), shape], sparsity=0.5)


def one_by_one(scores, count, floors):
    """Take scores in rising order, ties by index, and pass over those of a layer at its floor."""
    entries = sorted((float(v), t, i) for t, score in enumerate(scores) for i, v in enumerate(score.flatten()))
    masks = [torch.ones(score.numel(), dtype=torch.bool) for score in scores]
    for _, tensor, index in entries:
        if count and masks[tensor].sum() > floors[tensor]:
            masks[tensor][index] = False
            count -= 1
    return [mask.view(score.shape) for mask, score in zip(masks, scores, strict=True)]


few = st.sampled_from([0.0, -0.0, 1.0, -1.0, 2.0, 3.0, 3e38])


@settings(max_examples=150, deadline=None)
@given(st.lists(st.lists(few, max_size=8), min_size=1, max_size=5), st.data())
def test_global_masks_take_scores_one_by_one_and_pass_over_layers_at_their_floor(rows, data):
    scores = [torch.tensor(row) for row in rows]
    floors = [data.draw(st.integers(0, len(row))) for row in rows]
    count = data.draw(st.integers(0, sum(map(len, rows)) - sum(floors)))
    masks = global_masks(scores, count=count, min_kept=floors)
    assert all(torch.equal(a, b) for a, b in zip(masks, one_by_one(scores, count, floors), strict=True))


def test_without_floors_the_selection_is_that_of_all_scores():
    generator = torch.Generator().manual_seed(0)
    scores = [torch.randn(7, 5, generator=generator), torch.randn(3, 4, 2, 2, generator=generator)]
    for a, b in zip(global_masks(scores, count=60, min_kept=[0, 0]), smallest_masks(scores, count=60), strict=True):
        assert torch.equal(a, b)


def test_a_floor_reached_in_the_second_round_holds_too():
    # Round 1 takes all of the first tensor. Its three kept weights move on, and one round later the second falls too.
    scores = [torch.arange(4.0), torch.arange(4.0, 7.0), torch.arange(7.0, 12.0)]
    masks = global_masks(scores, count=5, min_kept=[3, 2, 0])
    assert [mask.tolist() for mask in masks] == [
        [False, True, True, True],
        [False, True, True],
        [False, False, False, True, True],
    ]


def test_no_tensors_have_no_masks():
    assert global_masks([], count=0, min_kept=[]) == []


def test_floors_that_leave_too_little_say_the_largest_count():
    with pytest.raises(ValueError, match=r"count must lie in \[0, 3\], got 4: min_kept holds 2 of 5 weights"):
        global_masks([torch.zeros(3), torch.zeros(2)], count=4, min_kept=[1, 1])
    with pytest.raises(ValueError, match=r"count must lie in \[0, 3\], got -1"):
        global_masks([torch.zeros(3), torch.zeros(2)], count=-1, min_kept=[1, 1])


@pytest.mark.parametrize(
    ("floors", "message"),
    [
        ([1], "min_kept must have one number for each of the 2 tensors, got 1"),
        ([1, 3], r"min_kept must lie in \[0, 2\] for tensor 1, got 3"),
        ([-1, 0], r"min_kept must lie in \[0, 3\] for tensor 0, got -1"),
    ],
)
def test_impossible_floors_are_refused(floors, message):
    with pytest.raises(ValueError, match=message):
        global_masks([torch.zeros(3), torch.zeros(2)], count=1, min_kept=floors)


@given(st.integers(0, 10**7), st.integers(0, 9999))
def test_a_fraction_is_rounded_up_exactly(size, parts):
    assert kept_floor(size, parts / 10000) == math.ceil(size * Fraction(parts, 10000))


def test_a_count_is_capped_by_the_size():
    assert [kept_floor(10, kept) for kept in (0, 1, 10, 11)] == [0, 1, 10, 10]
    # In binary 0.07 * 100 is 7.000000000000001.
    assert [kept_floor(100, kept) for kept in (0.0, 0.07, 0.071)] == [0, 7, 8]


@pytest.mark.parametrize("bad", [-1, -0.5, 1.0, 1.5, math.nan, True, "1"])
def test_a_floor_that_is_neither_count_nor_fraction_is_refused(bad):
    with pytest.raises(ValueError, match=r"min_kept must be a number of weights or a fraction in \[0, 1\), got"):
        kept_floor(10, bad)
