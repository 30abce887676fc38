"""A network as one self-contained ONNX file."""

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import onnx
import torch
from onnxscript import opset20
from torch import nn

from lightning_edge.export.integers import use_integer_kernels_
from lightning_edge.export.signature import flatten_
from lightning_edge.export.transposed import restore_transposed_
from lightning_edge.surgery.calls import as_arguments, two_rows
from lightning_edge.surgery.capture import keep_random_state
from lightning_edge.surgery.quantization import deployed


def to_onnx(module: nn.Module, example_inputs: Any) -> onnx.ModelProto:
    """Return the network in evaluation mode as an ONNX model with a dynamic batch and every tensor inside.

    A captured network becomes its int8 network: weights stored as int8, activations uint8 (the same numbers as int8
    ones with 128 more), biases int32. In a float network every weight keeps its bits: batch norms become a scale and a
    shift behind the layer instead of being folded into it, so zeros and shared values survive. Weights have the names
    and shapes of the module; nothing depends on the machine, so that exporting twice gives the same bytes.

    Args:
        module: The network, plain or captured by :func:`~lightning_edge.surgery.quantization.capture_`; not changed.
        example_inputs: A tuple of positional inputs or a dict of them by name, batch first. The file takes their
            tensors one by one, under their names; outputs in a dict have the names of their keys.

    Raises:
        ValueError: If the network cannot be traced, or its observers have seen no data.

    >>> model = to_onnx(nn.Linear(4, 3), (torch.zeros(2, 4),))
    >>> sorted(tensor.name for tensor in model.graph.initializer)
    ['bias', 'weight']
    """
    inputs = two_rows(as_arguments(module, example_inputs))
    graph_module = deployed(module, inputs)
    batch = torch.export.Dim("batch", min=1)
    shapes = tuple({0: batch} if value.ndim and len(value) == inputs.rows else None for value in inputs.tensors)
    names = flatten_(graph_module, inputs)
    with _quiet(), keep_random_state():
        program = torch.onnx.export(
            graph_module,
            tuple(inputs.tensors),
            input_names=names[0],
            output_names=names[1],
            dynamo=True,
            external_data=False,
            dynamic_shapes=shapes,
            verbose=False,
            custom_translation_table={torch.ops.aten._int_mm.default: _integer_product},
        )
    assert program is not None
    model = program.model_proto
    use_integer_kernels_(model)
    restore_transposed_(model, dict(module.named_parameters()))
    _rename(model)
    _strip(model)
    onnx.checker.check_model(model)
    return model


def _integer_product(left: object, right: object) -> object:
    """Multiply int8 matrices; torch's exporter knows no such operator."""
    return opset20.MatMulInteger(left, right)


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep back what torch's exporter says about itself: deprecations, no torchvision, what it does not fold."""
    names = ("torch.onnx._internal.exporter._registration", "onnxscript.optimizer._constant_folding")
    loggers = [logging.getLogger(name) for name in names]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*LeafSpec.* is deprecated", category=FutureWarning)
            warnings.filterwarnings("ignore", message="# The axis name: batch will not be used", category=UserWarning)
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _rename(model: onnx.ModelProto) -> None:
    """Give integer weights and biases the names that the module has for them, where these are free."""
    taken = {item.name for item in model.graph.initializer}
    names: dict[str, str] = {}
    for item in model.graph.initializer:
        name = item.name.removesuffix("_int8").removesuffix("_int32")
        if name not in taken:
            names[item.name] = item.name = name
            taken.add(name)
    for node in model.graph.node:
        for index, name in enumerate(node.input):
            node.input[index] = names.get(name, name)


def _strip(model: onnx.ModelProto) -> None:
    """Remove what describes the tracing, not the network: stack traces with local paths, versions, graph signatures."""
    model.producer_name = model.producer_version = ""
    model.doc_string = ""
    del model.metadata_props[:]
    del model.graph.metadata_props[:]
    model.graph.doc_string = ""
    described = [*model.graph.node, *model.graph.initializer, *model.graph.input, *model.graph.output]
    for item in described:
        item.doc_string = ""
        del item.metadata_props[:]
    for node in model.graph.node:
        node.name = ""
