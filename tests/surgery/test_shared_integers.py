"""Shared values with a scale per channel are as many integers as shared values."""

import pytest
import torch
from torch import nn

from lightning_edge import load_artifact, share_weights_
from lightning_edge.export import export
from lightning_edge.surgery.calibration import calibrate_
from lightning_edge.surgery.quantization import capture_, convert
from lightning_edge.surgery.shared_integers import shared_integers


@pytest.fixture
def network():
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv2d(3, 16, 3, bias=False),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Conv2d(16, 24, 3),
        nn.BatchNorm2d(24),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(24, 10),
    )
    for norm in (network[1], network[4]):
        nn.init.uniform_(norm.weight, 0.2, 2.0)
        nn.init.uniform_(norm.running_var, 0.1, 3.0)
    return network.eval()


@pytest.fixture
def images():
    return torch.rand(16, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def integers_of(network):
    return [value for name, value in convert(network).named_buffers() if name.endswith("int8")]


def quantized(network, images, **options):
    captured = capture_(network, (images,), **options)
    calibrate_(captured, [(images,)])
    return captured


def test_a_layer_keeps_its_shared_values_through_folding_and_rounding(network, images):
    share_weights_(network, clusters=8, channel_scale=True, include=["0", "3"])
    plain = [network[index].weight.detach().clone() for index in (0, 3)]
    quantized(network, images)
    for weight, integers in zip(plain, integers_of(network), strict=False):
        assert len(integers.unique()) <= 8
        zeros = weight == 0
        assert bool((integers[zeros] == 0).all())


def test_without_scales_each_channel_has_integers_of_its_own(network, images):
    share_weights_(network, clusters=8, include=["0", "3"])
    quantized(network, images)
    assert max(len(integers.unique()) for integers in integers_of(network)) > 16


def test_the_integers_are_the_weight_to_half_a_step(network):
    share_weights_(network, clusters=8, channel_scale=True, include=["3"])
    weight = network[3].weight.detach()
    integers, steps = shared_integers(weight)
    assert steps.shape == (24,)
    error = (integers * steps.view(-1, 1, 1, 1) - weight).abs() / steps.view(-1, 1, 1, 1)
    assert float(error.max()) <= 0.5 + 1e-4


def test_weights_that_are_not_shared_are_not_searched(network):
    assert shared_integers(network[3].weight) is None
    assert shared_integers(torch.ones(4, 9)) is None  # one value for all channels has nothing to gain


@pytest.mark.parametrize("suffix", ["onnx", "pte", "edge"])
def test_files_compute_with_these_integers(network, images, tmp_path, suffix):
    share_weights_(network, clusters=8, channel_scale=True, include=["0", "3"])
    quantized(network, images)
    path = tmp_path / f"model.{suffix}"
    export(network, path, example_inputs=(images[:2],))
    expected = convert(network)(images)
    found = torch.from_numpy(load_artifact(path)(images.numpy()))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(expected, network(images), rtol=0, atol=0.1)  # whose weights are rounded row by row


def test_a_channel_that_the_norm_turns_round_keeps_its_values_with_the_other_sign(network, images):
    share_weights_(network, clusters=8, channel_scale=True, include=["3"])
    with torch.no_grad():
        network[4].weight[0] *= -1
    quantized(network, images)
    integers = integers_of(network)[1]
    assert len(integers[1:].unique()) <= 8
    assert set(integers[0].abs().unique().tolist()) <= set(integers.abs().unique().tolist())


@pytest.mark.parametrize("frozen", [False, True])
def test_training_computes_with_the_steps_of_the_integers(network, images, frozen):
    share_weights_(network, clusters=8, channel_scale=True, include=["0", "3"])
    captured = quantized(network, images)
    if frozen:
        captured.freeze_observers()
    for moved in (1.0, 1.5):  # training moves the largest of the shared values: other channels' steps follow
        with torch.no_grad():
            network[3].weight[network[3].weight == network[3].weight[0].max()] *= moved
        captured.follow_codebooks()
        with torch.no_grad():
            trained, converted = network(images), convert(network)(images)
        assert float((trained - converted).abs().max()) < 0.03 * float(converted.abs().max())
        integers, _ = shared_integers(network[3].weight)
        assert len(integers.unique()) <= 9


@pytest.mark.parametrize("options", [{"weight_bits": 4}, {"learned_steps": True}])
def test_few_bits_and_learned_steps_are_kept_as_they_were_trained(network, images, options):
    share_weights_(network, clusters=8, channel_scale=True, include=["0", "3"])
    captured = quantized(network, images, **options)
    steps = dict(convert(network).named_buffers())["3.weight_scale"]
    assert torch.equal(steps, captured.observers["3.weight"].scale)
