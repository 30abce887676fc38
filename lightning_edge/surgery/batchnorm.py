"""Batch norms of a captured graph: seen by the weights in training, then folded into them or a scale and a shift."""

from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node
from torch.fx.node import Argument

from lightning_edge.surgery.capture import eliminate_dead_code_, operand, tensor_at

_aten = torch.ops.aten
BATCH_NORM = _aten.batch_norm.default
CONVOLUTIONS = (_aten.conv1d.default, _aten.conv1d.padding, _aten.conv2d.default, _aten.conv2d.padding)
WEIGHTED = (*CONVOLUTIONS, _aten.linear.default)


def scale_weights_(graph_module: GraphModule, *, keep: Collection[str] = ()) -> dict[Node, Node]:
    """Make each convolution or linear layer before a batch norm compute with the weight of the folded network.

    y = conv(x, w) + b becomes y = conv(x, w * s) / s + b with s = gamma / sqrt(running_var + eps), so that w * s, the
    weight of the deployed network, can be fake-quantized (Jacob et al. 2018, arXiv:1712.05877, sec. 3.2, in the
    one-pass form of torch's ``nniqat.ConvBn2d``). The norm itself stays, with its own eps and momentum. Where gamma is
    zero, s is taken as one: the norm then gives beta whatever comes in, and nothing is divided by zero.

    Args:
        graph_module: A graph in training mode.
        keep: Names of the weights of layers that stay as they are.

    Returns:
        Each rewritten layer and its batch norm.

    >>> from lightning_edge.surgery.capture import export_graph
    >>> from torch import nn
    >>> network = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2))
    >>> scale_weights_(export_graph(network, (torch.zeros(2, 1, 4, 4),), training=True))
    {conv2d: batch_norm}
    """
    pairs = {}
    for norm in graph_module.graph.find_nodes(op="call_function", target=BATCH_NORM):
        layer = norm.args[0]
        if not is_foldable(layer, norm) or weight_of(layer.args[1]) in keep:
            continue
        _rewrite(graph_module.graph, layer, norm)
        pairs[layer] = norm
    eliminate_dead_code_(graph_module)
    return pairs


@torch.no_grad()
def fold_(graph_module: GraphModule, pairs: Mapping[str, str]) -> None:
    """Put each batch norm that :func:`scale_weights_` has prepared into the weight and the bias of its layer.

    Args:
        graph_module: The graph, in evaluation mode; its tensors are replaced, not written to.
        pairs: Layer to batch norm, by node name.
    """
    nodes = {node.name: node for node in graph_module.graph.nodes}
    for layer, norm in ((nodes[key], nodes[value]) for key, value in pairs.items()):
        fold_into_(graph_module, layer, norm, bias=norm.meta["folded_bias"])
    eliminate_dead_code_(graph_module)


@torch.no_grad()
def fold_into_(graph_module: GraphModule, layer: Node, norm: Node, *, bias: str | None) -> None:
    """Put the batch norm behind a layer, as :func:`is_foldable` finds it, into the layer's weight and bias.

    Args:
        graph_module: In evaluation mode; its tensors are replaced, not written to.
        layer: Its weight may go through a fake quantizer.
        norm: It is erased.
        bias: Name of the layer's own.
    """
    graph = graph_module.graph
    scale, shift = scale_and_shift(graph_module, norm)
    read = operand(layer, 1)
    name = weight_of(read)
    weight = tensor_at(graph_module, name)
    offset = shift if bias is None else tensor_at(graph_module, bias) * scale + shift
    reader = layer if read.op == "get_attr" else read
    with graph.inserting_before(reader):
        folded = new_constant(graph_module, f"{name}_folded", weight * scale.reshape(-1, *[1] * (weight.ndim - 1)))
    if reader is layer:
        layer.update_arg(1, folded)
    else:
        reader.args = (folded,)
    with graph.inserting_before(layer):
        constant = new_constant(graph_module, f"{name.removesuffix('weight')}bias_folded", offset)
    layer.args = (*layer.args[:2], constant, *layer.args[3:])  # tracing leaves out a bias that is None
    norm.replace_all_uses_with(layer)
    graph.erase_node(norm)


