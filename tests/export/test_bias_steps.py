"""Packed integer networks store no step of a bias, and run with the same kernels."""

import collections

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from onnx import helper, numpy_helper
from torch import nn

from lightning_edge import export, load_artifact, quantize, unpack
from lightning_edge.artifact import inspect
from lightning_edge.export.bias_steps import derive_bias_steps_


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    plain = nn.Sequential(
        nn.Conv2d(1, 32, 3), nn.ReLU(), nn.Conv2d(32, 32, 3, groups=32), nn.ReLU(), nn.Flatten(), nn.Linear(512, 32)
    )
    return quantize(plain.eval(), [torch.randn(64, 1, 8, 8)], scheme="int8_static")


def kernels(path, folder):
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.optimized_model_filepath = str(folder / "optimized.onnx")
    ort.InferenceSession(path, options)
    return collections.Counter(node.op_type for node in onnx.load(folder / "optimized.onnx").graph.node)


def test_steps_of_biases_are_not_stored_and_numbers_and_kernels_stay(network, tmp_path):
    images = torch.randn(16, 1, 8, 8)
    plain, packed = (
        export(network, tmp_path / f"net.{suffix}", example_inputs=(images,)) for suffix in ("onnx", "edge")
    )
    assert np.array_equal(load_artifact(packed)(images.numpy()), load_artifact(plain)(images.numpy()))
    unpack(packed, tmp_path / "unpacked.onnx")
    assert kernels(tmp_path / "unpacked.onnx", tmp_path) == kernels(plain, tmp_path)

    stored = {tensor.name: tensor.dtype for tensor in inspect(packed).tensors}
    assert [stored[f"{place}.bias"] for place in (0, 2, 5)] == ["int16"] * 3
    assert not [name for name in stored if name.startswith(("0.bias_", "2.bias_", "5.bias_"))]


def model_of(bias, *, step=0.5, offset=0):
    """Return a layer of steps 0.25 and 2 with a bias of this step."""
    constants = {
        "x_step": np.float32(0.25),
        "weight": np.int8([[1, 2], [3, 4]]),
        "w_step": np.float32([2.0, 2.0]),
        "bias": np.array(bias),
        "b_step": np.float32([step, step]),
        "offset": np.full(2, offset, np.int32),
    }
    nodes = [
        helper.make_node("DequantizeLinear", ["x", "x_step"], ["x_float"]),
        helper.make_node("DequantizeLinear", ["weight", "w_step"], ["w_float"], axis=0),
        helper.make_node("DequantizeLinear", ["bias", "b_step", "offset"], ["b_float"], axis=0),
        helper.make_node("Gemm", ["x_float", "w_float", "b_float"], ["y"], transB=1),
    ]
    ends = [helper.make_tensor_value_info(n, kind, [1, 2]) for n, kind in (("x", 3), ("y", 1))]
    items = [numpy_helper.from_array(value, name) for name, value in constants.items()]
    graph = helper.make_graph(nodes, "layer", ends[:1], ends[1:], items)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def run(model):
    session = ort.InferenceSession(model.SerializeToString())
    return session.run(None, {"x": np.int8([[5, -7]])})[0]


@pytest.mark.parametrize(("value", "dtype"), [(32767, np.int16), (32768, np.int32), (-32768, np.int16)])
def test_a_bias_is_stored_in_as_many_bits_as_it_has(value, dtype):
    model = model_of(np.int32([value, 3]))
    expected = run(model)
    assert derive_bias_steps_(model) == ("bias",)
    onnx.checker.check_model(model)
    assert np.array_equal(run(model), expected)
    stored = {item.name: numpy_helper.to_array(item).dtype for item in model.graph.initializer}
    assert stored.pop("bias") == dtype
    assert sorted(stored) == ["w_step", "weight", "x_step"]


@pytest.mark.parametrize("other", [{"step": 0.75}, {"offset": 1}], ids=str)
def test_a_bias_of_another_step_or_with_an_offset_stays(other):
    model = model_of(np.int32([4, 3]), **other)
    before = model.SerializeToString()
    assert derive_bias_steps_(model) == ()
    assert model.SerializeToString() == before
