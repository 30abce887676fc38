"""A network's graph in the operators that XNNPACK runs: what it knows under another name is written so."""

import math
import sys
from collections.abc import Callable
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from lightning_edge.surgery.batchnorm import WEIGHTED, new_constant
from lightning_edge.surgery.capture import tensor_at

_aten = torch.ops.aten
_qd = torch.ops.quantized_decomposed


def use_delegated_operators_(graph_module: GraphModule) -> None:
    """Rewrite what XNNPACK's partitioner leaves to portable kernels, at the cost of a copy and of a further partition.

    * Every second row or column (the shortcut of ResNet's option A) is a depthwise convolution of 1 x 1 with a stride.
    * Average pools are global means, or depthwise convolutions of ones where they are quantized.
    * The mean over all positions is computed in float, with the same result: XNNPACK's own for integers writes beyond
      its memory when a batch is larger than the one before.
    * A flattening says its size, not that of the batch; max pools say their stride.
    * A weight that is also read by something else than a layer is two constants: XNNPACK takes the one it computes with
      into itself, and ends the process where it transposes it too.
    * Chunks are slices: split in a quantized network, the batch would become a constant.
    * PReLU is relu(x) - weight * relu(-x): XNNPACK's own ends the process.

    The numbers stay the same, integers too: the weights are ones.
    """
    rewrites: dict[object, Callable[[GraphModule, Node], None]] = {
        _aten.slice.Tensor: _stride,
        _aten.avg_pool2d.default: _pool,
        _aten.flatten.using_ints: _flatten,
        _aten.chunk.default: _slices,
        _aten.split.Tensor: _slices,
        _aten.split_with_sizes.default: _slices,
        _aten.prelu.default: _prelu,
        _aten.max_pool2d.default: _spell_out_stride,
    }
    for node in list(graph_module.graph.nodes):
        if node.target in rewrites:
            rewrites[node.target](graph_module, node)
    for node in graph_module.graph.find_nodes(op="call_function", target=_aten.mean.dim):
        _average_in_float(node)
    _part_shared_constants(graph_module)
    graph_module.graph.eliminate_dead_code()
    graph_module.recompile()


def _average_in_float(node: Node) -> None:
    reader = next(iter(node.users))
    shape = node.meta["val"].shape
    if _is_dequantized(node.args[0]) and reader.target is _qd.quantize_per_tensor.default:
        with node.graph.inserting_after(node):
            apart = node.graph.call_function(_aten.view.default, (node, [-1, *shape[1:]]))
        reader.replace_input_with(node, apart)


def _part_shared_constants(graph_module: GraphModule) -> None:
    for node in graph_module.graph.find_nodes(op="get_attr"):
        others = [reader for reader in node.users if reader.target not in WEIGHTED]
        for reader in others if len(others) < len(node.users) else others[1:]:
            with graph_module.graph.inserting_before(reader):
                value = tensor_at(graph_module, node.target).detach().clone()
                reader.replace_input_with(node, new_constant(graph_module, f"{node.name}_copy", value))


def _spell_out_stride(_: GraphModule, node: Node) -> None:
    if len(node.args) < 3 or not node.args[2]:
        node.args = (*node.args[:2], node.args[1], *node.args[3:])


def _prelu(graph_module: GraphModule, node: Node) -> None:
    source, weight = node.all_input_nodes
    slopes = tensor_at(graph_module, weight.target).detach().neg()
    with graph_module.graph.inserting_before(node):
        along = new_constant(graph_module, f"{node.name}_slope", slopes.view(-1, *[1] * (node.meta["val"].ndim - 2)))
        parts = [graph_module.graph.call_function(_aten.neg.default, (source,))]
        parts.append(graph_module.graph.call_function(_aten.relu.default, (parts[-1],)))
        parts.append(graph_module.graph.call_function(_aten.mul.Tensor, (parts[-1], along)))
        positive = graph_module.graph.call_function(_aten.relu.default, (source,))
    for part in (*parts, positive):
        part.meta = dict(node.meta)
    node.target, node.args = _aten.add.Tensor, (positive, parts[-1])


