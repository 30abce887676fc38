"""A graph that computes in half precision, and takes and returns float32."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Graph, GraphModule, Node

from lightning_edge.surgery.batchnorm import BATCH_NORM, fold_into_, is_foldable, scale_and_shift_

_cast = torch.ops.aten.to.dtype


@torch.no_grad()
def compute_in_half_(graph_module: GraphModule) -> None:
    """Make a graph in evaluation mode compute in float16, as ExecuTorch's XNNPACK does on processors that have it.

    Batch norms are folded first, or made a scale and a shift, in float32: their variances may lie outside float16.

    Raises:
        ValueError: If a weight is larger than float16 holds, or has more bits than it: the layer was kept.
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
    for part in graph_module.modules():
        _halve_(part)
    _cast_around_(graph_module.graph)
    graph_module.recompile()


def _halve_(part: nn.Module) -> None:
    """Replace the tensors of a module, which are the live network's too."""
    tensors: dict[str, Tensor | None]
    for tensors, wrap in ((vars(part)["_parameters"], nn.Parameter), (vars(part)["_buffers"], Tensor.detach)):
        for name, tensor in tensors.items():
            if tensor is not None and tensor.is_floating_point():
                tensors[name] = wrap(tensor.detach().half())


def _cast_around_(graph: Graph) -> None:
    """Compute in float16 where float32 is spelled out, and cast what comes in and goes out."""
    for node in list(graph.nodes):
        node.args = torch.fx.node.map_aggregate(node.args, _half_type)
        node.kwargs = torch.fx.node.map_aggregate(node.kwargs, _half_type)
        if node.op == "placeholder" and _is_float(node):
            with graph.inserting_after(node):
                inside = graph.call_function(_cast, (node, torch.float16))
            node.replace_all_uses_with(inside, delete_user_cb=lambda user, inside=inside: user is not inside)
            inside.meta = dict(node.meta)
    output = graph.output_node()
    with graph.inserting_before(output):
        output.args = torch.fx.map_arg(
            output.args, lambda node: graph.call_function(_cast, (node, torch.float32)) if _is_float(node) else node
        )


def _half_type(argument: Any) -> Any:
    return torch.float16 if argument is torch.float32 else argument


def _is_float(node: Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, Tensor) and value.dtype == torch.float32
