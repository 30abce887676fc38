"""A network as an ExecuTorch program that runs on XNNPACK."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node
from torch.fx.passes.infra.pass_base import PassResult

from lightning_edge.export.delegates import use_delegated_operators_
from lightning_edge.export.half_precision import compute_in_half_
from lightning_edge.export.signature import flatten_
from lightning_edge.surgery.calls import as_arguments, two_rows
from lightning_edge.surgery.capture import keep_random_state
from lightning_edge.surgery.conversion import copy_for_each_reader
from lightning_edge.surgery.post_training import SCHEME
from lightning_edge.surgery.quantization import deployed

MAX_BATCH = 64
_SIZE, _CAST = "aten::sym_size.int", "dim_order_ops::_to_dim_order_copy"  # a cast of the inputs costs little


def to_executorch(module: nn.Module, example_inputs: Any) -> bytes:
    """Return the network in evaluation mode as an ExecuTorch program (``.pte``), lowered to XNNPACK.

    A captured network becomes its int8 network, one that was quantized to ``"fp16"`` computes in float16. A program
    plans its memory ahead, for a batch of any size from 1 to :data:`MAX_BATCH`; a larger one is refused by the runtime.
    Inputs must be contiguous. The same network gives the same bytes.

    Args:
        module: The network, plain or captured by :func:`~lightning_edge.surgery.quantization.capture_`; not changed.
        example_inputs: As :func:`~lightning_edge.export.onnx.to_onnx` takes them.

    Warns:
        UserWarning: If operators are left that XNNPACK does not run, with their names.

    Raises:
        ImportError: If ExecuTorch is not installed.
        ValueError: If the network cannot be traced, or its observers have seen no data.
    """
    inputs = two_rows(as_arguments(module, example_inputs)).first(MAX_BATCH)
    graph_module = deployed(module, inputs, split_norms=False)
    use_delegated_operators_(graph_module)
    if vars(module).get(SCHEME) == "fp16":
        compute_in_half_(graph_module)
    batch = torch.export.Dim("batch", min=1, max=MAX_BATCH)
    shapes = tuple({0: batch} if value.ndim and len(value) == inputs.rows else None for value in inputs.tensors)
    names = dict(zip(("input_names", "output_names"), flatten_(graph_module, inputs), strict=True))
    names["batched_inputs"] = tuple(name for name, sizes in zip(names["input_names"], shapes, strict=True) if sizes)
    with _quiet(), keep_random_state():
        program, left = _lower(graph_module, tuple(inputs.tensors), shapes, names)
    if left and vars(module).get(SCHEME) in (None, "int8_static", "fp16"):
        warnings.warn(
            f"every operator must run in XNNPACK to be fast, got {left} that it leaves to portable kernels, in"
            f" {type(module).__name__}",
            stacklevel=2,
        )
    return program


def _lower(
    graph_module: GraphModule, inputs: tuple[Tensor, ...], shapes: tuple[object, ...], names: dict[str, tuple[str, ...]]
) -> tuple[bytes, list[str]]:
    """Return the program, and the operators in it that XNNPACK does not run."""
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
        lowered = to_edge_transform_and_lower(
            program,
            transform_passes=[_copy_dequantizations],
            partitioner=[XnnpackPartitioner()],
            constant_methods=constants,
        )
        nodes = [node for node in lowered.exported_program().graph.nodes if node.op == "call_function"]
        left = {node.target.name() for node in nodes if hasattr(node.target, "_schema") and not _is_number(node)}
        return bytes(lowered.to_executorch().buffer), sorted(left - {_SIZE, _CAST})


def _copy_dequantizations(graph_module: GraphModule) -> PassResult:
    """Let nobody share a dequantization once operators are several, as a softplus: XNNPACK mixes up the layouts."""
    for node in graph_module.graph.find_nodes(op="call_function", target=_dequantize()):
        copy_for_each_reader(node)
    graph_module.recompile()
    return PassResult(graph_module, True)


def _dequantize() -> Any:
    from executorch.exir.dialects._ops import ops

    return ops.edge.quantized_decomposed.dequantize_per_tensor.default


def _is_number(node: Node) -> bool:
    """Whether this makes a single number, as 3 * x does of its 3: it costs nothing."""
    value = node.meta.get("val")
    return isinstance(value, Tensor) and value.ndim == 0


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep back what ExecuTorch and torch say about each other's deprecations while a network is lowered."""
    with warnings.catch_warnings():
        # No code of the user's runs here, so that none of these could be mended by one.
        for category in (DeprecationWarning, FutureWarning):
            warnings.simplefilter("ignore", category)
        warnings.filterwarnings("ignore", message="TF32 acceleration on top of oneDNN", category=UserWarning)
        yield
