"""Means over all positions in the form that every runtime has an integer kernel for."""

import torch
from torch.fx import GraphModule

_aten = torch.ops.aten
_quantize = torch.ops.quantized_decomposed.quantize_per_tensor.default
_dequantize = torch.ops.quantized_decomposed.dequantize_per_tensor.default


def keep_positions_(graph_module: GraphModule) -> None:
    """Let ``x.mean((2, 3))`` keep its two dimensions, and flatten them behind it: a global average pool.

    Args:
        graph_module: Plain or converted; where the mean is quantized, the flattened values have the same scale.

    >>> from lightning_edge.surgery.capture import export_graph
    >>> class Net(torch.nn.Module):
    ...     def forward(self, x): return x.mean((2, 3))
    >>> graph = export_graph(Net(), (torch.ones(2, 3, 4, 4),), training=False); keep_positions_(graph)
    >>> graph(torch.ones(2, 3, 4, 4)).shape
    torch.Size([2, 3])
    """
    graph = graph_module.graph
    for node in graph.find_nodes(op="call_function", target=_aten.mean.dim):
        source, axes = node.args[:2]
        rank = node.meta["val"].ndim + len(axes)
        if rank != 4 or sorted(axis % 4 for axis in axes) != [2, 3] or (len(node.args) > 2 and node.args[2]):
            continue
        node.args = (source, [2, 3], True)
        quantized = [user for user in node.users if user.target is _quantize]
        last = next(iter(quantized[0].users)) if len(quantized) == len(node.users) == 1 else node
        with graph.inserting_after(last):
            flat = graph.call_function(_aten.flatten.using_ints, (last, 1))
        flat.meta = {"val": node.meta["val"]}
        result = flat
        if last is not node:
            limits = last.args[1:]
            with graph.inserting_after(flat):
                integers = graph.call_function(_quantize, (flat, *limits))
            with graph.inserting_after(integers):
                result = graph.call_function(_dequantize, (integers, *limits))
        last.replace_all_uses_with(result, delete_user_cb=lambda user, flat=flat: user is not flat)
    graph_module.recompile()
