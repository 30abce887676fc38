"""A small depthwise-separable network, trained on real digits once for all tests."""

import copy
from functools import cache

import torch
import torch.nn.functional as F
from torch import nn

from lightning_edge.data import DigitsDataModule


def separable(channels, width, stride=1):
    return [
        nn.Conv2d(channels, channels, 3, stride, 1, groups=channels, bias=False),
        nn.BatchNorm2d(channels),
        nn.ReLU(),
        nn.Conv2d(channels, width, 1, bias=False),
        nn.BatchNorm2d(width),
        nn.ReLU(),
    ]


@cache
def digits():
    data = DigitsDataModule()
    data.setup()
    return data


@cache
def test_images():
    data = digits().test
    return data.__getitems__(range(len(data)))


@cache
@torch.random.fork_rng(devices=[])
def _trained():
    torch.manual_seed(0)
    stem = [nn.Conv2d(1, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU()]
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10)]
    network = nn.Sequential(*stem, *separable(8, 16), *separable(16, 32, stride=2), *head)
    optimizer = torch.optim.Adam(network.parameters(), 1e-2)
    for _ in range(6):
        for images, labels in digits().train_dataloader():
            optimizer.zero_grad()
            F.cross_entropy(network(images), labels).backward()
            optimizer.step()
    return network.eval()


def trained():
    """Return a copy of the trained network, in evaluation mode."""
    return copy.deepcopy(_trained())


def uneven():
    """Return the trained network with channels that differ by up to 2**8, as in larger networks of its kind.

    It computes the same: what a batch norm multiplies by a power of two, the next layer divides by it.
    """
    network = trained()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for index in (1, 4, 7, 10):
            norm, reader = network[index], network[index + 2]
            factors = torch.exp2(torch.randint(-4, 5, norm.weight.shape, generator=generator).float())
            norm.weight.mul_(factors)
            norm.bias.mul_(factors)
            reader.weight.div_(factors.view(-1, 1, 1, 1) if reader.groups > 1 else factors.view(1, -1, 1, 1))
    return network


@torch.no_grad()
def logits(network):
    return network.eval()(test_images()[0])


def errors(network):
    """Return how many of the 599 test images get a wrong label."""
    return int((logits(network).argmax(1) != test_images()[1]).sum())


def distance(network, other):
    """Return the mean squared difference of the logits, relative to their mean square."""
    expected = logits(other)
    return float((logits(network) - expected).square().mean() / expected.square().mean())
