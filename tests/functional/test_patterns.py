import itertools
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_edge.functional.patterns import (
    Blocks,
    NofM,
    Unstructured,
    find_pattern,
    n_of_m_candidates,
    pattern_masks,
    prunable,
)
from lightning_edge.functional.pruning import smallest_masks

shapes = st.tuples(st.integers(1, 4), st.integers(1, 7)).flatmap(
    lambda shape: st.sampled_from([shape, (*shape, 2), (*shape, 2, 1)])
)
few = st.integers(-3, 3).map(float)
n_of_m = st.integers(2, 6).flatmap(lambda group: st.builds(NofM, st.integers(1, group - 1), st.just(group)))
blocks = st.builds(Blocks, st.integers(1, 5), st.integers(1, 5))


@st.composite
def tensors(draw):
    shape = draw(shapes)
    size = torch.Size(shape).numel()
    return torch.tensor(draw(st.lists(few, min_size=size, max_size=size))).view(shape)


def positions(score):
    return itertools.product(*(range(size) for size in score.shape))


def candidates_one_by_one(score, pattern):
    """Sort each group, ties by index: all but the last ``kept`` may go."""
    groups = {}
    for position in positions(score):
        groups.setdefault((position[0], position[1] // pattern.group, position[2:]), []).append(position)
    result = torch.zeros(score.shape, dtype=torch.bool)
    for members in groups.values():
        members.sort(key=lambda position: (float(score[position]), position))
        for position in members[: max(0, len(members) - pattern.kept)]:
            result[position] = True
    return result


def n_of_m_one_by_one(scores, count, pattern):
    """Sort the candidates of all tensors, ties by index."""
    masks = [torch.ones(score.shape, dtype=torch.bool) for score in scores]
    entries = [
        (float(score[position]), index, position)
        for index, score in enumerate(scores)
        for position in positions(score)
        if candidates_one_by_one(score, pattern)[position]
    ]
    for _, index, position in sorted(entries)[:count]:
        masks[index][position] = False
    return masks


def blocks_one_by_one(scores, count, pattern):
    """Sort the blocks of all tensors by exact mean, ties by index, and take them until one does not fit."""
    masks = [torch.ones(score.shape, dtype=torch.bool) for score in scores]
    members = {}
    for index, score in enumerate(scores):
        for position in positions(score):
            block = (index, position[0] // pattern.rows, position[1] // pattern.columns, position[2:])
            members.setdefault(block, []).append(position)
    means = {
        block: sum(Fraction(float(scores[block[0]][position])) for position in inside) / len(inside)
        for block, inside in members.items()
    }
    for block in sorted(members, key=lambda block: (means[block], block)):
        count -= len(members[block])
        if count < 0:
            break
        for position in members[block]:
            masks[block[0]][position] = False
    return masks


def equal(a, b):
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@settings(max_examples=100, deadline=None)
@given(tensors(), n_of_m)
def test_candidates_are_all_but_the_largest_of_each_group(score, pattern):
    candidates = n_of_m_candidates(score, pattern)
    assert torch.equal(candidates, candidates_one_by_one(score, pattern))
    assert int(candidates.sum()) == prunable(tuple(score.shape), pattern)


@settings(max_examples=100, deadline=None)
@given(st.lists(tensors(), min_size=1, max_size=3), n_of_m, st.data())
def test_n_of_m_masks_take_the_smallest_candidates_of_all_tensors(scores, pattern, data):
    largest = sum(prunable(tuple(score.shape), pattern) for score in scores)
    count = data.draw(st.integers(0, largest))
    masks = pattern_masks(scores, count=count, pattern=pattern)
    assert equal(masks, n_of_m_one_by_one(scores, count, pattern))


@settings(max_examples=100, deadline=None)
@given(st.lists(tensors(), min_size=1, max_size=3), blocks, st.data())
def test_blocks_of_smallest_mean_go_until_one_does_not_fit(scores, pattern, data):
    count = data.draw(st.integers(0, sum(score.numel() for score in scores)))
    masks = pattern_masks(scores, count=count, pattern=pattern)
    assert equal(masks, blocks_one_by_one(scores, count, pattern))


@settings(max_examples=50, deadline=None)
@given(st.lists(tensors(), min_size=1, max_size=3), st.one_of(n_of_m, blocks, st.just(Unstructured())), st.data())
def test_masks_grow_from_one_count_to_the_next(scores, pattern, data):
    largest = sum(prunable(tuple(score.shape), pattern) for score in scores)
    low, high = sorted((data.draw(st.integers(0, largest)), data.draw(st.integers(0, largest))))
    fewer = pattern_masks(scores, count=low, pattern=pattern)
    more = pattern_masks(scores, count=high, pattern=pattern)
    assert all(not (b & ~a).any() for a, b in zip(fewer, more, strict=True))


def test_the_largest_count_leaves_two_of_every_four():
    score = torch.randn(8, 12, 3, 3, generator=torch.Generator().manual_seed(0))
    (mask,) = pattern_masks([score], count=prunable(tuple(score.shape), NofM(2, 4)), pattern=NofM(2, 4))
    assert (mask.view(8, 3, 4, 3, 3).sum(dim=2) == 2).all()
    assert mask.is_contiguous()


def test_a_short_last_group_keeps_what_it_can():
    score = torch.tensor([[5.0, 1.0, 2.0, 3.0, 9.0, 7.0, 8.0]])
    assert n_of_m_candidates(score, NofM(2, 4)).tolist() == [[False, True, True, False, False, True, False]]
    assert n_of_m_candidates(score[:, :6], NofM(2, 4)).tolist() == [[False, True, True, False, False, False]]
    assert [prunable((1, inputs), NofM(2, 4)) for inputs in range(1, 9)] == [0, 0, 1, 2, 2, 2, 3, 4]


def test_the_earlier_of_equal_scores_goes():
    assert n_of_m_candidates(torch.zeros(1, 4), NofM(1, 4)).tolist() == [[True, True, True, False]]
    masks = pattern_masks([torch.zeros(2, 4)], count=3, pattern=Blocks(1, 2))
    assert masks[0].tolist() == [[False, False, True, True], [True, True, True, True]]


def test_a_long_group_is_split_exactly():
    score = torch.randperm(600, generator=torch.Generator().manual_seed(0)).float().view(2, 300)
    assert torch.equal(n_of_m_candidates(score, NofM(7, 300)), candidates_one_by_one(score, NofM(7, 300)))


def test_negative_scores_order_as_numbers():
    score = torch.tensor([[-1.0, -4.0, -2.0, -3.5]])
    assert n_of_m_candidates(score, NofM(2, 4)).tolist() == [[False, True, False, True]]
    masks = pattern_masks([score], count=2, pattern=Blocks(1, 2))
    assert masks[0].tolist() == [[True, True, False, False]]


def test_means_not_sums_order_blocks_of_different_size():
    # The short block has the smaller sum and the larger mean.
    masks = pattern_masks([torch.tensor([[2.0, 2.0, 3.0]])], count=2, pattern=Blocks(1, 2))
    assert masks[0].tolist() == [[False, False, True]]


def test_a_block_that_does_not_fit_ends_the_selection():
    # The block of one weight would fit, but it comes after the block of two.
    assert pattern_masks([torch.tensor([[1.0, 1.0, 9.0]])], count=1, pattern=Blocks(1, 2))[0].all()
    masks = pattern_masks([torch.tensor([[1.0, 1.0, 9.0], [2.0, 2.0, 0.0]])], count=4, pattern=Blocks(1, 2))
    assert masks[0].tolist() == [[False, False, True], [True, True, False]]


def test_unstructured_masks_are_those_of_the_smallest_scores():
    scores = [torch.tensor([3.0, 1.0]), torch.tensor([[2.0]])]
    assert equal(pattern_masks(scores, count=2, pattern=Unstructured()), smallest_masks(scores, count=2))


@pytest.mark.parametrize("pattern", [Unstructured(), NofM(2, 4), Blocks(1, 4)])
def test_nothing_and_empty_tensors_give_empty_masks(pattern):
    assert pattern_masks([], count=0, pattern=pattern) == []
    masks = pattern_masks([torch.empty(0, 4), torch.empty(3, 0, 2), torch.ones(1, 4)], count=0, pattern=pattern)
    assert [tuple(mask.shape) for mask in masks] == [(0, 4), (3, 0, 2), (1, 4)]
    assert masks[2].all()


@pytest.mark.parametrize("pattern", [NofM(1, 2), Blocks(2, 2)])
def test_half_precision_and_strided_scores_are_compared_as_float32(pattern):
    score = torch.randn(6, 8, generator=torch.Generator().manual_seed(0)).bfloat16()
    expected = pattern_masks([score.float().contiguous()], count=20, pattern=pattern)
    assert equal(pattern_masks([score], count=20, pattern=pattern), expected)
    assert equal(pattern_masks([score.t().contiguous().t()], count=20, pattern=pattern), expected)


@pytest.mark.parametrize(
    ("text", "pattern"),
    [
        ("unstructured", Unstructured()),
        ("2:4", NofM(kept=2, group=4)),
        ("1:16", NofM(kept=1, group=16)),
        ("1x4", Blocks(rows=1, columns=4)),
        ("32x8", Blocks(rows=32, columns=8)),
    ],
)
def test_texts_name_patterns(text, pattern):
    assert find_pattern(text) == pattern


@pytest.mark.parametrize("text", ["", "2/4", "2:4:8", "4", "-1x4", "2 : 4", "Unstructured", 124, None])
def test_an_unknown_text_names_the_forms(text):
    with pytest.raises(ValueError, match="pattern must be 'unstructured', N:M such as '2:4' or blocks such as '1x4'"):
        find_pattern(text)


@pytest.mark.parametrize("text", ["0:4", "4:4", "5:4"])
def test_n_of_m_that_keeps_nothing_or_everything_is_refused(text):
    with pytest.raises(ValueError, match=f"must keep at least 1 and fewer than M of M weights, got {text}"):
        find_pattern(text)


@pytest.mark.parametrize("text", ["0x4", "4x0"])
def test_empty_blocks_are_refused(text):
    with pytest.raises(ValueError, match=f"rows and columns of at least 1, got {text}"):
        find_pattern(text)


@pytest.mark.parametrize(
    ("pattern", "largest"), [(Unstructured(), 8), (NofM(kept=1, group=4), 6), (Blocks(rows=1, columns=4), 8)]
)
def test_a_count_out_of_range_says_the_largest(pattern, largest):
    for count in (-1, largest + 1):
        with pytest.raises(ValueError, match=rf"count must lie in \[0, {largest}\], what .* lets go, got {count}"):
            pattern_masks([torch.zeros(2, 4)], count=count, pattern=pattern)


@pytest.mark.parametrize("pattern", [NofM(2, 4), Blocks(1, 4)])
def test_a_vector_has_no_input_dimension(pattern):
    message = r"scores must have dimensions \(outputs, inputs, \*kernel\) for .*got shape \(4,\)"
    with pytest.raises(ValueError, match=message):
        pattern_masks([torch.zeros(4)], count=0, pattern=pattern)
    with pytest.raises(ValueError, match=message):
        n_of_m_candidates(torch.zeros(4), NofM(2, 4))
    with pytest.raises(ValueError, match=message):
        prunable((4,), NofM(2, 4))


@pytest.mark.parametrize("pattern", [Unstructured(), NofM(2, 4), Blocks(1, 4)])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_scores_that_are_not_finite_are_refused(pattern, bad):
    with pytest.raises(ValueError, match="scores must be finite"):
        pattern_masks([torch.tensor([[1.0, bad, 2.0, 3.0]])], count=1, pattern=pattern)
