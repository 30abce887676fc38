"""Which values of a graph are quantized: fake quantizers into it, and integers in their place."""

from collections.abc import Collection, Iterator, Mapping

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from lightning_edge.surgery.batchnorm import WEIGHTED, new_constant, weight_of
from lightning_edge.surgery.capture import GUARDS, eliminate_dead_code_, tensor_at
from lightning_edge.surgery.exact_scales import odd_requantization
from lightning_edge.surgery.quantizers import ActivationQuantizer, Quantizer, WeightQuantizer
from lightning_edge.surgery.shared_integers import shared_integers

_aten = torch.ops.aten
_qd = torch.ops.quantized_decomposed
_LARGEST_BIAS = 2**30
_ACTIVATIONS = (_aten.relu.default, _aten.relu_.default, _aten.hardtanh.default, _aten.hardtanh_.default)
_SUMS = (_aten.add.Tensor, _aten.add_.Tensor, _aten.mul.Tensor, _aten.mul_.Tensor)
_JOINTS = (_aten.cat.default, _aten.concat.default, _aten.concatenate.default)
_AVERAGES = (_aten.adaptive_avg_pool2d.default, _aten.avg_pool2d.default, _aten.mean.dim)
_NAME = "fake_quantizer_"
_DROPOUTS = (
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
        )
    names: dict[str, str] = {}
    for index, (value, is_weight) in enumerate(values.items()):
        name = weight_of(value) if is_weight else value.name
        path = f"{_NAME}{index}"
        quantizer: Quantizer = (
            WeightQuantizer(bits=(bits or {}).get(name, 8), learned=learned)
            if is_weight
            else ActivationQuantizer(learned=learned)
        )
        graph_module.add_submodule(path, quantizer)
        with graph_module.graph.inserting_after(value):
            call = graph_module.graph.call_module(path, (value,))
        readers = [user for user in value.users if user is not call and user.target != GUARDS]
        for reader in readers:
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
        while data.op != "call_module" and (_selects(data) or data.target in _DROPOUTS):
            data = data.args[0]
        result, _ = _result(nodes[pairs[layer.name]] if layer.name in pairs else layer)
        output = next((user for user in result.users if _is_fake_quantizer(user)), None)
        if _is_fake_quantizer(data) and _is_fake_quantizer(layer.args[1]) and output is not None:
            yield str(data.target), str(layer.args[1].target), str(output.target)


def _is_fake_quantizer(node: Node) -> bool:
    return node.op == "call_module" and str(node.target).startswith(_NAME)


def remove_training_(graph_module: GraphModule) -> None:
    """Remove what does nothing in evaluation: dropout, the counters of batch norms, and the guards of input sizes."""
    graph = graph_module.graph
    for node in list(graph.nodes):
        if node.op == "call_function" and (node.target in _DROPOUTS or _is_counter(node)):
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)
        elif node.target == GUARDS:
            graph.erase_node(node)
    eliminate_dead_code_(graph_module)
    graph_module.delete_all_unused_submodules()


@torch.no_grad()
def replace_fake_quantizers_(graph_module: GraphModule) -> None:
    """Put integers in the place of fake quantizers: int8 constants for weights, quantize-dequantize for activations.

    The scales are those that the fake quantizers computed with, to the bit; but a weight of shared values with a scale
    per channel gets the integers of its codebook, see :mod:`lightning_edge.surgery.shared_integers`. What only matters
    in training goes.
    """
    graph = graph_module.graph
    remove_training_(graph_module)
    around = _steps_around_weights(graph_module)
    for node in graph.find_nodes(op="call_module"):
        quantizer = graph_module.get_submodule(str(node.target))
        assert isinstance(quantizer, WeightQuantizer | ActivationQuantizer)
        with graph.inserting_before(node):
            is_weight = isinstance(quantizer, WeightQuantizer)
            new = (
                _integer_weight(graph_module, node, quantizer, around.get(str(node.target)))
                if is_weight
                else _pair(node, quantizer)
            )
        node.replace_all_uses_with(new)
        graph.erase_node(node)
    for node in list(graph.nodes):
        if _selects(node) and _is_dequantized(node.args[0]):
            _repeat_pair(node)
        elif node.target in WEIGHTED:
            _round_bias(graph_module, node)
        elif node.target in _JOINTS:
            _share_scale(node)
    for node in filter(_is_dequantized, list(graph.nodes)):
        _copy_for_each_reader(node)
    eliminate_dead_code_(graph_module)
    graph_module.delete_all_unused_submodules()
    _forget_unused_tensors(graph_module)


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
        elif node.target in _SUMS and node not in ours and all(_is_image(operand) for operand in node.args[:2]):
            yield from (*(_source(operand) for operand in node.args[:2]), _result(node))
        elif node.target in _AVERAGES:
            yield from (_source(node.args[0]), _result(node))
        elif node.target in _JOINTS and _is_image(node):
            yield node, False