def _slices(_: GraphModule, node: Node) -> None:
    axis = node.args[2] if len(node.args) > 2 else node.kwargs.get("dim", 0)
    assert isinstance(axis, int)
    sizes = [part.shape[axis] for part in node.meta["val"]]
    if not all(isinstance(size, int) for size in sizes):
        return
    ends = list(accumulate(sizes, initial=0))
    for part in list(node.users):
        index = part.args[1]
        assert isinstance(index, int)
        part.target, part.args = _aten.slice.Tensor, (node.args[0], axis, ends[index], ends[index + 1])


def _flatten(_: GraphModule, node: Node) -> None:
    shape = node.meta["val"].shape
    if node.args[1:] == (1,) and all(isinstance(size, int) for size in shape[1:]):
        node.target, node.args = _aten.view.default, (node.args[0], [-1, *shape[1:]])


def _pool(graph_module: GraphModule, node: Node) -> None:
    source, kernel, stride, padding, ceil, counts_padding, divisor = (*node.args, *(None,) * 6)[:7]
    kernel = _pair(kernel)
    stride, padding = _pair(stride or kernel), _pair(padding or 0)
    before = source.meta.get("val") if isinstance(source, Node) else None
    if ceil or divisor or node.meta["val"].ndim != 4 or (any(padding) and counts_padding is False):
        return
    if tuple(node.meta["val"].shape[2:]) == (1, 1) and before is not None and [*before.shape[2:]] == kernel:
        node.target, node.args = _aten.mean.dim, (source, [2, 3], True)
    elif _is_dequantized(source):
        _convolve(graph_module, node, 1 / math.prod(kernel), kernel=kernel, stride=stride, padding=padding)
    else:
        node.args = (source, kernel, stride, padding, False, bool(any(padding)))


def _stride(graph_module: GraphModule, node: Node) -> None:
    given: list[Any] = [*node.args, *(0, 0, sys.maxsize, 1)[len(node.args) - 1 :]]
    source, axis, start, end, step = given
    value = node.meta["val"]
    if start not in (0, None) or (end is not None and end < sys.maxsize):
        return
    if step == 1:
        node.replace_all_uses_with(source)
    elif value.ndim == 4 and axis in (2, 3) and value.is_floating_point():
        stride = [step if axis == index else 1 for index in (2, 3)]
        _convolve(graph_module, node, 1.0, kernel=[1, 1], stride=stride, padding=[0, 0])


def _convolve(
    graph_module: GraphModule, node: Node, factor: float, *, kernel: list[int], stride: list[int], padding: list[int]
) -> None:
    """Make the node a depthwise convolution with the same weight everywhere."""
    channels = int(node.meta["val"].shape[1])
    with graph_module.graph.inserting_before(node):
        weight = _weight(graph_module, node, torch.ones(channels, 1, *kernel), factor)
    node.args = (node.args[0], weight, None, stride, padding, [1, 1], channels)
    node.target = _aten.conv2d.default


def _weight(graph_module: GraphModule, node: Node, ones: Tensor, factor: float) -> Node:
    if not _is_dequantized(node.args[0]):
        return new_constant(graph_module, f"{node.name}_weight", (ones * factor).to(node.meta["val"].dtype))
    constants = [
        new_constant(graph_module, f"{node.name}_{part}", tensor)
        for part, tensor in (
            ("int8", ones.to(torch.int8)),
            ("scale", torch.full((len(ones),), factor)),
            ("zero_point", torch.zeros(len(ones), dtype=torch.int64)),
        )
    ]
    limits = (0, -127, 127, torch.int8)
    return graph_module.graph.call_function(_qd.dequantize_per_channel.default, (*constants, *limits))


def _is_dequantized(value: object) -> bool:
    return isinstance(value, Node) and value.target is _qd.dequantize_per_tensor.default


def _pair(value: object) -> list[int]:
    values = value if isinstance(value, list | tuple) else [value]
    return [*values] * (2 // len(values))
