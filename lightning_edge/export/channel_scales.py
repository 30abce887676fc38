"""Shared values with a scale per output channel, in an ONNX graph: the scale moves behind the layer."""

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from lightning_edge.surgery.channel_scales import channel_scales

Floats = NDArray[np.float32]


def merge_channel_scales_(model: onnx.ModelProto) -> tuple[str, ...]:
    """Let each layer whose weights are codebook[code] x scale of the channel compute with the codebook's values alone.

    Its scales go into the product that a batch norm left behind the layer, else into a new one. The weights then have
    as few different values as the codebook; outputs change by rounding alone.

    Returns:
        The names of the weights that changed.
    """
    constants = _Constants(model.graph)
    changed = []
    for node in list(model.graph.node):
        name = node.input[1] if len(node.input) > 1 else ""
        if not _is_layer(node, constants) or constants.uses(name) > 1:
            continue
        weight = constants.value(name)
        found = channel_scales(torch.from_numpy(weight.copy()))
        if found is None or 2 * len(found[2]) > len(np.unique(weight)):
            continue
        scales, codes, codebook = (part.numpy() for part in found)
        constants.replace(name, codebook[codes])
        product = _product_behind(model.graph, node, constants)
        if product is None:
            _insert_product(model.graph, node, scales, constants)
        else:
            factor = constants.value(product.input[1])
            product.input[1] = constants.changed(product.input[1], factor * scales.reshape(factor.shape))
        changed.append(name)
    return tuple(changed)


class _Constants:
    """The float32 initializers of a graph by name, and how many nodes use each."""

    def __init__(self, graph: onnx.GraphProto) -> None:
        self._graph = graph
        self._tensors = {item.name: item for item in graph.initializer if item.data_type == onnx.TensorProto.FLOAT}
        self._taken = {item.name for item in graph.initializer} | {out for node in graph.node for out in node.output}

    def __contains__(self, name: str) -> bool:
        return name in self._tensors

    def uses(self, name: str) -> int:
        """Return how often nodes and outputs of the graph read a value."""
        outputs = [item.name for item in self._graph.output]
        return sum(list(node.input).count(name) for node in self._graph.node) + outputs.count(name)

    def value(self, name: str) -> Floats:
        """Return the elements."""
        values: Floats = numpy_helper.to_array(self._tensors[name])
        return values

    def replace(self, name: str, value: Floats) -> None:
        """Give a constant other elements."""
        self._tensors[name].CopyFrom(numpy_helper.from_array(value.astype(np.float32), name))

    def changed(self, name: str, value: Floats) -> str:
        """Return the name of a constant with other elements for one of its users: the same if it is the only one."""
        if self.uses(name) == 1:
            self.replace(name, value)
            return name
        return self.add(name, value)

    def add(self, name: str, value: Floats) -> str:
        """Add a constant under the first free name that starts like ``name``."""
        while name in self._taken:
            name += "_"
        self._taken.add(name)
        self._graph.initializer.append(numpy_helper.from_array(value.astype(np.float32), name))
        self._tensors[name] = self._graph.initializer[-1]
        return name


def _is_layer(node: onnx.NodeProto, constants: _Constants) -> bool:
    if node.op_type not in ("Conv", "Gemm") or node.input[1] not in constants:
        return False
    flags = {attribute.name: attribute.i for attribute in node.attribute}
    return bool(node.op_type == "Conv" or flags.get("transB", 0) == 1)  # rows are outputs


def _has_bias(node: onnx.NodeProto) -> bool:
    return len(node.input) > 2 and node.input[2] != ""


def _product_behind(graph: onnx.GraphProto, node: onnx.NodeProto, constants: _Constants) -> onnx.NodeProto | None:
    """Return the only user of a layer without bias, if it is a product with one constant per channel."""
    behind = [other for other in graph.node if node.output[0] in other.input]
    if _has_bias(node) or constants.uses(node.output[0]) != 1 or not behind or behind[0].op_type != "Mul":
        return None
    factor = behind[0].input[1]
    weight = constants.value(node.input[1])
    per_channel = (len(weight), *[1] * (weight.ndim - 2))
    return behind[0] if factor in constants and constants.value(factor).shape == per_channel else None


def _insert_product(graph: onnx.GraphProto, node: onnx.NodeProto, scales: Floats, constants: _Constants) -> None:
    """Put a product with the scales behind a layer, whose bias is divided by them."""
    weight = constants.value(node.input[1])
    if _has_bias(node):
        node.input[2] = constants.changed(node.input[2], constants.value(node.input[2]) / scales)
    factor = constants.add(f"{node.input[1]}_scale", scales.reshape(-1, *[1] * (weight.ndim - 2)))
    output = node.output[0]
    node.output[0] = f"{output}_unscaled"
    product = helper.make_node("Mul", [node.output[0], factor], [output])
    place = next(index for index, other in enumerate(graph.node) if other.output[:1] == node.output[:1])
    graph.node.insert(place + 1, product)
