"""Which values of a graph are quantized: fake quantizers into it."""

from collections.abc import Collection, Iterator, Mapping

import torch
from torch.fx import GraphModule, Node

from lightning_edge.surgery.batchnorm import WEIGHTED, weight_of
from lightning_edge.surgery.capture import GUARDS, operand
from lightning_edge.surgery.quantizers import ActivationQuantizer, Quantizer, WeightQuantizer

_aten = torch.ops.aten
_ACTIVATIONS = (_aten.relu.default, _aten.relu_.default, _aten.hardtanh.default, _aten.hardtanh_.default)
_SUMS = (_aten.add.Tensor, _aten.add_.Tensor, _aten.mul.Tensor, _aten.mul_.Tensor)
JOINTS = (_aten.cat.default, _aten.concat.default, _aten.concatenate.default)
_AVERAGES = (_aten.adaptive_avg_pool2d.default, _aten.avg_pool2d.default, _aten.mean.dim)
_NAME = "fake_quantizer_"
DROPOUTS = (
    _aten.dropout.default,
    _aten.dropout_.default,
    _aten.feature_dropout.default,
    _aten.feature_dropout_.default,
)
# Operators whose result holds only values of their input, and so is quantized when that is.
_SELECTING = (
    _aten.relu.default,
    _aten.relu_.default,
    _aten.max_pool1d.default,
    _aten.max_pool2d.default,
    _aten.flatten.using_ints,
    _aten.view.default,
    _aten.reshape.default,
    _aten.permute.default,
    _aten.transpose.int,
    _aten.squeeze.default,
    _aten.squeeze.dim,
    _aten.squeeze.dims,
    _aten.unsqueeze.default,
    _aten.slice.Tensor,
    _aten.select.int,
)


def insert_fake_quantizers_(
    graph_module: GraphModule,
    pairs: Mapping[Node, Node],
    *,
    keep: Collection[str] = (),
    bits: Mapping[str, int] | None = None,
    learned: bool = False,
) -> dict[str, str]:
    """Insert a fake quantizer behind every value that the int8 network holds as an integer.

    A value is quantized once, where it is made, for all its readers; what only selects values needs no second quantizer
    in training (torchao's XNNPACK quantizer shares one, whose moving average then mixes the ranges before and after).

    Args:
        graph_module: A graph in training mode.
        pairs: Layer to the batch norm behind it, from :func:`~lightning_edge.surgery.batchnorm.scale_weights_`.
        keep: Names of the weights of layers that stay in float.
        bits: Name of a weight to its bits; 8 where there is none.
        learned: Whether steps are learned.

    Returns:
        Name of each observer to the path of its module in the graph.

    Raises:
        ValueError: If there is nothing to quantize.
    """
    values = dict(_quantized_values(graph_module, pairs, keep))
    if not any(is_weight for is_weight in values.values()):
        raise ValueError(
            "network must have a convolution (1-D, 2-D) or linear layer to quantize, got none in its graph"
            + (f" beside those of keep, {sorted(keep)[:6]}" if keep else "")
            + ": weights that are computed, as by weight_norm, stay in float (remove_parametrizations makes them plain)"
        )
    names: dict[str, str] = {}
    for index, (value, is_weight) in enumerate(values.items()):
        name = weight_of(value) if is_weight else value.name
        path = f"{_NAME}{index}"
        quantizer: Quantizer = (
            WeightQuantizer(bits=(bits or {}).get(name, 8), learned=learned)
            if is_weight
            else ActivationQuantizer(name, learned=learned)
        )
        graph_module.add_submodule(path, quantizer)
        with graph_module.graph.inserting_after(value):
            call = graph_module.graph.call_module(path, (value,))
        for reader in list(value.users):
            # An embedding that is tied to the weight, or an output, reads it as it is.
            if reader is not call and reader.target != GUARDS and (not is_weight or reader.target in WEIGHTED):
                reader.replace_input_with(value, call)
        names[f"{name}.{value.name}" if name in names else name] = path
    graph_module.recompile()
    return names


