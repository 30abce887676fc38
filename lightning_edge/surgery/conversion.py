"""From fake quantizers to integers: int8 weights, quantize-dequantize pairs, biases of whole steps."""

from typing import TypeGuard

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from lightning_edge.surgery.batchnorm import WEIGHTED, new_constant
from lightning_edge.surgery.capture import GUARDS, eliminate_dead_code_, operand, tensor_at
from lightning_edge.surgery.fakequant import DROPOUTS, JOINTS, selects
from lightning_edge.surgery.quantizers import ActivationQuantizer, WeightQuantizer

_aten = torch.ops.aten
_qd = torch.ops.quantized_decomposed
_LARGEST_BIAS = 2**30


def remove_training_(graph_module: GraphModule) -> None:
    """Remove what does nothing in evaluation: dropout, the counters of batch norms, and the guards of input sizes."""
    graph = graph_module.graph
    for node in list(graph.nodes):
        if node.op == "call_function" and (node.target in DROPOUTS or _is_counter(node)):
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)
        elif node.target == GUARDS:
            graph.erase_node(node)
    eliminate_dead_code_(graph_module)
    graph_module.delete_all_unused_submodules()


@torch.no_grad()
def replace_fake_quantizers_(graph_module: GraphModule) -> None:
    """Put integers in the place of fake quantizers: int8 constants for weights, quantize-dequantize for activations.

    The scales are those that the fake quantizers computed with, to the bit. Those of 8-bit weights of shared values
    with a scale per channel follow the codebook as it is now, see :mod:`lightning_edge.surgery.shared_integers`:
    training looks for it before each epoch and each validation. What only matters in training goes.
    """
    graph = graph_module.graph
    remove_training_(graph_module)
    for node in graph.find_nodes(op="call_module"):
        quantizer = graph_module.get_submodule(str(node.target))
        assert isinstance(quantizer, WeightQuantizer | ActivationQuantizer)
        with graph.inserting_before(node):
            is_weight = isinstance(quantizer, WeightQuantizer)
            new = _integer_weight(graph_module, node, quantizer) if is_weight else _pair(node, quantizer)
        node.replace_all_uses_with(new)
        graph.erase_node(node)
    for node in list(graph.nodes):
        if selects(node) and _is_dequantized(node.args[0]):
            _repeat_pair(node)
        elif node.target in WEIGHTED:
            _round_bias(graph_module, node)
        elif node.target in JOINTS:
            _share_scale(node)
    for node in filter(_is_dequantized, list(graph.nodes)):
        copy_for_each_reader(node)
    eliminate_dead_code_(graph_module)
    graph_module.delete_all_unused_submodules()
    _forget_unused_tensors(graph_module)


def _integer_weight(graph_module: GraphModule, node: Node, quantizer: WeightQuantizer) -> Node:
    value = operand(node)
    assert value.op == "get_attr", "weights are constants once batch norms are folded"
    name = str(value.target).removesuffix("_folded")
    integers, scale = _rounded(tensor_at(graph_module, value.target).detach(), quantizer)
    zero_point = torch.zeros_like(scale, dtype=torch.int32)
    constants = [
        new_constant(graph_module, f"{name}_{part}", tensor)
        for part, tensor in (("int8", integers), ("scale", scale), ("zero_point", zero_point))
    ]
    limits = (0, -127, 127, torch.int8)  # integers of fewer bits too: runtimes have kernels for these
    return graph_module.graph.call_function(_qd.dequantize_per_channel.default, (*constants, *limits))


def _rounded(weight: Tensor, quantizer: WeightQuantizer) -> tuple[Tensor, Tensor]:
    """Return integers and steps of a weight."""
    shared = quantizer.shared(weight)
    if shared is not None:
        return shared
    scale = quantizer.steps_of(weight)
    zero_point = torch.zeros_like(scale, dtype=torch.int32)
    limits = (0, quantizer.quant_min, quantizer.quant_max, torch.int8)
    return _qd.quantize_per_channel(weight, scale, zero_point, *limits), scale


def _round_bias(graph_module: GraphModule, layer: Node) -> None:
    """Give the bias the values that runtimes store: integers of scale s_x * s_w, that of the accumulator.

    Without it file and graph differ by up to half a unit of the accumulator, by a rounded output here and there, and
    on ResNet-20 by one label in two hundred. A channel whose bias overflows int32 at that scale has next to no weight
    (pruned, or all zeros: its scale is 1e-7), and loses nothing by coarser integers: its weight scale is raised.
    """
    data, weight, bias = (*layer.args[:3], None)[:3]
    if not (_is_dequantized(data) and _is_integer_weight(weight) and isinstance(bias, Node) and bias.op == "get_attr"):
        return
    integers, scale = (tensor_at(graph_module, operand(weight, index).target) for index in (0, 1))
    values = tensor_at(graph_module, bias.target).detach()
    excess = (values.abs() / (_step(data) * scale.double()) / _LARGEST_BIAS).clamp(min=1.0)
    integers.copy_(torch.round(integers / excess.reshape(-1, *[1] * (integers.ndim - 1))))
    scale.mul_(excess)
    step = _step(data) * scale.double()
    name = str(bias.target).removesuffix("_folded")
    with layer.graph.inserting_before(layer):
        stored = new_constant(graph_module, f"{name}_rounded", (torch.round(values / step) * step).to(values.dtype))
    layer.update_arg(2, stored)


def _step(data: Node) -> float:
    step = data.args[1]
    assert isinstance(step, float)
    return step


def _is_integer_weight(value: object) -> TypeGuard[Node]:
    return isinstance(value, Node) and value.target is _qd.dequantize_per_channel.default


def _pair(node: Node, quantizer: ActivationQuantizer) -> Node:
    limits = (float(quantizer.scale), int(quantizer.zero_point), quantizer.quant_min, quantizer.quant_max, torch.int8)
    integers = node.graph.call_function(_qd.quantize_per_tensor.default, (node.args[0], *limits))
    return node.graph.call_function(_qd.dequantize_per_tensor.default, (integers, *limits))


def _repeat_pair(node: Node) -> None:
    """Quantize a selection of quantized values with their scale: it changes none, and runtimes stay in integers."""
    limits = operand(node).args[1:]
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
    for value in joint.all_input_nodes:
        if _is_dequantized(value) and value.args[1:] == limits:
            continue
        with joint.graph.inserting_before(joint):
            integers = joint.graph.call_function(_qd.quantize_per_tensor.default, (value, *limits))
            pair = joint.graph.call_function(_qd.dequantize_per_tensor.default, (integers, *limits))
        joint.replace_input_with(value, pair)


def copy_for_each_reader(node: Node) -> None:
    """Let nobody share it, as in torchao's ``convert_pt2e``: partitioners take a dequantization with its reader."""
    for reader in list(node.users)[1:]:
        with node.graph.inserting_before(reader):
            reader.replace_input_with(node, node.graph.node_copy(node))


def _is_dequantized(value: object) -> TypeGuard[Node]:
    return isinstance(value, Node) and value.target is _qd.dequantize_per_tensor.default


def _is_counter(node: Node) -> bool:
    return node.target is _aten.add_.Tensor and str(operand(node).target).endswith("num_batches_tracked")


def _forget_unused_tensors(graph_module: GraphModule) -> None:
    used = {str(node.target) for node in graph_module.graph.find_nodes(op="get_attr")}
    for path, part in list(graph_module.named_modules()):
        for group in ("_parameters", "_buffers"):
            for key in [key for key in vars(part)[group] if (f"{path}.{key}" if path else key) not in used]:
                del vars(part)[group][key]
