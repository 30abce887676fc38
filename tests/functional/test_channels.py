import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_edge.functional.channels import units_to_keep


def kept(*args, **options):
    return [mask.tolist() for mask in units_to_keep(*args, **options)]


def test_the_smallest_of_all_groups_go_after_division_by_the_groups_mean():
    scores = [torch.tensor([1.0, 3.0]), torch.tensor([100.0, 10.0, 190.0])]
    assert kept(scores, cost=sum, budget=4, steps=[1, 1]) == [[True, True], [True, False, True]]
    assert kept(scores, cost=sum, budget=3, steps=[1, 1]) == [[False, True], [True, False, True]]


def test_in_scope_layer_all_groups_shrink_alike():
    scores = [torch.arange(8.0), torch.arange(4.0) + 100]
    masks = units_to_keep(scores, cost=sum, budget=6, steps=[1, 1], scope="layer")
    assert [int(mask.sum()) for mask in masks] == [4, 2]


def test_the_first_step_brings_a_width_to_a_multiple():
    (mask,) = units_to_keep([torch.arange(11.0)], cost=sum, budget=10, steps=[4])
    assert mask.tolist() == [False] * 3 + [True] * 8


def test_ties_go_by_index():
    assert kept([torch.ones(3)], cost=sum, budget=2, steps=[1]) == [[False, True, True]]


def test_what_has_gone_stays_gone_although_the_budget_would_take_it_back():
    scores = [torch.tensor([0.0, 0.0, 5.0, 6.0]), torch.tensor([1.0, 2.0, 3.0])]
    masks = units_to_keep(scores, cost=sum, budget=6, steps=[1, 1], gone=[2, 0])
    assert [int(mask.sum()) for mask in masks] == [2, 3]
    assert masks[0].tolist() == [False, False, True, True]


def test_scores_of_zero_are_no_division_by_zero():
    assert kept([torch.zeros(2), torch.ones(2)], cost=sum, budget=3, steps=[1, 1]) == [[False, True], [True, True]]


def test_the_last_step_stays():
    with pytest.raises(ValueError, match="the narrowest widths cost 2, more than 1"):
        units_to_keep([torch.ones(4), torch.ones(2)], cost=sum, budget=1, steps=[1, 1])
    assert kept([torch.ones(3)], cost=sum, budget=3, steps=[8]) == [[True] * 3]


@settings(max_examples=50, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 20), min_size=1, max_size=4),
    step=st.integers(1, 4),
    share=st.floats(0.5, 1.0),
    seed=st.integers(0, 99),
    scope=st.sampled_from(["global", "layer"]),
)
def test_budgets_hold_and_smaller_ones_take_the_same_units_and_more(sizes, step, share, seed, scope):
    generator = torch.Generator().manual_seed(seed)
    scores = [torch.rand(size, generator=generator) for size in sizes]
    options = {"cost": sum, "steps": [step] * len(sizes), "scope": scope}
    narrowest = sum(min(size, step) for size in sizes)
    wide = units_to_keep(scores, budget=max(narrowest, share * sum(sizes)), **options)
    narrow = units_to_keep(scores, budget=narrowest, **options)
    assert sum(int(mask.sum()) for mask in wide) <= max(narrowest, share * sum(sizes))
    for score, a, b in zip(scores, wide, narrow, strict=True):
        assert not bool((b & ~a).any())
        assert int(a.sum()) % step == 0 or bool(a.all())
        assert float(score[a].min()) >= float(score[~a].max() if bool((~a).any()) else 0.0)
