import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from lightning_edge.export.narrow import store_narrow_


def model_of(values, *, to=None):
    """A model whose output is the constant plus zero."""
    nodes = [helper.make_node("Cast", ["w"], ["c"], to=to)] if to else []
    nodes.append(helper.make_node("Add", ["c" if to else "w", "x"], ["y"]))
    shapes = [helper.make_tensor_value_info(name, TensorProto.FLOAT, values.shape) for name in "xy"]
    graph = helper.make_graph(nodes, "g", shapes[:1], shapes[1:], [numpy_helper.from_array(values, "w")])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def run(model, shape):
    onnx.checker.check_model(model)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, {"x": np.zeros(shape, np.float32)})[0]


def stored(model):
    return {item.name: item.data_type for item in model.graph.initializer}


@pytest.mark.parametrize("count", [6, 7])
def test_nibbles_are_unpacked_to_the_same_integers(count):
    values = np.array([-8, 7, 0, -1, 3, 5, -4], np.int8)[:count]
    model = model_of(values, to=TensorProto.FLOAT)
    store_narrow_(model, "int4_weight_only")
    assert stored(model) == {"w": TensorProto.INT4}
    assert np.array_equal(run(model, values.shape), values.astype(np.float32))


@pytest.mark.parametrize(("scheme", "kind"), [("fp16", TensorProto.FLOAT16), ("bf16", TensorProto.BFLOAT16)])
def test_halves_are_those_numbers_exactly_or_stay(scheme, kind):
    exact, inexact = np.array([[1.5, -0.25], [0.0, 3.0]], np.float32), np.array([0.1, 70000.0], np.float32)
    model = model_of(exact)
    store_narrow_(model, scheme)
    assert stored(model) == {"w_half": kind}
    assert np.array_equal(run(model, exact.shape), exact)
    model = model_of(inexact)
    store_narrow_(model, scheme)
    assert stored(model) == {"w": TensorProto.FLOAT}


@pytest.mark.parametrize("scheme", [None, "int8_static", "int8_weight_only"])
def test_other_networks_are_left_alone(scheme):
    model = model_of(np.array([1, 2], np.int8), to=TensorProto.FLOAT)
    before = model.SerializeToString()
    store_narrow_(model, scheme)
    assert model.SerializeToString() == before
