"""A network as an ExecuTorch program that runs on XNNPACK."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from lightning_edge.export.signature import flatten_
from lightning_edge.surgery.calls import as_arguments, two_rows
from lightning_edge.surgery.capture import keep_random_state
from lightning_edge.surgery.quantization import deployed

MAX_BATCH = 64


def to_executorch(module: nn.Module, example_inputs: Any) -> bytes:
    """Return the network in evaluation mode as an ExecuTorch program (``.pte``), lowered to XNNPACK.

    A captured network becomes its int8 network. A program plans its memory ahead, for a batch of any size from 1 to
    :data:`MAX_BATCH`; a larger one is refused by the runtime. Inputs must be contiguous. The same network gives the
    same bytes.

    Args:
        module: The network, plain or captured by :func:`~lightning_edge.surgery.quantization.capture_`; not changed.
        example_inputs: As :func:`~lightning_edge.export.onnx.to_onnx` takes them.

    Raises:
        ImportError: If ExecuTorch is not installed.
        ValueError: If the network cannot be traced, or its observers have seen no data.
    """
    inputs = two_rows(as_arguments(module, example_inputs)).first(MAX_BATCH)
    graph_module = deployed(module, inputs, split_norms=False)
    _spell_out_strides(graph_module)
    batch = torch.export.Dim("batch", min=1, max=MAX_BATCH)
    shapes = tuple({0: batch} if value.ndim and len(value) == inputs.rows else None for value in inputs.tensors)
    names = dict(zip(("input_names", "output_names"), flatten_(graph_module, inputs), strict=True))
    names["batched_inputs"] = tuple(name for name, sizes in zip(names["input_names"], shapes, strict=True) if sizes)
    with _quiet(), keep_random_state():
        return _lower(graph_module, tuple(inputs.tensors), shapes, names)


def _lower(
    graph_module: GraphModule, inputs: tuple[Tensor, ...], shapes: tuple[object, ...], names: dict[str, tuple[str, ...]]
) -> bytes:
    try:
        from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
        from executorch.exir import to_edge_transform_and_lower
    except ImportError as error:
        raise ImportError(
            'the format .pte needs ExecuTorch, which is not installed: pip install "lightning-edge[executorch]"'
        ) from error
    # While tracing, torch asks which kernel it would take for a convolution: MKL-DNN's or NNPACK's, depending on
    # whether the batch is below 16. The answer becomes a limit: a program planned for 15 images at most.
    with torch.backends.nnpack.flags(enabled=False), torch.backends.mkldnn.flags(enabled=False):
        constants = {name: ",".join(values) for name, values in names.items()}
        program = torch.export.export(graph_module, inputs, dynamic_shapes=shapes)
        lowered = to_edge_transform_and_lower(program, partitioner=[XnnpackPartitioner()], constant_methods=constants)
        return bytes(lowered.to_executorch().buffer)


def _spell_out_strides(graph_module: GraphModule) -> None:
    """Give pools without a stride, for which torch takes the kernel's size, that size: XNNPACK's partitioner asks."""
    for node in graph_module.graph.find_nodes(op="call_function", target=torch.ops.aten.max_pool2d.default):
        if len(node.args) < 3 or not node.args[2]:
            node.args = (*node.args[:2], node.args[1], *node.args[3:])
    graph_module.recompile()


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep back what ExecuTorch and torch say about each other's deprecations while a network is lowered."""
    with warnings.catch_warnings():
        # No code of the user's runs here, so that none of these could be mended by one.
        for category in (DeprecationWarning, FutureWarning):
            warnings.simplefilter("ignore", category)
        warnings.filterwarnings("ignore", message="TF32 acceleration on top of oneDNN", category=UserWarning)
        yield
