"""Weights of few bits in an ONNX file: stored in a type of that width, and cast to float32 when the file is loaded."""

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from lightning_edge.export.graph import Graph

_OPSET_OF_INT4 = 21
_HALVES = {"fp16": TensorProto.FLOAT16, "bf16": TensorProto.BFLOAT16}


def store_narrow_(model: onnx.ModelProto, scheme: str | None) -> None:
    """Store the weights of a network that was quantized by this scheme in as many bits as they have.

    Runtimes fold the cast of a constant when they load the file: the numbers and the speed are those of float32. The
    packed file needs none of this, its coder finds the bits by itself.
    """
    if scheme in _HALVES:
        _store_halves(model, _HALVES[scheme])
    elif scheme == "int4_weight_only":
        _store_nibbles(model)


def _store_halves(model: onnx.ModelProto, kind: int) -> None:
    graph = Graph(model.graph)
    casts = []
    for item in list(model.graph.initializer):
        values = graph.constants[item.name]
        if values.dtype != np.float32 or not values.size:
            continue
        half = _half(values, item.name, kind)
        if half is None:
            continue
        half.name = f"{item.name}_half"
        item.CopyFrom(half)
        casts.append(helper.make_node("Cast", [half.name], [half.name.removesuffix("_half")], to=TensorProto.FLOAT))
    for node in reversed(casts):
        model.graph.node.insert(0, node)


def _half(values: np.ndarray, name: str, kind: int) -> TensorProto | None:
    """The tensor in two bytes each, where that is exact."""
    if kind == TensorProto.FLOAT16:
        with np.errstate(over="ignore"):
            half = values.astype(np.float16)
        return numpy_helper.from_array(half, name) if np.array_equal(half.astype(np.float32), values) else None
    bits = np.ascontiguousarray(values).view(np.uint32)
    if (bits & 0xFFFF).any():
        return None
    return helper.make_tensor(name, kind, values.shape, (bits >> 16).astype("<u2").tobytes(), raw=True)


def _store_nibbles(model: onnx.ModelProto) -> None:
    """Store what is cast from int8 as int4: two's complement, the first of two values in the lower half of a byte."""
    cast = {node.input[0] for node in model.graph.node if node.op_type == "Cast"}
    for item in model.graph.initializer:
        if item.name not in cast or item.data_type != TensorProto.INT8:
            continue
        values = numpy_helper.to_array(item).reshape(-1)
        pairs = np.append(values, np.zeros(len(values) % 2, np.int8)).view(np.uint8).reshape(-1, 2) & 0xF
        packed = (pairs[:, 0] | pairs[:, 1] << 4).astype(np.uint8).tobytes()
        item.CopyFrom(helper.make_tensor(item.name, TensorProto.INT4, tuple(item.dims), packed, raw=True))
    for opset in model.opset_import:
        if opset.domain == "":
            opset.version = max(opset.version, _OPSET_OF_INT4)
