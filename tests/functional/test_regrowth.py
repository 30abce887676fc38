import math

import pytest
import torch

from lightning_edge.functional.regrowth import RigL, exchanged_mask


def test_the_fraction_falls_with_a_half_cosine_and_only_at_its_steps():
    rigl = RigL(every_n_steps=10, end_step=100, drop_fraction=0.4)
    for step in (10, 30, 90):
        assert rigl.fraction_at(step) == pytest.approx(0.2 * (1 + math.cos(math.pi * step / 100)))
    assert [rigl.fraction_at(step) for step in (0, 5, 100, 110)] == [0.0] * 4


def test_the_smallest_connections_go_and_those_of_largest_gradient_come():
    weight = torch.tensor([[5.0, -1.0, 2.0, 0.0, 0.0, 0.0]])
    gradient = torch.tensor([[0.0, 0.0, 9.0, 1.0, -7.0, 3.0]])
    mask = torch.tensor([[True, True, True, False, False, False]])
    found = exchanged_mask(weight, gradient, mask, fraction=0.34)
    assert found.tolist() == [[True, False, True, False, True, False]]


def test_what_is_dropped_may_come_back():
    weight, gradient = torch.tensor([5.0, 1.0, 0.0]), torch.tensor([0.0, 9.0, 1.0])
    mask = torch.tensor([True, True, False])
    assert torch.equal(exchanged_mask(weight, gradient, mask, fraction=0.5), mask)


@pytest.mark.parametrize("fraction", [0.0, 0.3, 1.0])
def test_the_number_of_connections_stays(fraction):
    generator = torch.Generator().manual_seed(0)
    weight, gradient = torch.randn(50, generator=generator), torch.randn(50, generator=generator)
    mask = torch.rand(50, generator=generator) < 0.3
    found = exchanged_mask(weight, gradient, mask, fraction=fraction)
    assert int(found.sum()) == int(mask.sum())
    assert int((found & ~mask).sum()) <= int(int(mask.sum()) * fraction)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"every_n_steps": 0, "end_step": 5}, "every_n_steps must be a whole number of at least 1, got 0"),
        ({"every_n_steps": 5, "end_step": 1.5}, "end_step must be a whole number"),
        ({"every_n_steps": 5, "end_step": 5, "drop_fraction": 1.0}, r"drop_fraction must lie in \(0, 1\), got 1.0"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        RigL(**arguments)
