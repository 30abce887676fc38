import pytest
import torch
from torch.export import Dim, export

from lightning_edge.models import DigitsNet, LeNet5, LeNet300

NETWORKS = [(DigitsNet, (1, 8, 8)), (LeNet5, (1, 28, 28)), (LeNet300, (1, 28, 28))]


@pytest.mark.parametrize(("network", "shape"), NETWORKS)
def test_an_exported_network_takes_any_batch_and_gives_the_same_logits(network, shape):
    net = network(dropout=0.5).eval()
    program = export(net, (torch.rand(2, *shape),), dynamic_shapes=({0: Dim("batch")},)).module()
    images = torch.rand(7, *shape)
    torch.testing.assert_close(program(images), net(images))


@pytest.mark.parametrize(("network", "shape"), NETWORKS)
def test_dropout_acts_in_training_alone(network, shape):
    net = network(dropout=0.5)
    images = torch.rand(4, *shape)
    net.train()
    assert not torch.equal(net(images), net(images))
    net.eval()
    assert torch.equal(net(images), net(images))


def test_the_digits_network_is_of_the_size_that_its_docstring_says():
    assert sum(p.numel() for p in DigitsNet().parameters()) == 42_898


def test_the_width_scales_every_layer_but_the_logits():
    assert sum(p.numel() for p in DigitsNet(width=0.5).parameters()) == 11_022
    assert LeNet5(width=2.0).fc1.weight.shape == (1000, 100 * 16)
    assert LeNet300(hidden=[1200, 1200]).fc2.weight.shape == (1200, 1200)
    with pytest.raises(ValueError, match="width must leave each layer a channel, got 0.01"):
        DigitsNet(width=0.01)
    with pytest.raises(ValueError, match="width must leave each layer a filter, got 0.01"):
        LeNet5(width=0.01)
    with pytest.raises(ValueError, match="hidden must be the units of two layers, got \\[3\\]"):
        LeNet300(hidden=[3])
