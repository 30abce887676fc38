"""Weights of linear layers that torch's exporter has transposed: stored as the module has them, under their names."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper
from torch import Tensor

from lightning_edge.export.graph import Graph


def restore_transposed_(model: onnx.ModelProto, parameters: Mapping[str, Tensor]) -> tuple[str, ...]:
    """Store each constant that is a transposed matrix of ``parameters`` as that matrix, with a Transpose behind it.

    The exporter writes a linear layer on inputs of three dimensions as a product with a constant without a name, which
    has its output channels in columns. Runtimes fold the Transpose when they load the file: numbers and speed stay.

    Returns:
        The names of the matrices.
    """
    graph = Graph(model.graph)
    missing = {
        name: value.detach().cpu().numpy()
        for name, value in parameters.items()
        if name not in graph.constants and value.dim() == 2 and value.dtype.is_floating_point and value.itemsize >= 4
    }
    restored = []
    for constant in dict.fromkeys(node.input[1] for node in model.graph.node if node.op_type == "MatMul"):
        wanted = graph.constants.get(constant)
        name = next((name for name, matrix in missing.items() if wanted is not None and _is_same(matrix.T, wanted)), "")
        if name:
            graph.rename(constant, name, missing.pop(name))
            model.graph.node.insert(0, helper.make_node("Transpose", [name], [constant], perm=[1, 0]))
            restored.append(name)
    return tuple(restored)


def _is_same(a: NDArray[Any], b: NDArray[Any]) -> bool:
    """Whether two arrays are equal bit by bit."""
    if (a.shape, a.dtype) != (b.shape, b.dtype):
        return False
    return bool((np.ascontiguousarray(a).view(f"u{a.itemsize}") == b.view(f"u{b.itemsize}")).all())
