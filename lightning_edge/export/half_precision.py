"""A graph that computes in half precision, and takes and returns float32."""

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from lightning_edge.surgery.batchnorm import BATCH_NORM, fold_into_, is_foldable, scale_and_shift_
from lightning_edge.surgery.capture import tensor_at

_cast = torch.ops.aten.to.dtype
_LARGEST = torch.finfo(torch.float16).max
_FILLING = (
    "masked_fill",
    "full",
    "full_like",
    "where",
    "clamp",
    "clamp_min",
    "clamp_max",
    "hardtanh",
    "pad",
    "scalar_tensor",
)
"""Operators whose numbers are limits, or masks: the largest of float16 serves them as well as a larger one."""


@torch.no_grad()
def compute_in_half_(graph_module: GraphModule) -> None:
    """Make a graph in evaluation mode compute in float16, as ExecuTorch's XNNPACK does on processors that have it.

    Batch norms are folded first, or made a scale and a shift, in float32: their variances may lie outside float16.
    Masks below its range, such as -1e9, become its smallest number.

    Raises:
        ValueError: If a weight has more bits than float16: the layer was kept; or if a number is larger than it holds.
    """
    for name, parameter in graph_module.named_parameters():
        if parameter.is_floating_point() and not torch.equal(parameter.half().float(), parameter.float()):
            raise ValueError(
                "keep must be empty for a .pte file of scheme 'fp16', which computes every layer in float16, got a"
                f" {name} that is not rounded to it: export to .onnx, or quantize without keep"
            )
    for norm in graph_module.graph.find_nodes(op="call_function", target=BATCH_NORM):
        layer = norm.args[0]
        if is_foldable(layer, norm) and not norm.args[5]:
            bias = layer.args[2] if len(layer.args) > 2 else None
            fold_into_(graph_module, layer, norm, bias=None if bias is None else str(bias.target))
    scale_and_shift_(graph_module)
    _halve_tensors_(graph_module)
    for node in list(graph_module.graph.nodes):
        _halve_node_(node)
    output = graph_module.graph.output_node()
    with graph_module.graph.inserting_before(output):
        output.args = torch.fx.map_arg(
            output.args,
            lambda node: node.graph.call_function(_cast, (node, torch.float32)) if _is_float(node) else node,
        )
    graph_module.recompile()


def _halve_tensors_(graph_module: GraphModule) -> None:
    """Replace what the graph reads: weights, buffers, constants of the forward; the tensors are the live network's."""
    for name in dict.fromkeys(str(node.target) for node in graph_module.graph.find_nodes(op="get_attr")):
        tensor = tensor_at(graph_module, name).detach()
        if not tensor.is_floating_point():
            continue
        if not bool((tensor <= _LARGEST).all()):
            raise ValueError(
                f"weights must be at most {_LARGEST:g} for a .pte file of scheme 'fp16', which computes in float16, got"
                f" {tensor.max():g} in {name}, batch norms folded: export to .onnx"
            )
        half = tensor.clamp(min=-_LARGEST).half()
        owner, _, leaf = name.rpartition(".")
        part = graph_module.get_submodule(owner)
        setattr(part, leaf, nn.Parameter(half, requires_grad=False) if leaf in part._parameters else half)


def _halve_node_(node: Node) -> None:
    """Compute in float16 where float32 is spelled out, comes in, or is what integers become."""
    schema = node.target._schema if isinstance(node.target, torch._ops.OpOverload) else None
    # Numbers of operators that give no floats are compared with, or count.
    fills = schema is None or schema.name.removeprefix("aten::") in _FILLING or not _is_float(node)

    def halved(argument: Any) -> Any:
        if isinstance(argument, float) and abs(argument) > _LARGEST and math.isfinite(argument):
            if not fills:
                raise ValueError(
                    f"numbers must be at most {_LARGEST:g} for a .pte file of scheme 'fp16', got {argument:g} in"
                    f" {node.target}: export to .onnx"
                )
            return math.copysign(_LARGEST, argument)
        return torch.float16 if argument is torch.float32 else argument

    node.args = torch.fx.node.map_aggregate(node.args, halved)
    node.kwargs = torch.fx.node.map_aggregate(node.kwargs, halved)
    begins = node.op in ("placeholder", "call_function") and not any(map(_is_float, node.all_input_nodes))
    if not (_is_float(node) and begins):
        return
    if schema is not None and any(argument.name == "dtype" for argument in schema.arguments):
        node.kwargs = {**node.kwargs, "dtype": torch.float16}
        return
    with node.graph.inserting_after(node):
        inside = node.graph.call_function(_cast, (node, torch.float16))
    node.replace_all_uses_with(inside, delete_user_cb=lambda user: user is not inside)
    inside.meta = dict(node.meta)


def _is_float(node: Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, Tensor) and value.dtype == torch.float32
