"""An ONNX model as its tensors and a graph without them, of which nothing is kept that no runtime needs."""

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from lightning_edge.artifact.codebooks import BFLOAT16
from lightning_edge.artifact.tensors import DTYPES

if TYPE_CHECKING:
    from onnx import ModelProto

Typed = tuple[NDArray[Any], int]
"""A tensor and its element type, as ONNX numbers them."""
_INLINE_BYTES = 16  # a scalar costs less inside the graph than a record of its own
_LARGE_BYTES = 512  # where a tensor of a Constant node, or one that is there twice, is worth a change of the graph


def is_storable(name: object) -> bool:
    """Whether a tensor of this name can be stored.

    >>> is_storable("fc.weight"), is_storable(""), is_storable(3)
    (True, False, False)
    """
    return isinstance(name, str) and name != "" and "\n" not in name


def split_model(model: "ModelProto") -> tuple[bytes, dict[str, Typed]]:
    """Return the graph without its tensors, serialized, and the tensors by name.

    Large tensors of Constant nodes are among them; of equal ones the first is kept. Descriptions are dropped, and
    values that only nodes see get short names.
    """
    import onnx
    from onnx import numpy_helper

    slim = onnx.ModelProto()
    slim.CopyFrom(model)
    _take_out_constants(slim)
    if not _has_subgraphs(slim):  # which may use names of the graph around them
        _merge_equal(slim)
    tensors: dict[str, Typed] = {}
    kept = []
    for initializer in slim.graph.initializer:
        kind = initializer.data_type
        array = _elements(initializer, kind) if kind in DTYPES else None
        if array is None or array.nbytes <= _INLINE_BYTES or not is_storable(initializer.name):
            kept.append(initializer if array is None else _compact(initializer, numpy_helper))
        else:
            tensors[initializer.name] = (array, kind)
    del slim.graph.initializer[:]
    slim.graph.initializer.extend(kept)
    _strip(slim, tensors)
    return slim.SerializeToString(deterministic=True), tensors


def _elements(initializer: Any, kind: int) -> NDArray[Any]:
    from onnx import numpy_helper

    array: NDArray[Any] = numpy_helper.to_array(initializer)
    return array.view(np.uint16) if kind == BFLOAT16 else array


def _compact(initializer: Any, numpy_helper: Any) -> Any:
    return (
        initializer
        if initializer.raw_data
        else numpy_helper.from_array(numpy_helper.to_array(initializer), initializer.name)
    )


def _take_out_constants(model: "ModelProto") -> None:
    """Make the large tensors of Constant nodes initializers, which are entropy-coded."""
    outputs = {item.name for item in model.graph.output}
    for node in list(model.graph.node):
        value = next((attribute.t for attribute in node.attribute if attribute.name == "value"), None)
        is_constant = node.op_type == "Constant" and value is not None and node.output[0] not in outputs
        if is_constant and value.ByteSize() > _LARGE_BYTES:
            taken = model.graph.initializer.add()
            taken.CopyFrom(value)
            taken.name = node.output[0]
            model.graph.node.remove(node)


def _merge_equal(model: "ModelProto") -> None:
    """Let all nodes read the first of large initializers that are equal."""
    outside = {item.name for item in (*model.graph.input, *model.graph.output)}
    seen: dict[tuple[object, ...], str] = {}
    first: dict[str, str] = {}
    for item in model.graph.initializer:
        if item.name not in outside and len(item.raw_data) > _LARGE_BYTES:
            name = seen.setdefault((item.data_type, *item.dims, item.raw_data), item.name)
            if name != item.name:
                first[item.name] = name
    kept = [item for item in model.graph.initializer if item.name not in first]
    del model.graph.initializer[:]
    model.graph.initializer.extend(kept)
    for node in model.graph.node:
        node.input[:] = [first.get(name, name) for name in node.input]


def _has_subgraphs(model: "ModelProto") -> bool:
    return any(part.HasField("g") or part.graphs for node in model.graph.node for part in node.attribute)


def _strip(model: "ModelProto", tensors: Mapping[str, Typed]) -> None:
    """Drop what describes the tracing, and shorten the names of values that nobody outside the graph can see."""
    model.doc_string = model.producer_name = model.producer_version = model.domain = ""
    del model.metadata_props[:]
    graph = model.graph
    graph.name, graph.doc_string = "g", ""
    del graph.value_info[:]
    del graph.metadata_props[:]
    for node in graph.node:
        node.name = node.doc_string = ""
        del node.metadata_props[:]
    for item in (*graph.initializer, *graph.input, *graph.output):
        item.doc_string = ""
        del item.metadata_props[:]
    if _has_subgraphs(model) or graph.quantization_annotation:
        return  # both may use names of the graph around them
    made = [name for node in graph.node for name in node.output if name]
    seen = {item.name for item in (*graph.input, *graph.output)}
    taken = seen | {name for node in graph.node for name in node.input} | set(tensors)
    taken |= {item.name for item in graph.initializer} | {item.values.name for item in graph.sparse_initializer}
    fresh = (token for token in _tokens() if token not in taken)
    short = {name: next(fresh) for name in made if name not in seen}
    for node in graph.node:
        node.input[:] = [short.get(name, name) for name in node.input]
        node.output[:] = [short.get(name, name) for name in node.output]


def _tokens() -> Iterator[str]:
    number = 0
    while True:
        yield np.base_repr(number, 36).lower()
        number += 1
