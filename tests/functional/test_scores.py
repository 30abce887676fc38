from types import SimpleNamespace

import pytest
import torch
from torch import nn

from lightning_edge.functional.scores import lamp, magnitude, movement, random, taylor


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_scores_have_the_values_computed_by_hand_in_float32(dtype):
    weight = nn.Parameter(torch.tensor([[2.0, -2.0, 0.5], [0.0, 3.0, -1.0]], dtype=dtype))
    gradient = torch.tensor([[1.5, 1.5, -4.0], [7.0, 0.0, -2.0]], dtype=dtype)
    expected = {
        magnitude(weight): [[2.0, 2.0, 0.5], [0.0, 3.0, 1.0]],
        lamp(weight): torch.tensor([[4 / 17, 4 / 13, 0.25 / 18.25], [0.0, 1.0, 1 / 18]]).tolist(),
        taylor(weight, gradient): [[3.0, 3.0, 2.0], [0.0, 0.0, 2.0]],
        movement(weight, gradient): [[-3.0, 3.0, 2.0], [0.0, 0.0, -2.0]],
    }
    for score, values in expected.items():
        assert score.tolist() == values
        assert (score.dtype, score.requires_grad) == (torch.float32, False)
    assert weight.tolist() == [[2.0, -2.0, 0.5], [0.0, 3.0, -1.0]]
    assert gradient.tolist() == [[1.5, 1.5, -4.0], [7.0, 0.0, -2.0]]


def test_a_product_too_small_for_float16_is_kept():
    tiny = torch.tensor([2.0**-14], dtype=torch.float16)
    assert taylor(tiny, tiny).item() == 2.0**-28
    assert movement(tiny, -tiny).item() == 2.0**-28


def test_taylor_is_the_change_of_a_linear_loss_when_the_weight_is_removed():
    weight = torch.randn(4, 5, generator=torch.Generator().manual_seed(1), requires_grad=True)
    factors = torch.randn(4, 5, generator=torch.Generator().manual_seed(2))
    (weight * factors).sum().backward()
    changes = torch.empty(4, 5)
    for index in range(20):
        without = weight.detach().clone()
        without.view(-1)[index] = 0.0
        changes.view(-1)[index] = ((without - weight.detach()) * factors).sum().abs()
    assert torch.allclose(taylor(weight, weight.grad), changes, atol=1e-6)


def test_movement_is_positive_where_descent_moves_away_from_zero():
    weight = torch.tensor([1.0, 1.0, -1.0, -1.0], requires_grad=True)
    (weight * torch.tensor([-0.1, 0.1, 0.1, -0.1])).sum().backward()
    moved = (weight - 0.5 * weight.grad).abs() - weight.abs()
    assert movement(weight, weight.grad).sign().tolist() == moved.sign().tolist() == [1.0, -1.0, 1.0, -1.0]


def test_lamp_is_the_part_of_what_would_be_left_that_a_weight_carries():
    weight = torch.randn(3, 4, generator=torch.Generator().manual_seed(3))
    weight[0, 0] = weight[2, 1] = 0.0
    squares = weight.double().square()
    expected = squares / torch.stack([squares[squares >= square].sum() for square in squares.flatten()]).view(3, 4)
    torch.testing.assert_close(lamp(weight), expected.float())
    torch.testing.assert_close(lamp(1e-3 * weight), expected.float())  # a layer's scale says nothing
    assert lamp(torch.zeros(2, 2)).tolist() == [[0.0, 0.0], [0.0, 0.0]]


@pytest.mark.parametrize("score", [taylor, movement])
def test_a_gradient_of_another_shape_is_refused(score):
    with pytest.raises(ValueError, match=r"gradient must have the weight's shape \(2, 3\), got \(3,\)"):
        score(torch.zeros(2, 3), torch.zeros(3))


@pytest.mark.parametrize("score", [magnitude, lamp, lambda w: taylor(w, w), lambda w: movement(w, w)])
def test_an_empty_weight_has_empty_scores(score):
    assert score(torch.empty(0, 3)).shape == (0, 3)


def test_random_scores_depend_on_the_seed_alone():
    drawn = [random(w, torch.Generator().manual_seed(7)) for w in (torch.zeros(64, 5), torch.ones(64, 5).bfloat16())]
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], random(torch.zeros(64, 5), torch.Generator().manual_seed(8)))
    assert drawn[0].dtype == drawn[1].dtype == torch.float32
    assert 0.0 <= float(drawn[0].min()) < 0.1 < 0.9 < float(drawn[0].max()) < 1.0


def test_random_scores_are_drawn_on_the_cpu_and_moved_to_the_weight():
    generator = torch.Generator().manual_seed(0)
    with torch.device("meta"):
        score = random(torch.zeros(3, 2), generator)
    assert (score.device.type, score.shape) == ("meta", (3, 2))
    torch.rand(3, 2, generator=(reference := torch.Generator().manual_seed(0)))
    assert torch.equal(generator.get_state(), reference.get_state())


def test_a_generator_of_another_device_is_refused():
    generator = SimpleNamespace(device=torch.device("cuda", 0))
    with pytest.raises(ValueError, match="generator must be of the CPU, got one of cuda:0"):
        random(torch.zeros(2), generator)