def _source(value: Node) -> tuple[Node, bool]:
    """Where this operand was made: what only selects values, and dropout, is seen through."""
    while _selects(value) or value.target in _DROPOUTS:
        value = value.args[0]  # type: ignore[assignment]
    while (result := _result(value)[0]) is not value:
        value = result
    return value, False


def _result(value: Node) -> tuple[Node, bool]:
    """The value, or the activation function behind it where that is its only reader: runtimes fuse the two."""
    readers = list(value.users)
    return (readers[0] if len(readers) == 1 and readers[0].target in _ACTIVATIONS else value), False


def _selects(node: Node) -> bool:
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
    while isinstance(value, Node) and value.target is _aten.mul.Tensor and value.args[0].op == "get_attr":  # type: ignore[union-attr]
        value = value.args[0]
    return isinstance(value, Node) and value.op == "get_attr"


def _integer_weight(
    graph_module: GraphModule, node: Node, quantizer: WeightQuantizer, around: tuple[float, float] | None
) -> Node:
    value = node.args[0]
    assert isinstance(value, Node)
    assert value.op == "get_attr", "weights are constants once batch norms are folded"
    name = str(value.target).removesuffix("_folded")
    integers, scale = _rounded(tensor_at(graph_module, value.target).detach(), quantizer, around)
    zero_point = torch.zeros_like(scale, dtype=torch.int32)
    constants = [
        new_constant(graph_module, f"{name}_{part}", tensor)
        for part, tensor in (("int8", integers), ("scale", scale), ("zero_point", zero_point))
    ]
    limits = (0, -127, 127, torch.int8)  # integers of fewer bits too: runtimes have kernels for these
    return graph_module.graph.call_function(_qd.dequantize_per_channel.default, (*constants, *limits))


def _rounded(weight: Tensor, quantizer: WeightQuantizer, around: tuple[float, float] | None) -> tuple[Tensor, Tensor]:
    """Return integers and steps of a weight; ``around``: the steps of its layer's input and output."""
    shared = shared_integers(weight, largest=quantizer.quant_max)
    if shared is None:
        scale = quantizer.steps_of(weight)
        zero_point = torch.zeros_like(scale, dtype=torch.int32)
        limits = (0, quantizer.quant_min, quantizer.quant_max, torch.int8)
        return _qd.quantize_per_channel(weight, scale, zero_point, *limits), scale
    integers, scale = shared
    if quantizer.fixed and around is not None:
        scale = odd_requantization(scale, input_scale=around[0], output_scale=around[1])
    return integers, scale


def _steps_around_weights(graph_module: GraphModule) -> dict[str, tuple[float, float]]:
    """Return the steps of the input and the output of each layer that has both, by the path of its quantizer."""
    found = requantized(graph_module, {})
    return {weight: (_scale_at(graph_module, data), _scale_at(graph_module, out)) for data, weight, out in found}


def _scale_at(graph_module: GraphModule, path: str) -> float:
    return float(tensor_at(graph_module, f"{path}.scale"))


