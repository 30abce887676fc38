import copy

import numpy as np
import pytest
import torch
from torch import nn

from lightning_edge import export, fold_batch_norms_, load_artifact, share_weights_
from lightning_edge.artifact import read_tensors
from lightning_edge.models.resnet import ResNet8

IMAGES = torch.randn(16, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def network():
    """A convolution without bias, one with, and a linear layer; norms that have seen data, of both signs and zero."""
    torch.manual_seed(0)
    net = nn.Sequential(
        *(nn.Conv2d(3, 6, 3, bias=False), nn.BatchNorm2d(6), nn.ReLU()),
        *(nn.Conv2d(6, 5, 3), nn.BatchNorm2d(5, eps=1e-3), nn.Flatten()),
        *(nn.Linear(80, 7), nn.BatchNorm1d(7), nn.Linear(7, 4)),
    )
    with torch.no_grad():
        for index in (1, 4, 7):
            net[index].weight.uniform_(-2.0, 2.0)
            net[index].bias.uniform_(-1.0, 1.0)
        net[1].weight[2] = 0.0
        for _ in range(10):
            net(IMAGES)
    return net.eval()


def test_the_network_computes_what_it_did_and_its_state_keeps_keys_and_shapes():
    net = network()
    before = copy.deepcopy(net)
    report = fold_batch_norms_(net, example_inputs=(IMAGES,))
    assert report.folded == (("0", "1"), ("3", "4"), ("6", "7"))
    assert report.left == ()
    torch.testing.assert_close(net(IMAGES), before(IMAGES), rtol=1e-4, atol=1e-5)
    shapes = {name: value.shape for name, value in before.state_dict().items()}
    assert {name: value.shape for name, value in net.state_dict().items()} == shapes
    for norm in (net[1], net[4], net[7]):
        assert torch.equal(norm.weight / torch.sqrt(norm.running_var + norm.eps), torch.ones_like(norm.weight))


def test_the_weights_are_those_of_the_folded_network():
    net = network()
    expected = torch.nn.utils.fuse_conv_bn_eval(copy.deepcopy(net[3]), net[4])
    fold_batch_norms_(net, example_inputs=(IMAGES,))
    torch.testing.assert_close(net[3].weight, expected.weight)


def test_shared_values_survive_the_file_without_a_scale_for_each_channel(tmp_path):
    torch.manual_seed(0)
    net, images = ResNet8().eval(), torch.randn(4, 3, 32, 32)
    fold_batch_norms_(net, example_inputs=(images,))
    share_weights_(net, clusters=9)
    path = export(net, tmp_path / "net.edge", example_inputs=(images,), round_small=False)
    np.testing.assert_allclose(load_artifact(path)(images.numpy()), net(images).detach(), rtol=1e-3, atol=1e-4)
    tensors = read_tensors(path)
    assert all(len(np.unique(value)) <= 9 for name, value in tensors.items() if name.endswith("weight"))
    scales = [value for name, value in tensors.items() if name.endswith("scale")]
    assert all((value == 1).all() for value in scales)


def test_norms_without_a_layer_of_their_own_are_left():
    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.twice = nn.BatchNorm2d(3), nn.Conv2d(3, 3, 3, padding=1)
            self.second, self.third = nn.BatchNorm2d(3), nn.BatchNorm2d(3)
            self.last, self.plain = nn.Conv2d(3, 2, 1), nn.BatchNorm2d(2, affine=False)
            self.own, self.fourth = nn.Conv2d(2, 2, 1), nn.BatchNorm2d(2)

        def forward(self, images):
            hidden = self.second(self.twice(self.first(images))) + self.third(self.twice(images))
            return self.fourth(self.own(self.plain(self.last(hidden))))

    torch.manual_seed(0)
    net = Shared().eval()
    expected = net(IMAGES)
    report = fold_batch_norms_(net, example_inputs=(IMAGES,))
    assert report.folded == (("own", "fourth"),)
    assert set(report.left) == {"first", "second", "third", "plain"}
    torch.testing.assert_close(net(IMAGES), expected)


def test_a_network_without_such_a_norm_is_refused():
    with pytest.raises(ValueError, match=r"module must have a batch norm with a scale .*, got none among \['0'\]"):
        fold_batch_norms_(nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 2, 1)), example_inputs=(IMAGES,))
