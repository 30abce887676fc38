import numpy as np
import pytest
import torch
from torch import nn

from lightning_edge import export, load_artifact, share_weights_
from lightning_edge.artifact import read_tensors
from lightning_edge.export.channel_scales import merge_channel_scales_
from lightning_edge.export.onnx import to_onnx


def with_batch_norm():
    return nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 6, 3), nn.ReLU())


def with_linear():
    return nn.Sequential(nn.Flatten(), nn.Linear(300, 16), nn.ReLU(), nn.Linear(16, 12, bias=False))


@pytest.mark.parametrize("make", [with_batch_norm, with_linear])
def test_weights_keep_the_values_of_the_codebook_alone_and_outputs_stay(make, tmp_path):
    torch.manual_seed(0)
    network, images = make(), torch.randn(4, 3, 10, 10)
    network(images)
    network.eval()
    share_weights_(network, clusters=7, channel_scale=True)
    expected = network(images).detach().numpy()
    path = export(network, tmp_path / "net.edge", example_inputs=(images,), round_small=False)
    np.testing.assert_allclose(load_artifact(path)(images.numpy()), expected, rtol=1e-4, atol=1e-5)
    weights = {name: value for name, value in read_tensors(path).items() if name.endswith("weight")}
    assert len(weights) == 2
    assert all(len(np.unique(value)) <= 8 for value in weights.values())


def test_the_scales_go_into_the_product_that_a_batch_norm_left():
    torch.manual_seed(0)
    network, images = with_batch_norm().eval(), torch.randn(2, 3, 10, 10)
    share_weights_(network, clusters=7, channel_scale=True, include=["0"])
    model = to_onnx(network, (images,))
    before = [node.op_type for node in model.graph.node]
    assert merge_channel_scales_(model) == ("0.weight",)
    assert [node.op_type for node in model.graph.node] == before


@pytest.mark.parametrize("shared", [True, False])
def test_weights_without_scales_are_left_alone(shared):
    torch.manual_seed(0)
    network, images = with_batch_norm().eval(), torch.randn(2, 3, 10, 10)
    if shared:
        share_weights_(network, clusters=4)
    model = to_onnx(network, (images,))
    assert merge_channel_scales_(model) == ()


def test_as_many_values_as_may_be_shared_with_scales_are_found_in_the_file(tmp_path):
    torch.manual_seed(0)
    layer = nn.Linear(512, 32)
    share_weights_(layer, clusters=256, channel_scale=True)
    path = export(layer, tmp_path / "net.edge", example_inputs=(torch.zeros(2, 512),))
    assert len(np.unique(read_tensors(path)["weight"])) <= 257
