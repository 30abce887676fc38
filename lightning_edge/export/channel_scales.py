"""Shared values with a scale per output channel, in an ONNX graph: the scale moves behind the layer."""

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from onnx import helper

from lightning_edge.export.graph import Graph
from lightning_edge.surgery.channel_scales import channel_scales

Floats = NDArray[np.float32]


def merge_channel_scales_(model: onnx.ModelProto) -> tuple[str, ...]:
    """Let each layer whose weights are codebook[code] x scale of the channel compute with the codebook's values alone.

    Its scales go into the product that a batch norm left behind the layer, else into a new one. The weights then have
    as few different values as the codebook; outputs change by rounding alone.

    Returns:
        The names of the weights that changed.
    """
    graph = Graph(model.graph)
    changed = []
    for node in list(model.graph.node):
        name = _weight_of(node, graph)
        if name is None:
            continue
        weight = graph.constants[name]
        found = channel_scales(torch.from_numpy(weight.copy()))
        if found is None or 2 * len(found[2]) > len(np.unique(weight)):
            continue
        scales, codes, codebook = (part.numpy() for part in found)
        graph.replace(name, codebook[codes])
        if node.op_type == "Gather":
            _scale_rows(graph, node, name, scales)
        elif (product := _product_behind(graph, node, weight)) is None:
            _insert_product(graph, node, name, scales)
        else:
            factor = graph.constants[product.input[1]]
            product.input[1] = graph.changed(product.input[1], factor * scales.reshape(factor.shape))
        changed.append(name)
    return tuple(changed)


def _weight_of(node: onnx.NodeProto, graph: Graph) -> str | None:
    """Return the name of a weight whose rows are output channels or embeddings, if no other node reads it."""
    flags = {attribute.name: attribute.i for attribute in node.attribute}
    if node.op_type == "Gather":
        weight = graph.constants.get(node.input[0])
        rows = weight is not None and weight.dtype == np.float32 and weight.ndim == 2 and not flags.get("axis", 0)
        return node.input[0] if rows and graph.uses(node.input[0]) == 1 else None
    if node.op_type not in ("Conv", "Gemm", "MatMul") or graph.uses(node.input[1]) > 1:
        return None
    name = node.input[1]
    if node.op_type == "MatMul":
        transpose = graph.producers.get(name)
        if transpose is None or transpose.op_type != "Transpose":
            return None
        name = transpose.input[0]
    elif node.op_type == "Gemm" and not flags.get("transB", 0):
        return None
    weight = graph.constants.get(name)
    matrix = weight is not None and weight.dtype == np.float32 and (weight.ndim == 2 or node.op_type == "Conv")
    return name if matrix and graph.uses(name) == 1 else None


def _has_bias(node: onnx.NodeProto) -> bool:
    return len(node.input) > 2 and node.input[2] != ""


def _product_behind(graph: Graph, node: onnx.NodeProto, weight: Floats) -> onnx.NodeProto | None:
    """Return the only user of a layer without bias, if it is a product with one constant per channel."""
    behind = [other for other in graph.graph.node if node.output[0] in other.input]
    if _has_bias(node) or graph.uses(node.output[0]) != 1 or not behind or behind[0].op_type != "Mul":
        return None
    factor = graph.constants.get(behind[0].input[1])
    per_channel = (len(weight), *[1] * (weight.ndim - 2))
    return behind[0] if factor is not None and factor.shape == per_channel else None


def _scale_rows(graph: Graph, node: onnx.NodeProto, name: str, scales: Floats) -> None:
    """Look the scale of each row of an embedding up too, and multiply."""
    output = node.output[0]
    factor, scaled = f"{output}_scale", f"{output}_unscaled"
    node.output[0] = scaled
    table = graph.add(f"{name}_scale", scales.reshape(-1, 1))
    place = next(index for index, other in enumerate(graph.graph.node) if other.output[:1] == node.output[:1])
    graph.graph.node.insert(place + 1, helper.make_node("Gather", [table, node.input[1]], [factor], axis=0))
    graph.graph.node.insert(place + 2, helper.make_node("Mul", [scaled, factor], [output]))


def _insert_product(graph: Graph, node: onnx.NodeProto, name: str, scales: Floats) -> None:
    """Put a product with the scales behind a layer, whose bias is divided by them."""
    weight = graph.constants[name]
    if _has_bias(node):
        node.input[2] = graph.changed(node.input[2], graph.constants[node.input[2]] / scales)
    factor = graph.add(f"{name}_scale", scales.reshape(-1, *[1] * (weight.ndim - 2)))
    output = node.output[0]
    node.output[0] = f"{output}_unscaled"
    product = helper.make_node("Mul", [node.output[0], factor], [output])
    place = next(index for index, other in enumerate(graph.graph.node) if other.output[:1] == node.output[:1])
    graph.graph.node.insert(place + 1, product)
