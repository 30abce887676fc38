"""An ONNX graph that is edited: its constants and producers by name."""

from typing import Any

import onnx
from numpy.typing import NDArray
from onnx import numpy_helper

_Array = NDArray[Any]


class Graph:
    """Constants and producers of an ONNX graph by name, kept right while it is edited."""

    def __init__(self, graph: onnx.GraphProto) -> None:
        self.graph = graph
        self.constants: dict[str, _Array] = {item.name: numpy_helper.to_array(item) for item in graph.initializer}
        self.producers = {output: node for node in graph.node for output in node.output}

    def add(self, name: str, value: _Array) -> str:
        """Add a constant under the first free name."""
        free, count = name, 0
        while free in self.constants or free in self.producers:
            count += 1
            free = f"{name}_{count}"
        self.constants[free] = value
        self.graph.initializer.append(numpy_helper.from_array(value, free))
        return free

    def replace(self, name: str, value: _Array) -> None:
        """Give a constant other elements."""
        self.constants[name] = value
        item = next(item for item in self.graph.initializer if item.name == name)
        item.CopyFrom(numpy_helper.from_array(value, name))

    def rename(self, name: str, new_name: str, value: _Array) -> None:
        """Give a constant another name, which must be free, and other elements; its users still read the old name."""
        self.replace(name, value)
        next(item for item in self.graph.initializer if item.name == name).name = new_name
        self.constants[new_name] = self.constants.pop(name)

    def changed(self, name: str, value: _Array) -> str:
        """Return the name of a constant with other elements for one of its users: the same if it is the only one."""
        if self.uses(name) > 1:
            return self.add(name, value)
        self.replace(name, value)
        return name

    def uses(self, name: str) -> int:
        """Return how often nodes and outputs of the graph read a value."""
        outputs = [item.name for item in self.graph.output]
        return sum(list(node.input).count(name) for node in self.graph.node) + outputs.count(name)


def sort_and_prune_(graph: onnx.GraphProto) -> None:
    """Put what is computed from constants alone first, so that each value is made before it is read; drop unread."""
    constants = {item.name for item in graph.initializer}
    nodes = sorted(graph.node, key=lambda node: not constants.issuperset(node.input))
    nodes = [onnx.NodeProto.FromString(node.SerializeToString()) for node in nodes]
    read = {output.name for output in graph.output}
    for node in reversed(nodes):
        if read.intersection(node.output):
            read.update(node.input)
    nodes = [node for node in nodes if read.intersection(node.output)]
    kept = [onnx.TensorProto.FromString(item.SerializeToString()) for item in graph.initializer if item.name in read]
    del graph.node[:], graph.initializer[:]
    graph.node.extend(nodes)
    graph.initializer.extend(kept)
