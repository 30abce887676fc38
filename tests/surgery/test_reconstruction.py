"""Layers that read removed channels are refit to what they gave before."""

import copy

import pytest
import torch
from torch import nn

from lightning_edge import slim_channels_
from lightning_edge.surgery.coupling import coupled_groups, zero_units_
from lightning_edge.surgery.reconstruction import readers, reconstruct_


def images(rows=64, seed=0):
    return torch.randn(rows, 3, 8, 8, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def network():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Conv2d(16, 16, 3, stride=2, padding=1, padding_mode="reflect"),
        nn.ReLU(),
        nn.Conv2d(16, 8, 3, dilation=2, padding=2),
        nn.Flatten(),
        nn.Linear(128, 5),
    ).eval()


@torch.no_grad()
def distance(network, other):
    return float((network(images(seed=1)) - other(images(seed=1))).square().mean())


def halves(network):
    groups = coupled_groups(network, (images(2),)).groups
    return groups, [torch.arange(group.units) % 2 == 0 for group in groups]


def test_it_is_the_ridge_regression_towards_the_weight():
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3, bias=False))
    dense, data = copy.deepcopy(network), torch.randn(50, 4)
    groups = coupled_groups(network, (data,)).groups
    kept = [torch.tensor([True, True, False, True, False, True])]
    zero_units_(network, groups, kept)
    start = network[2].weight.detach().double()
    reconstruct_(network, dense, readers(network, groups, kept), [(data[:30],), (data[30:],)])
    x = network[:2](data).double()[:, kept[0]]
    y = dense(data).double()
    ridge = 1e-3 * x.square().sum(0).mean()
    stacked = torch.cat([x, ridge.sqrt() * torch.eye(4, dtype=torch.float64)])
    wanted = torch.cat([y, ridge.sqrt() * start[:, kept[0]].T])
    expected = torch.linalg.lstsq(stacked, wanted).solution.T
    torch.testing.assert_close(network[2].weight[:, kept[0]].double(), expected, rtol=1e-5, atol=1e-6)
    assert bool((network[2].weight[:, ~kept[0]] == 0).all())


def test_every_kind_of_layer_does_without_channels_that_are_double(network):
    with torch.no_grad():
        for layer in (network[0], network[3], network[5]):
            layer.weight[1::2], layer.bias[1::2] = layer.weight[::2], layer.bias[::2]
    dense, (groups, kept) = copy.deepcopy(network), halves(network)
    zero_units_(network, groups, kept)
    before = distance(network, dense)
    found = readers(network, groups, kept)
    assert found == ["3", "5", "7"]
    reconstruct_(network, dense, found, [(images(2048, seed=2),)])
    assert distance(network, dense) < 1e-4 * before


def test_nothing_but_the_layers_changes(network):
    dense = copy.deepcopy(network)
    network.train()
    state = torch.get_rng_state()
    reconstruct_(network, dense, ["3"], [(images(),)])
    assert network.training
    assert torch.equal(torch.get_rng_state(), state)
    changed = {name for name, value in network.state_dict().items() if not torch.equal(value, dense.state_dict()[name])}
    assert changed <= {"3.weight", "3.bias"}


def test_a_narrow_network_is_nearer_with_calibration_than_without(network):
    dense, plain = copy.deepcopy(network), copy.deepcopy(network)
    options = {"example_inputs": images(2), "sparsity": 0.5, "round_to": 1, "protect_ends": False}
    slim_channels_(plain, **options)
    slim_channels_(network, **options, calibration=[(images(2048, seed=2), torch.zeros(2048))])
    assert network[3].in_channels == plain[3].in_channels == 8
    assert distance(network, dense) < 0.9 * distance(plain, dense)


def test_without_batches_or_calls_nothing_is_refit(network):
    dense = copy.deepcopy(network)
    with pytest.raises(ValueError, match="batches must hold at least one batch"):
        reconstruct_(network, dense, ["3"], [])
    network.unused = nn.Linear(2, 2)
    network.forward = lambda x: network[0](x)
    with pytest.raises(ValueError, match=r"layers must be called by the network, got \['3'\]"):
        reconstruct_(network, copy.deepcopy(network), ["3"], [(images(),)])


def test_a_failed_calibration_leaves_the_network_as_it_was(network):
    dense = copy.deepcopy(network)
    with pytest.raises(ValueError, match="finite"):
        slim_channels_(network, example_inputs=images(2), sparsity=0.2, round_to=1, calibration=[images() / 0.0])
    assert all(map(torch.equal, network.state_dict().values(), dense.state_dict().values()))
