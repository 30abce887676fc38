import numpy as np
import onnx
import pytest
import torch
from onnx import helper, numpy_helper
from torch import nn

from lightning_edge import export, load_artifact, share_weights_
from lightning_edge.artifact import inspect, read_tensors
from lightning_edge.export.halves import round_small_


def model_of(nodes=(), **tensors):
    initializers = [numpy_helper.from_array(value, name) for name, value in tensors.items()]
    return onnx.ModelProto(graph=onnx.GraphProto(node=list(nodes), initializer=initializers))


def values_of(model):
    return {item.name: numpy_helper.to_array(item) for item in model.graph.initializer}


def test_vectors_are_rounded_to_the_nearest_float16():
    bias, scale = np.float32([0.1, -3.3, 0.0]), np.float32([[[1.7]], [[0.3]]])
    model = model_of(bias=bias, scale=scale)
    assert round_small_(model) == ("bias", "scale")
    assert np.array_equal(values_of(model)["bias"], bias.astype(np.float16).astype(np.float32))
    assert np.array_equal(values_of(model)["scale"], scale.astype(np.float16).astype(np.float32))


def test_shared_weights_are_rounded_and_others_keep_their_bits():
    free = np.random.default_rng(0).normal(size=(8, 8)).astype(np.float32)
    shared = np.float32([0.0, 0.1, -0.7])[np.random.default_rng(0).integers(0, 3, (8, 8))]
    model = model_of(free=free, shared=shared)
    assert round_small_(model) == ("shared",)
    found = values_of(model)
    assert np.array_equal(found["free"], free)
    assert len(np.unique(found["shared"])) == 3
    assert np.array_equal(found["shared"] == 0, shared == 0)


@pytest.mark.parametrize("values", [[1e5, 0.1], [1e-5, 2e-5], [np.inf, 0.1], [np.nan, 0.1], [0.5, 0.25], []], ids=str)
def test_what_float16_cannot_hold_or_holds_already_stays(values):
    assert round_small_(model_of(bias=np.array(values, dtype=np.float32))) == ()


def test_whole_numbers_and_scales_of_quantized_tensors_stay():
    scale = np.float32([0.1, 0.3])
    node = helper.make_node("DequantizeLinear", ["weight", "scale"], ["y"])
    model = model_of([node], scale=scale, sizes=np.array([1, 5]))
    assert round_small_(model) == ()


def test_a_graph_that_rounds_activations_stays_as_it_is():
    bias, scale = np.float32([0.1, -3.3]), np.float32(0.1)
    assert round_small_(model_of(bias=bias, scale=scale)) == ("bias", "scale")
    node = helper.make_node("QuantizeLinear", ["x", "scale"], ["y"])
    assert round_small_(model_of([node], bias=bias, scale=scale)) == ()


@pytest.mark.parametrize("round_small", [True, False])
def test_a_packed_file_holds_rounded_values_unless_told_not_to(tmp_path, round_small):
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(8 * 36, 4)).eval()
    network(torch.randn(32, 1, 8, 8))
    share_weights_(network, clusters=4, include=["0"])
    images = torch.randn(2, 1, 8, 8)
    path = export(network, tmp_path / "net.edge", example_inputs=(images,), round_small=round_small)
    packed = read_tensors(path)
    assert np.array_equal(packed["3.weight"], network[3].weight.detach().numpy())
    shared = network[0].weight.detach().numpy()
    expected = shared.astype(np.float16).astype(np.float32) if round_small else shared
    assert np.array_equal(packed["0.weight"], expected)
    np.testing.assert_allclose(load_artifact(path)(images.numpy()), network(images).detach().numpy(), atol=5e-3)
    halves = [row.name for row in inspect(path).tensors if row.codec == "half"]
    assert ("0.bias" in halves) is round_small
