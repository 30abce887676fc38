"""Equal ranges for the channels between two layers: int8 weights then lose less, and the network computes the same."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from lightning_edge.surgery.batchnorm import BATCH_NORM, CONVOLUTIONS, WEIGHTED, weight_of
from lightning_edge.surgery.capture import export_graph, keep_random_state

_aten = torch.ops.aten
# f(c x) = c f(x) for c > 0, channel by channel. Not ReLU6, whose bound would move.
_HOMOGENEOUS = (
    _aten.relu.default,
    _aten.relu_.default,
    _aten.leaky_relu.default,
    _aten.leaky_relu_.default,
    _aten.max_pool1d.default,
    _aten.max_pool2d.default,
    _aten.avg_pool2d.default,
    _aten.adaptive_avg_pool2d.default,
    _aten.dropout.default,
    _aten.dropout_.default,
)
_FLATTENING = (_aten.flatten.using_ints, _aten.view.default, _aten.reshape.default)
_MAX_SWEEPS = 20
_CONVERGED = 1e-3


@dataclass(frozen=True)
class EqualizationReport:
    """Which layers were equalized with the one that reads them, and how even the channels of each became."""

    pairs: tuple[tuple[str, str], ...]
    before: Mapping[str, float]
    """Of each layer that was scaled at its output: the largest range of a channel / the median one, before."""
    after: Mapping[str, float]


@dataclass(frozen=True)
class _Pair:
    """Two layers and what is between them."""

    first: nn.Module
    norm: _BatchNorm | None
    second: nn.Module
    names: tuple[str, str]
    repeats: int  # inputs of the second layer that each channel of the first becomes: positions behind a flatten


@torch.no_grad()
def equalize_(module: nn.Module, example_inputs: tuple[Tensor, ...]) -> EqualizationReport:
    """Scale the channels between consecutive layers so that both layers' weights have equal ranges for each of them.

    Cross-layer equalization of Nagel et al. 2019 (arXiv:1906.04721, sec. 4.1): channel i of the first layer is divided,
    and its column in the second multiplied, by s_i = sqrt(r1_i r2_i) / r2_i, with r the largest absolute weight (batch
    norm folded in); pairs are visited until nothing changes. It needs an activation with f(c x) = c f(x) between the
    two (ReLU, pooling), one reader, and a batch norm with weight and bias, or none: where there is one, its weight and
    bias take the factor. It pays where activations or, per tensor, weights lose channels in the range of others, as in
    depthwise-separable networks.

    Args:
        module: The network, plain; changed in place, its outputs in evaluation mode up to rounding not.
        example_inputs: Positional inputs, batch first.

    Returns:
        The pairs, in network order.

    Raises:
        ValueError: If the network cannot be traced, or no pair of layers can be equalized.

    >>> network = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
    >>> equalize_(network, (torch.zeros(2, 4),)).pairs
    (('0', '2'),)
    """
    with keep_random_state(), torch.enable_grad():
        graph = export_graph(module, example_inputs, training=False)
    pairs = tuple(_pairs(module, graph))
    if not pairs:
        raise ValueError(
            f"module must have two layers in a row with a ReLU, a pooling or nothing between, got none in"
            f" {type(module).__name__}: sums, ReLU6 and a second reader stand in the way"
        )
    before = {pair.names[0]: _unevenness(pair) for pair in pairs}
    for _ in range(_MAX_SWEEPS):
        moved = max(_equalize_(pair) for pair in pairs)
        if moved < _CONVERGED:
            break
    after = {pair.names[0]: _unevenness(pair) for pair in pairs}
    return EqualizationReport(tuple(pair.names for pair in pairs), before, after)


def _pairs(module: nn.Module, graph: GraphModule) -> Iterator[_Pair]:
    calls = [node for node in graph.graph.nodes if node.target in WEIGHTED]
    names = [_weight_name(node) for node in calls]
    once = {name for name in names if names.count(name) == 1}
    for node, name in zip(calls, names, strict=True):
        norm, second, flat = _reader(node)
        if second is None or not {name, _weight_name(second)} <= once:
            continue
        paths = (name.rpartition(".")[0], _weight_name(second).rpartition(".")[0])
        layers = [module.get_submodule(path) for path in paths]
        between = None if norm is None else _owner(module, norm)
        if norm is not None and (between is None or norm.args[1] is None or norm.args[2] is None):
            continue
        channels, inputs = node.meta["val"].shape[1 if node.target in CONVOLUTIONS else -1], _inputs_of(layers[1])
        if inputs % channels or (inputs != channels and not flat):
            continue
        yield _Pair(layers[0], between, layers[1], paths, inputs // channels)


def _reader(layer: Node) -> tuple[Node | None, Node | None, bool]:
    """Follow the only reader of each value: the batch norm on the way, the layer at its end, whether it was flat."""
    norm, value, flat = None, layer, False
    while len(value.users) == 1:
        reader = next(iter(value.users))
        if reader.target in WEIGHTED and reader.args[0] is value:
            # A linear layer reads the last dimension: that of the channels only if there are but two.
            fits = reader.target in CONVOLUTIONS or (value.meta["val"].ndim == 2 or layer.target not in CONVOLUTIONS)
            return norm, reader if fits else None, flat
        if reader.target is BATCH_NORM and value is layer and _is_per_channel(layer):
            norm = reader
        elif reader.target in _FLATTENING and reader.meta["val"].ndim == 2 and _is_per_channel(layer):
            flat = True
        elif reader.target not in _HOMOGENEOUS:
            break
        value = reader
    return norm, None, flat


def _weight_name(layer: Node) -> str:
    weight = layer.args[1]
    assert isinstance(weight, Node)
    return weight_of(weight)


def _is_per_channel(layer: Node) -> bool:
    """Whether dimension 1 of the output is that of the channels."""
    return layer.target in CONVOLUTIONS or layer.meta["val"].ndim == 2


def _owner(module: nn.Module, norm: Node) -> _BatchNorm | None:
    weight = norm.args[1]
    owner = module.get_submodule(str(weight.target).rpartition(".")[0]) if isinstance(weight, Node) else None
    return owner if isinstance(owner, _BatchNorm) else None


def _inputs_of(layer: nn.Module) -> int:
    """How many channels a layer reads; a depthwise one keeps them in its rows."""
    if isinstance(layer, nn.Linear):
        return layer.in_features
    assert isinstance(layer, _ConvNd)
    return layer.in_channels


def _rows(pair: _Pair) -> Tensor:
    """The largest absolute weight of each output channel of the first layer, batch norm folded in."""
    rows = _weight(pair.first).flatten(1).abs().amax(1)
    if pair.norm is not None:
        rows = rows * _weight(pair.norm).abs()
        if pair.norm.running_var is not None:
            rows = rows / (pair.norm.running_var + pair.norm.eps).sqrt()
    return rows


def _columns(pair: _Pair) -> Tensor:
    """The largest absolute weight that reads each channel."""
    return _grouped(pair).abs().amax((1, 3)).flatten().view(-1, pair.repeats).amax(1)


def _grouped(pair: _Pair) -> Tensor:
    """The second layer's weight as (groups, outputs of a group, inputs of a group, kernel)."""
    weight, groups = _weight(pair.second), int(getattr(pair.second, "groups", 1))
    return weight.reshape(groups, len(weight) // groups, weight.shape[1], -1)


def _equalize_(pair: _Pair) -> float:
    """Equalize one pair; return the largest relative change."""
    first, second = _rows(pair), _columns(pair)
    alive = (first > 0) & (second > 0)  # what is pruned on one side has nothing to be balanced
    scale = torch.where(alive, (first / second).sqrt(), 1.0)
    targets = [pair.norm] if pair.norm is not None else [pair.first]
    for layer in targets:
        weight, bias = _weight(layer), layer.bias
        weight.div_(scale.view(-1, *[1] * (weight.ndim - 1)))
        if isinstance(bias, Tensor):
            bias.div_(scale)
    weight, groups = _weight(pair.second), int(getattr(pair.second, "groups", 1))
    each = scale.repeat_interleave(pair.repeats).view(groups, -1)  # one row for all outputs of a group
    each = each.repeat_interleave(len(weight) // groups, dim=0)
    weight.mul_(each.view(*each.shape, *[1] * (weight.ndim - 2)))
    return float((scale - 1).abs().max())


def _unevenness(pair: _Pair) -> float:
    rows = _rows(pair)
    alive = rows[rows > 0]
    return float(alive.max() / alive.median()) if len(alive) else 1.0


def _weight(layer: nn.Module) -> Tensor:
    assert isinstance(layer.weight, Tensor)
    return layer.weight
