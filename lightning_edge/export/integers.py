"""The quantized ONNX graph in the form that onnxruntime and OpenVINO run with integer kernels on x86 and ARM."""

import numpy as np
import onnx
from onnx import helper

from lightning_edge.export.graph import Graph, sort_and_prune_


def use_integer_kernels_(model: onnx.ModelProto) -> None:
    """Rewrite quantize/dequantize pairs so that runtimes fuse them; the numbers stay the same.

    * int8 activations become uint8: 128 is added to the zero point (int8 ones are slow on x86).
    * Biases of quantized layers become int32 with scale s_x * s_w per channel, zero point 0.
    * A mean over all positions becomes the global average pool that has an integer kernel.
    * Padding by zeros pads integers by their zero point.
    * What is concatenated keeps its own scale: the kernel for integers takes one for each input.
    * A layer with float weights between quantized ones reads its input through plain arithmetic: onnxruntime would
      otherwise round its weights too, with one scale for all channels.

    The bias changes by at most half of s_x * s_w, one unit of the accumulator.
    """
    graph = Graph(model.graph)
    for node in model.graph.node:
        if node.op_type in ("Conv", "Gemm"):
            _quantize_bias(graph, node)
        elif node.op_type == "ReduceMean":
            _pool_globally(graph, node)
    _shift_activations(graph)
    for node in list(model.graph.node):
        if node.op_type == "Pad":
            _pad_integers(graph, node)
        elif node.op_type == "Concat":
            _join_integers(graph, node)
        elif node.op_type in ("Conv", "Gemm", "MatMul"):
            _read_in_float(graph, node)
    sort_and_prune_(model.graph)
    del model.graph.value_info[:]  # still says int8


def _shift_activations(graph: Graph) -> None:
    shifted: dict[str, str] = {}
    for node in graph.graph.node:
        if node.op_type not in ("QuantizeLinear", "DequantizeLinear") or len(node.input) < 3:
            continue
        name = node.input[2]
        zero_point = graph.constants.get(name)
        if zero_point is None or zero_point.ndim or zero_point.dtype != np.int8:  # one per channel: a weight
            continue
        if name not in shifted:
            shifted[name] = graph.add(f"{name}_uint8", np.asarray(zero_point.astype(np.int16) + 128, dtype=np.uint8))
        node.input[2] = shifted[name]


def _quantize_bias(graph: Graph, node: onnx.NodeProto) -> None:
    data, weight = (graph.producers.get(name) for name in node.input[:2])
    if data is None or weight is None or {data.op_type, weight.op_type} != {"DequantizeLinear"} or len(node.input) < 3:
        return
    bias = graph.constants.get(node.input[2])
    if bias is None or bias.dtype != np.float32 or _has_factors(node):
        return
    step = np.asarray(graph.constants[data.input[1]] * graph.constants[weight.input[1]], dtype=np.float32)
    name = node.input[2].removesuffix("_rounded")
    stored = graph.add(f"{name}_int32", np.rint(bias / step.astype(np.float64)).astype(np.int32))
    zero_point = graph.add(f"{name}_zero_point", np.zeros(len(bias), np.int32))
    inputs = [stored, graph.add(f"{name}_scale", step), zero_point]
    output = f"{name}_of_{node.output[0]}"
    graph.graph.node.append(helper.make_node("DequantizeLinear", inputs, [output], name=f"{node.name}_bias", axis=0))
    node.input[2] = output


def _has_factors(node: onnx.NodeProto) -> bool:
    factors = {item.name: item.f for item in node.attribute if item.name in ("alpha", "beta")}
    return any(value != 1.0 for value in factors.values())


def _pool_globally(graph: Graph, node: onnx.NodeProto) -> None:
    axes = graph.constants.get(node.input[1]) if len(node.input) > 1 else None
    keeps = all(item.i for item in node.attribute if item.name == "keepdims")
    source = graph.producers.get(node.input[0])
    if axes is None or not keeps or source is None or source.op_type != "DequantizeLinear":
        return
    if sorted(int(axis) for axis in axes) in ([2, 3], [-2, -1]) and _rank(graph, node.output[0]) == 4:
        node.op_type = "GlobalAveragePool"
        del node.input[1:], node.attribute[:]


def _pad_integers(graph: Graph, node: onnx.NodeProto) -> None:
    """Let a pad between a dequantization and a quantization of the same scale work on the integers."""
    source = graph.producers.get(node.input[0])
    readers = [other for other in graph.graph.node if node.output[0] in other.input]
    modes = [item.s for item in node.attribute if item.name == "mode"]
    values = [graph.constants.get(name) for name in node.input[2:3] if name]
    zero = all(value is not None and not value.any() for value in values) and modes in ([], [b"constant"])
    if not zero or source is None or source.op_type != "DequantizeLinear" or len(node.input) > 3:
        return
    parameters = list(source.input[1:])
    if [(other.op_type, list(other.input[1:])) for other in readers] != [("QuantizeLinear", parameters)]:
        return
    node.input[:] = [source.input[0], node.input[1], parameters[1]]
    node.output[0] = readers[0].output[0]
    graph.producers[node.output[0]] = node
    graph.graph.node.remove(readers[0])


def _join_integers(graph: Graph, node: onnx.NodeProto) -> None:
    """Read values before they get the scale of the result, which the kernel gives them.

    onnxruntime would merge two pairs in a row to one of a third scale, and so give other numbers.
    """
    for index, name in enumerate(node.input):
        origin = name
        for kind in ("DequantizeLinear", "QuantizeLinear"):
            producer = graph.producers.get(origin)
            origin = producer.input[0] if producer is not None and producer.op_type == kind else ""
        source = graph.producers.get(origin)
        if source is not None and source.op_type == "DequantizeLinear":
            node.input[index] = origin


def _read_in_float(graph: Graph, node: onnx.NodeProto) -> None:
    source, weight = graph.producers.get(node.input[0]), graph.constants.get(node.input[1])
    if source is None or source.op_type != "DequantizeLinear" or weight is None or weight.dtype != np.float32:
        return
    scale, zero_point = (graph.constants[name] for name in source.input[1:3])
    name = f"{node.input[0]}_in_{node.output[0]}"
    offset = graph.add(f"{name}_offset", zero_point.astype(np.float32))
    steps = [
        helper.make_node("Cast", [source.input[0]], [f"{name}_cast"], to=onnx.TensorProto.FLOAT),
        helper.make_node("Sub", [f"{name}_cast", offset], [f"{name}_centered"]),
        helper.make_node("Mul", [f"{name}_centered", graph.add(f"{name}_scale", scale)], [name]),
    ]
    node.input[0] = name
    place = next(index for index, other in enumerate(graph.graph.node) if other.output[0] == node.output[0])
    for step in reversed(steps):
        graph.graph.node.insert(place, step)


def _rank(graph: Graph, name: str) -> int | None:
    for info in graph.graph.value_info:
        if info.name == name:
            return len(info.type.tensor_type.shape.dim)
    return None