@torch.no_grad()
def scale_and_shift_(graph_module: GraphModule) -> None:
    """Replace every batch norm in evaluation by a product and a sum: two vectors instead of four, no weight touched."""
    graph = graph_module.graph
    for norm in graph.find_nodes(op="call_function", target=BATCH_NORM):
        if norm.args[5]:  # without running statistics it normalizes by the batch, in evaluation too
            continue
        scale, shift = scale_and_shift(graph_module, norm)
        shape = (-1, *[1] * (norm.meta["val"].ndim - 2))
        prefix = str(norm.args[3].target).removesuffix("running_mean")
        with graph.inserting_before(norm):
            factor = new_constant(graph_module, f"{prefix}scale", scale.reshape(shape))
            summand = new_constant(graph_module, f"{prefix}shift", shift.reshape(shape))
            product = graph.call_function(_aten.mul.Tensor, (norm.args[0], factor))
            total = graph.call_function(_aten.add.Tensor, (product, summand))
        for node in (product, total):
            node.meta = dict(norm.meta)
        norm.replace_all_uses_with(total)
        graph.erase_node(norm)
    eliminate_dead_code_(graph_module)


def scale_and_shift(graph_module: GraphModule, norm: Node) -> tuple[Tensor, Tensor]:
    """Return gamma / sqrt(var + eps) and beta - mean * that, of shape (channels,), of a batch norm in evaluation."""
    gamma, beta, mean, variance = (
        tensor_at(graph_module, value.target) if isinstance(value, Node) else None for value in norm.args[1:5]
    )
    epsilon = norm.args[7]
    assert mean is not None
    assert variance is not None
    assert isinstance(epsilon, float)
    deviation = torch.sqrt(variance + epsilon)
    scale = (torch.ones_like(mean) if gamma is None else gamma) / deviation
    return scale.detach(), ((0 if beta is None else beta) - mean * scale).detach()


def weight_of(node: Node) -> str:
    """Return the name of the parameter that a weight operand is computed from."""
    while node.op != "get_attr":
        node = operand(node)
    return str(node.target)


def new_constant(graph_module: GraphModule, name: str, value: Tensor) -> Node:
    """Add a buffer under the first free name that starts like ``name``, and a node that reads it."""
    owner_name, _, leaf = name.rpartition(".")
    owner, free = graph_module.get_submodule(owner_name), leaf
    while hasattr(owner, free):
        free = f"{leaf}_{sum(1 for key in vars(owner)['_buffers'] if key.startswith(leaf))}"
    owner.register_buffer(free, value)
    return graph_module.graph.get_attr(f"{owner_name}.{free}" if owner_name else free)


def is_foldable(layer: object, norm: Node) -> bool:
    """Whether a batch norm scales the channels of a layer whose output nothing else reads."""
    if not isinstance(layer, Node) or layer.target not in WEIGHTED or len(layer.users) != 1 or norm.args[3] is None:
        return False
    # A linear layer has its channels last, a batch norm second: the same only for inputs of two dimensions.
    same_channels = layer.target in CONVOLUTIONS or layer.meta["val"].ndim == 2
    operands = [value for value in layer.args[1:3] if value is not None]
    return same_channels and all(isinstance(node, Node) and node.op == "get_attr" for node in operands)


def _rewrite(graph: Graph, layer: Node, norm: Node) -> None:
    weight, bias = operand(layer, 1), layer.args[2] if len(layer.args) > 2 else None
    gamma, variance = norm.args[1], norm.args[4]
    along_output = [1, -1, *[1] * (layer.meta["val"].ndim - 2)]
    with graph.inserting_before(layer):
        deviation = graph.call_function(_aten.sqrt.default, (_call(graph, _aten.add.Scalar, variance, norm.args[7]),))
        scale = (
            _call(graph, _aten.reciprocal.default, deviation)
            if gamma is None
            else _call(graph, _aten.div.Tensor, gamma, deviation)
        )
        safe = _call(graph, _aten.masked_fill.Scalar, scale, _call(graph, _aten.eq.Scalar, scale, 0), 1.0)
        shape = [-1, *[1] * (weight.meta["val"].ndim - 1)]
        scaled = _call(graph, _aten.mul.Tensor, weight, _call(graph, _aten.reshape.default, safe, shape))
    scaled.meta = {"val": weight.meta["val"]}
    layer.update_arg(1, scaled)
    if bias is not None:
        layer.update_arg(2, None)
    with graph.inserting_before(norm):
        output = _call(graph, _aten.div.Tensor, layer, _call(graph, _aten.reshape.default, safe, along_output))
        if isinstance(bias, Node):
            output = _call(graph, _aten.add.Tensor, output, _call(graph, _aten.reshape.default, bias, along_output))
    norm.update_arg(0, output)
    norm.meta["folded_bias"] = bias.target if isinstance(bias, Node) else None


def _call(graph: Graph, target: Callable[..., Any], *args: Argument) -> Node:
    return graph.call_function(target, args)
