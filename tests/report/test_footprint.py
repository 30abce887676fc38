import types

import pytest
import torch
from torch import nn

from lightning_edge.models import DigitsNet, LeNet5
from lightning_edge.report import footprint, of_integers


def test_lenet5_has_the_counts_of_pencil_and_paper():
    found = footprint(LeNet5(), [torch.zeros(3, 1, 28, 28)])
    assert {layer.name: layer.macs for layer in found.layers} == {
        "conv1": 24 * 24 * 20 * 25,
        "conv2": 8 * 8 * 50 * 20 * 25,
        "fc1": 800 * 500,
        "fc2": 500 * 10,
    }
    assert found.macs == found.effective_macs == 2_293_000
    assert (found.parameters, found.weights, found.nonzero, found.sparsity) == (431_080, 430_500, 430_500, 0.0)
    assert found.weight_bytes == 1_724_320


def test_zeros_and_shared_values_are_counted_layer_by_layer():
    network = nn.Sequential(nn.Linear(4, 2), nn.ReLU(), nn.Linear(2, 3))
    with torch.no_grad():
        network[0].weight.copy_(torch.tensor([[0.0, 0.5, 0.5, 0.0], [0.0, -1.0, 0.5, -0.0]]))
    first, last = footprint(network, [torch.zeros(1, 4)]).layers
    assert (first.weights, first.nonzero, first.distinct, first.kept) == (8, 4, 3, 0.5)
    assert (first.macs, first.effective_macs, first.parameters, first.weight_bytes) == (8, 4, 10, 40)
    assert (last.kept, last.effective_macs) == (1.0, 6)
    whole = footprint(network, [torch.zeros(1, 4)])
    assert (whole.macs, whole.effective_macs, whole.sparsity) == (14, 10, pytest.approx(4 / 14))


def test_norms_have_parameters_but_no_weights():
    layers = {layer.name: layer for layer in footprint(DigitsNet(), [torch.zeros(1, 1, 8, 8)]).layers}
    norm = layers["bn1"]
    assert (norm.kind, norm.parameters, norm.weights, norm.distinct, norm.macs) == ("BatchNorm2d", 48, 0, 0, 0)


def test_a_layer_that_runs_twice_counts_twice():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(3, 3, bias=False)

        def forward(self, x):
            return self.layer(self.layer(x))

    found = footprint(Twice(), [torch.zeros(1, 3)])
    assert (found.parameters, found.layers[0].macs, found.macs) == (9, 18, 18)


def test_products_without_weights_count_in_full():
    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 4, bias=False)
            nn.init.zeros_(self.layer.weight)

        def forward(self, x):
            return self.layer(x) @ x.transpose(1, 2)

    found = footprint(Attention(), [torch.zeros(2, 5, 4)])
    assert (found.macs, found.effective_macs) == (5 * 4 * 4 + 5 * 5 * 4, 5 * 5 * 4)


def test_the_network_is_left_as_it_was():
    network = DigitsNet()
    network.bn2.eval()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    footprint(network, [torch.rand(2, 1, 8, 8)])
    assert {name: module.training for name, module in network.named_children()} == {
        name: name != "bn2" for name, _ in network.named_children()
    }
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())


def test_a_forward_that_was_put_into_the_instance_is_not_the_one_counted():
    network = LeNet5()
    network.forward = types.MethodType(lambda self, x: x.flatten(1) @ torch.zeros(784, 10), network)
    assert footprint(network, [torch.zeros(1, 1, 28, 28)]).macs == 2_293_000


def test_integers_are_counted_as_the_file_has_them():
    network = nn.Sequential(nn.Linear(4, 3, bias=False))
    with torch.no_grad():
        network[0].weight.copy_(torch.tensor([[1.0, 0.001, 0.0, -1.0]] * 3))
    counts = footprint(network, [torch.zeros(1, 4)])
    converted = nn.Module()
    integers = torch.tensor([[127, 0, 0, -127]] * 3, dtype=torch.int8)
    converted.register_module("0", nn.Module())
    converted.get_submodule("0").register_buffer("weight_int8", integers)
    found = of_integers(counts, converted)
    assert (counts.nonzero, found.nonzero) == (9, 6)
    assert (found.layers[0].distinct, found.layers[0].effective_macs, found.effective_macs) == (3, 6, 6)
