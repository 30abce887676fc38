"""Biases of integer layers in a packed graph: what follows from the steps of input and weight is not stored."""

import numpy as np
import onnx
from onnx import helper

from lightning_edge.export.graph import Graph, sort_and_prune_

_DEQUANTIZE = "DequantizeLinear"


def derive_bias_steps_(model: onnx.ModelProto) -> tuple[str, ...]:
    """Compute the steps of int32 biases from those of their layers, and store the biases in int16 where they fit.

    A bias has the step s_x * s_w of the accumulator: four bytes a channel that say nothing new. A product of the two
    constants takes their place, which a runtime computes once, when it loads the file. Kernels and numbers stay the
    same, to the bit. An ``.onnx`` file keeps the steps: other tools than runtimes look for constants there.

    Returns:
        The names of the biases that changed.
    """
    graph = Graph(model.graph)
    changed = []
    for node in list(model.graph.node):
        if node.op_type not in ("Conv", "Gemm") or len(node.input) < 3:
            continue
        data, weight, bias = (graph.producers.get(name) for name in node.input[:3])
        if data is None or weight is None or bias is None or not _is_derived(graph, data, weight, bias):
            continue
        name, step = bias.input[:2]
        product = helper.make_node("Mul", [data.input[1], weight.input[1]], [f"{step}_of_{node.output[0]}"])
        model.graph.node.append(product)
        del bias.input[1:]  # the zero point, all zeros, goes too
        bias.input.append(product.output[0])
        _narrow(graph, bias, name)
        changed.append(name)
    if changed:
        sort_and_prune_(model.graph)
    return tuple(changed)


def _is_derived(graph: Graph, data: onnx.NodeProto, weight: onnx.NodeProto, bias: onnx.NodeProto) -> bool:
    """Return whether a bias is int32 with the product of the other two steps, and no offset."""
    if {node.op_type for node in (data, weight, bias)} != {_DEQUANTIZE}:
        return False
    integers, *offsets = (graph.constants.get(name) for name in (bias.input[0], *bias.input[2:]))
    of_data, of_weight, of_bias = (graph.constants.get(node.input[1]) for node in (data, weight, bias))
    if integers is None or of_data is None or of_weight is None or of_bias is None or integers.dtype != np.int32:
        return False
    return np.array_equal(of_data * of_weight, of_bias) and not any(item is None or item.any() for item in offsets)


def _narrow(graph: Graph, bias: onnx.NodeProto, name: str) -> None:
    integers = graph.constants[name]
    narrow = integers.astype(np.int16)
    if graph.uses(name) == 1 and np.array_equal(narrow, integers):
        graph.replace(name, narrow)
        wide = helper.make_node("Cast", [name], [f"{name}_int32"], to=onnx.TensorProto.INT32)
        graph.graph.node.append(wide)
        bias.input[0] = wide.output[0]
