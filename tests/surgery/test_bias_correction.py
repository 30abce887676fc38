import pytest
import torch
from mobile_network import digits, distance, errors, trained, uneven
from torch import nn

from lightning_edge import quantize
from lightning_edge.surgery.bias_correction import correct_bias_
from lightning_edge.surgery.quantization import convert


def test_it_brings_the_int8_network_nearer_to_the_float_one():
    for network, gain in ((trained(), 0.95), (uneven(), 0.8)):
        quantized = quantize(network, digits())
        before = distance(quantized, network)
        report = correct_bias_(quantized, network, digits())
        assert distance(quantized, network) < gain * before
        assert report.uncorrected == ()
        assert list(report.shifts) == ["0", "3", "6", "9", "12", "17"]


def test_the_means_of_every_channel_agree_afterwards():
    torch.manual_seed(0)
    network, batch = (
        nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 5)),
        torch.rand(64, 1, 8, 8),
    )
    quantized = quantize(network, [batch])
    # A bias that is off is the plainest case: nothing but the mean is wrong.
    with torch.no_grad():
        quantized[3].bias += torch.tensor([0.5, 0, 0, -0.25, 0])
    report = correct_bias_(quantized, network, [batch])
    assert report.shifts["3"] == pytest.approx(0.5, abs=0.02)
    with torch.no_grad():
        difference = (convert(quantized)(batch) - network(batch)).mean(0)
    assert float(difference.abs().max()) < 0.01


def test_the_float_network_is_left_alone():
    network = trained().train()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    correct_bias_(quantize(network, digits()), network, digits())
    assert network.training
    assert "forward" not in vars(network)
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())


def test_a_layer_without_a_bias_is_named():
    network = nn.Sequential(nn.Linear(4, 4, bias=False), nn.ReLU(), nn.Linear(4, 2))
    batch = torch.randn(8, 4)
    report = correct_bias_(quantize(network, [batch]), network, [batch])
    assert report.uncorrected == ("0",)
    assert list(report.shifts) == ["2"]


def test_what_is_no_pair_is_refused():
    batch, network = torch.randn(8, 4), nn.Sequential(nn.Linear(4, 4))
    with pytest.raises(ValueError, match="quantized must be a network of scheme 'int8_static'"):
        correct_bias_(network, network, [batch])
    with pytest.raises(ValueError, match="module must be the network that quantized was made of"):
        correct_bias_(quantize(network, [batch]), nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), [batch])


def test_its_labels_are_no_worse():
    network = uneven()
    quantized = quantize(network, digits())
    before = errors(quantized)
    correct_bias_(quantized, network, digits())
    assert errors(quantized) < before
