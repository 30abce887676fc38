import pytest
import torch

from lightning_edge.models import CifarResNet, ResNet8, ResNet20, ResNet56
from lightning_edge.models.resnet import BasicBlock


@pytest.mark.parametrize(("build", "count"), [(ResNet8, 77_850), (ResNet20, 269_722), (ResNet56, 853_018)])
def test_the_parameters_are_those_of_the_published_networks(build, count):
    assert sum(parameter.numel() for parameter in build().parameters()) == count
    assert build(num_classes=7)(torch.zeros(2, 3, 32, 32)).shape == (2, 7)


def test_the_shortcut_takes_every_second_pixel_and_pads_channels_on_both_sides():
    block = BasicBlock(2, 4, stride=2).eval()
    torch.nn.init.zeros_(block.conv2.weight)
    x = torch.rand(1, 2, 4, 4)
    out = block(x)
    assert torch.equal(out[:, 1:3], x[:, :, ::2, ::2])
    assert not bool(out[:, [0, 3]].any())


def test_names_are_those_of_the_published_weights():
    names = set(ResNet20().state_dict())
    assert {"conv1.weight", "bn1.running_mean", "layer1.0.conv1.weight", "layer3.2.bn2.bias", "linear.weight"} <= names


def test_a_network_of_no_blocks_is_refused():
    with pytest.raises(ValueError, match="blocks must be at least 1, got 0"):
        CifarResNet(blocks=0)