def requantized(graph_module: GraphModule, pairs: Mapping[str, str]) -> Iterator[tuple[str, str, str]]:
    """Yield the paths of the fake quantizers of each layer's input, weight and output, where it has all three.

    Args:
        graph_module: As :func:`insert_fake_quantizers_` left it.
        pairs: Layer to the batch norm behind it, by node name.
    """
    nodes = {node.name: node for node in graph_module.graph.nodes}
    for layer in graph_module.graph.nodes:
        if layer.target not in WEIGHTED:
            continue
        data = layer.args[0]
        while data.op != "call_module" and (selects(data) or data.target in DROPOUTS):
            data = data.args[0]
        result, _ = _result(nodes[pairs[layer.name]] if layer.name in pairs else layer)
        output = next((user for user in result.users if _is_fake_quantizer(user)), None)
        if _is_fake_quantizer(data) and _is_fake_quantizer(layer.args[1]) and output is not None:
            yield str(data.target), str(layer.args[1].target), str(output.target)


def _is_fake_quantizer(node: Node) -> bool:
    return node.op == "call_module" and str(node.target).startswith(_NAME)


def _quantized_values(
    graph_module: GraphModule, pairs: Mapping[Node, Node], keep: Collection[str]
) -> Iterator[tuple[Node, bool]]:
    """Yield each value to quantize and whether it is a weight, inputs of an operator before its result."""
    calls = [node for node in graph_module.graph.nodes if node.op == "call_function" and _is_float(node)]
    ours = {norm.args[0] for norm in pairs.values()}  # the bias that scale_weights_ adds
    for node in calls:
        if node.target in WEIGHTED and _is_weight(node.args[1]):
            if weight_of(node.args[1]) in keep:
                continue
            yield from (_source(node.args[0]), (node.args[1], True), _result(pairs.get(node, node)))
        elif node.target in _SUMS and node not in ours and all(_is_image(value) for value in node.args[:2]):
            yield from (*(_source(operand(node, index)) for index in (0, 1)), _result(node))
        elif node.target in _AVERAGES:
            yield from (_source(node.args[0]), _result(node))
        elif node.target in JOINTS and _is_image(node):
            yield node, False


def _source(value: Node) -> tuple[Node, bool]:
    """Where this operand was made: what only selects values, and dropout, is seen through."""
    while selects(value) or value.target in DROPOUTS:
        value = operand(value)
    while (result := _result(value)[0]) is not value:
        value = result
    return value, False


def _result(value: Node) -> tuple[Node, bool]:
    """The value, or the activation function behind it where that is its only reader: runtimes fuse the two."""
    readers = list(value.users)
    return (readers[0] if len(readers) == 1 and readers[0].target in _ACTIVATIONS else value), False


def selects(node: Node) -> bool:
    """Whether each value of the result is one of the input, or zero, which every scale holds exactly."""
    pads_zeros = node.target is _aten.pad.default and tuple(node.args[2:]) in (
        (),
        ("constant",),
        ("constant", None),
        ("constant", 0),
    )
    return node.target in _SELECTING or pads_zeros


def _is_float(value: object) -> bool:
    fake = value.meta.get("val") if isinstance(value, Node) else None
    return isinstance(fake, torch.Tensor) and fake.is_floating_point()


def _is_image(value: object) -> bool:
    """Whether this operand is an activation: floats that are computed from the input, not a constant or a scalar."""
    return isinstance(value, Node) and value.op != "get_attr" and _is_float(value) and value.meta["val"].ndim > 1


def _is_weight(value: object) -> bool:
    while isinstance(value, Node) and value.target is _aten.mul.Tensor and operand(value).op == "get_attr":
        value = operand(value)
    return isinstance(value, Node) and value.op == "get_attr"
