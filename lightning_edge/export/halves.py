"""Small tensors and shared values of an ONNX graph in float16 precision: packed, they take two bytes each."""

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import numpy_helper

Floats = NDArray[np.float32]
_MAX_SHARED = 4096  # distinct values of what counts as shared
_LEAST = 2.0**-13  # below it float16 has fewer than 11 bits


def round_small_(model: onnx.ModelProto) -> tuple[str, ...]:
    """Round vectors, and weights of few distinct values, to the nearest float16 numbers; they stay float32 tensors.

    A value changes by at most one part in 2048, or by 2**-25 where it is tiny. Zeros stay zeros, equal values stay
    equal. Scales of quantized tensors keep their bits, and so does what float16 cannot hold: a tensor with a value
    beyond 65,504, or with none above 2**-13. A graph that rounds its activations to integers is left as it is: behind a
    norm that is a little off, values are rounded to the other side, and the file gives not the integers of its network.

    Returns:
        The names of the tensors that changed.

    >>> weight = numpy_helper.from_array(np.full(3, 0.1, np.float32), "bias")
    >>> round_small_(onnx.ModelProto(graph=onnx.GraphProto(initializer=[weight])))
    ('bias',)
    """
    if any(node.op_type == "QuantizeLinear" for node in model.graph.node):
        return ()
    scales = {name for node in model.graph.node if node.op_type == "DequantizeLinear" for name in node.input[1:2]}
    changed = []
    for tensor in model.graph.initializer:
        if tensor.data_type != onnx.TensorProto.FLOAT or tensor.name in scales:
            continue
        values: Floats = numpy_helper.to_array(tensor)
        if not _is_small(values):
            continue
        with np.errstate(over="ignore"):
            rounded = values.astype(np.float16).astype(np.float32)
        if bool(np.isfinite(rounded).all()) and not np.array_equal(rounded, values):
            tensor.CopyFrom(numpy_helper.from_array(rounded, tensor.name))
            changed.append(tensor.name)
    return tuple(changed)


def _is_small(values: Floats) -> bool:
    if not values.size or not float(np.abs(values).max()) >= _LEAST:
        return False
    is_vector = values.size == max(values.shape, default=1)
    return is_vector or len(np.unique(values)) <= min(_MAX_SHARED, values.size // 4)
