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
