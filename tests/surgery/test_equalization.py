import copy

import pytest
import torch
from mobile_network import digits, distance, errors, logits, trained, uneven
from torch import nn

from lightning_edge import quantize
from lightning_edge.surgery.equalization import equalize_

EXAMPLE = (torch.zeros(2, 1, 8, 8),)


def test_the_network_computes_the_same_and_channels_become_even():
    network = uneven()
    expected = logits(network)
    report = equalize_(network, EXAMPLE)
    torch.testing.assert_close(logits(network), expected, rtol=1e-3, atol=1e-3)
    assert report.pairs == (("0", "3"), ("3", "6"), ("6", "9"), ("9", "12"), ("12", "17"))
    assert min(report.before.values()) > 1.2
    assert max(report.after.values()) < 2.5


def test_int8_of_a_depthwise_network_is_saved_by_it():
    network = uneven()
    alone = quantize(network, digits())
    equalize_(network, EXAMPLE)
    equalized = quantize(network, digits())
    assert distance(alone, network) > 0.1
    assert distance(equalized, network) < 0.01
    assert errors(alone) > errors(network) + 50
    assert abs(errors(equalized) - errors(network)) <= 10


def test_both_sides_of_a_pair_end_with_the_same_ranges():
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 3))
    rows, columns = network[0].weight.abs().amax(1), network[2].weight.abs().amax(0)
    equalize_(network, (torch.zeros(2, 5),))
    expected = (rows * columns).sqrt()  # equation 12 of the paper
    torch.testing.assert_close(network[0].weight.abs().amax(1), expected)
    torch.testing.assert_close(network[2].weight.abs().amax(0), expected)


def test_channels_that_are_flattened_keep_their_positions_together():
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(36, 3)).eval()
    with torch.no_grad():
        network[0].weight[1] *= 100
        network[0].bias += 1
    expected = logits(network)
    report = equalize_(network, EXAMPLE)
    torch.testing.assert_close(logits(network), expected, rtol=1e-4, atol=1e-4)
    assert report.after["0"] < report.before["0"] / 5


def test_a_pruned_channel_stays_zero_and_finite():
    network = trained()
    with torch.no_grad():
        network[3].weight[2] = 0
        network[6].weight[:, 4] = 0
    zeros = {name: value == 0 for name, value in network.named_parameters()}
    equalize_(network, EXAMPLE)
    for name, value in network.named_parameters():
        assert torch.equal(value == 0, zeros[name])
        assert torch.isfinite(value).all()


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second, self.third = (nn.Linear(4, 4) for _ in range(3))

    def forward(self, x):
        y = self.first(x)
        return self.third(torch.relu(self.second(y)) + y)


@pytest.mark.parametrize(
    "network",
    [
        Residual(),
        nn.Sequential(nn.Linear(4, 4), nn.ReLU6(), nn.Linear(4, 4)),
        nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4, affine=False), nn.Linear(4, 4)),
        nn.Sequential(nn.Linear(4, 4)),
    ],
    ids=["a second reader", "ReLU6", "a norm without weight", "one layer"],
)
def test_what_stands_in_the_way_is_left_alone(network):
    before = copy.deepcopy(network.state_dict())
    with pytest.raises(ValueError, match="module must have two layers in a row"):
        equalize_(network, (torch.zeros(2, 4),))
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())


def test_a_layer_that_is_called_twice_is_left_alone():
    shared = nn.Linear(4, 4)
    with pytest.raises(ValueError, match="module must have two layers in a row"):
        equalize_(nn.Sequential(shared, nn.ReLU(), shared), (torch.zeros(2, 4),))
