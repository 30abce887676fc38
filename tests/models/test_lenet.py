import torch
import torch.nn.functional as F

from lightning_edge.models import LeNet5, LeNet300


def shapes(network):
    return {name: tuple(p.shape) for name, p in network.named_parameters()}


def test_lenet5_is_the_one_of_the_caffe_examples():
    assert shapes(LeNet5()) == {
        "conv1.weight": (20, 1, 5, 5),
        "conv1.bias": (20,),
        "conv2.weight": (50, 20, 5, 5),
        "conv2.bias": (50,),
        "fc1.weight": (500, 800),
        "fc1.bias": (500,),
        "fc2.weight": (10, 500),
        "fc2.bias": (10,),
    }


def test_lenet5_has_one_activation_alone():
    net, images = LeNet5().eval(), torch.rand(3, 1, 28, 28)
    x = F.max_pool2d(F.conv2d(images, net.conv1.weight, net.conv1.bias), 2)
    x = F.max_pool2d(F.conv2d(x, net.conv2.weight, net.conv2.bias), 2).reshape(3, 800)
    expected = (x @ net.fc1.weight.T + net.fc1.bias).clamp(min=0) @ net.fc2.weight.T + net.fc2.bias
    torch.testing.assert_close(net(images), expected)


def test_lenet300_is_lenet_300_100():
    assert shapes(LeNet300()) == {
        "fc1.weight": (300, 784),
        "fc1.bias": (300,),
        "fc2.weight": (100, 300),
        "fc2.bias": (100,),
        "fc3.weight": (10, 100),
        "fc3.bias": (10,),
    }