def _round_bias(graph_module: GraphModule, layer: Node) -> None:
    """Give the bias the values that runtimes store: integers of scale s_x * s_w, that of the accumulator.

    Without it file and graph differ by up to half a unit of the accumulator, by a rounded output here and there, and
    on ResNet-20 by one label in two hundred. A channel whose bias overflows int32 at that scale has next to no weight
    (pruned, or all zeros: its scale is 1e-7), and loses nothing by coarser integers: its weight scale is raised.
    """
    data, weight, bias = (*layer.args[:3], None)[:3]
    if not (_is_dequantized(data) and _is_integer_weight(weight) and isinstance(bias, Node) and bias.op == "get_attr"):
        return
    integers, scale = (tensor_at(graph_module, constant.target) for constant in weight.args[:2])  # type: ignore[union-attr]
    values = tensor_at(graph_module, bias.target).detach()
    excess = (values.abs() / (_step(data) * scale.double()) / _LARGEST_BIAS).clamp(min=1.0)
    integers.copy_(torch.round(integers / excess.reshape(-1, *[1] * (integers.ndim - 1))))
    scale.mul_(excess)
    step = _step(data) * scale.double()
    name = str(bias.target).removesuffix("_folded")
    with layer.graph.inserting_before(layer):
        stored = new_constant(graph_module, f"{name}_rounded", (torch.round(values / step) * step).to(values.dtype))
    layer.update_arg(2, stored)


def _step(data: object) -> float:
    return float(data.args[1])  # type: ignore[attr-defined]


def _is_integer_weight(value: object) -> bool:
    return isinstance(value, Node) and value.target is _qd.dequantize_per_channel.default


def _pair(node: Node, quantizer: ActivationQuantizer) -> Node:
    limits = (float(quantizer.scale), int(quantizer.zero_point), quantizer.quant_min, quantizer.quant_max, torch.int8)
    integers = node.graph.call_function(_qd.quantize_per_tensor.default, (node.args[0], *limits))
    return node.graph.call_function(_qd.dequantize_per_tensor.default, (integers, *limits))


def _repeat_pair(node: Node) -> None:
    """Quantize a selection of quantized values with their scale: it changes none, and runtimes stay in integers."""
    limits = node.args[0].args[1:]  # type: ignore[union-attr]
    with node.graph.inserting_after(node):
        integers = node.graph.call_function(_qd.quantize_per_tensor.default, (node, *limits))
    with node.graph.inserting_after(integers):
        pair = node.graph.call_function(_qd.dequantize_per_tensor.default, (integers, *limits))
    node.replace_all_uses_with(pair, delete_user_cb=lambda user: user is not integers)


def _share_scale(joint: Node) -> None:
    """Quantize what is concatenated once more, with the scale of the result: XNNPACK joins integers of one scale."""
    reader = next(iter(joint.users))
    if reader.target is not _qd.quantize_per_tensor.default:
        return
    limits = reader.args[1:]
    for value in dict.fromkeys(joint.args[0]):  # type: ignore[arg-type]
        assert isinstance(value, Node)
        if _is_dequantized(value) and value.args[1:] == limits:
            continue
        with joint.graph.inserting_before(joint):
            integers = joint.graph.call_function(_qd.quantize_per_tensor.default, (value, *limits))
            pair = joint.graph.call_function(_qd.dequantize_per_tensor.default, (integers, *limits))
        joint.replace_input_with(value, pair)


def _copy_for_each_reader(node: Node) -> None:
    """Let nobody share a dequantization, as torchao's ``convert_pt2e`` does: partitioners take it with its reader."""
    for reader in list(node.users)[1:]:
        with node.graph.inserting_before(reader):
            reader.replace_input_with(node, node.graph.node_copy(node))


def _is_dequantized(value: object) -> bool:
    return isinstance(value, Node) and value.target is _qd.dequantize_per_tensor.default


def _is_counter(node: Node) -> bool:
    return node.target is _aten.add_.Tensor and str(node.args[0].target).endswith("num_batches_tracked")  # type: ignore[union-attr]


def _forget_unused_tensors(graph_module: GraphModule) -> None:
    used = {str(node.target) for node in graph_module.graph.find_nodes(op="get_attr")}
    for path, part in list(graph_module.named_modules()):
        for group in ("_parameters", "_buffers"):
            for key in [key for key in vars(part)[group] if (f"{path}.{key}" if path else key) not in used]:
                del vars(part)[group][key]
