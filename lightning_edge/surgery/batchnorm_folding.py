"""Batch norms folded into the weights before them, in a network that keeps every key and shape of its state dict."""

from collections import Counter
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_edge.surgery.batchnorm import BATCH_NORM, is_foldable, weight_of
from lightning_edge.surgery.capture import export_graph


@dataclass(frozen=True)
class FoldReport:
    """The layers whose weights took in the batch norm behind them, with that norm; and the norms left as they were."""

    folded: tuple[tuple[str, str], ...]
    left: tuple[str, ...]


@torch.no_grad()
def fold_batch_norms_(module: nn.Module, *, example_inputs: tuple[Tensor, ...]) -> FoldReport:
    """Multiply each layer's weights by the scale of the batch norm behind it, which then scales by exactly one.

    With s = gamma / sqrt(var + eps) per output channel (Jacob et al. 2018, arXiv:1712.05877, eq. 11): weight and bias
    become s times what they were, and so do the norm's mean, and its variance s**2 times; gamma becomes
    sqrt(var + eps). The network computes what it did, its state dict keeps every key and shape, and it can be trained
    on. Shared weights are then those of the folded network: no vector of scales is left to store, and channels are told
    apart by their size, not by a scale of their own.

    Args:
        module: The network; its weights and batch norms are changed in place.
        example_inputs: Positional inputs, batch first, to find which norm is behind which layer.

    Raises:
        ValueError: If the network cannot be traced, or no batch norm is behind a layer of its own.

    >>> network = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2))
    >>> fold_batch_norms_(network, example_inputs=(torch.zeros(2, 1, 4, 4),)).folded
    (('0', '1'),)
    """
    graph = export_graph(module, example_inputs, training=False).graph
    norms = {
        str(node.args[3].target).rpartition(".")[0]: node
        for node in graph.find_nodes(op="call_function", target=BATCH_NORM)
        if node.args[3] is not None
    }
    read = Counter(str(node.target) for node in graph.find_nodes(op="get_attr") for _ in node.users)
    folded = []
    for name, node in norms.items():
        norm, layer = module.get_submodule(name), node.args[0]
        if not (isinstance(norm, _BatchNorm) and norm.affine and is_foldable(layer, node)):
            continue
        weight = weight_of(layer.args[1])
        owner = weight.rpartition(".")[0]
        if read[weight] == 1 and read[f"{name}.running_mean"] == 1:
            _fold_(module.get_submodule(owner), norm)
            folded.append((owner, name))
    if not folded:
        raise ValueError(
            "module must have a batch norm with a scale behind a convolution or linear layer, got none among"
            f" {list(norms)}"
        )
    taken = {norm for _, norm in folded}
    return FoldReport(tuple(folded), tuple(name for name in norms if name not in taken))


def _fold_(layer: nn.Module, norm: _BatchNorm) -> None:
    weight, bias = layer.weight, layer.bias
    mean, variance = norm.running_mean, norm.running_var
    scale = norm.weight / torch.sqrt(variance + norm.eps)
    weight.mul_(scale.view(-1, *[1] * (weight.dim() - 1)))
    if bias is not None:
        bias.mul_(scale)
    mean.mul_(scale)
    variance.mul_(scale.square())
    norm.weight.copy_(torch.sqrt(variance + norm.eps))
