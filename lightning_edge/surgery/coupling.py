"""Which channels of which layers can only be removed together: coupled groups, found by tracing and proved by trial."""

import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch_pruning
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.utils.parametrize import is_parametrized
from torch_pruning.ops import OPTYPE

from lightning_edge.surgery.copying import copied
from lightning_edge.surgery.heads import head_groups, narrow_
from lightning_edge.surgery.outputs import flat_tensors
from lightning_edge.surgery.selection import WEIGHTED
from lightning_edge.surgery.slicing import Side, channel_tensors, cut_, is_depthwise, weight_of, width

_TOLERANCE = 1e-9  # of outputs in double precision, relative to the largest


@dataclass(frozen=True)
class ChannelGroup:
    """Units that can be removed one by one; each is a set of channels on the sides of several layers.

    Attributes:
        name: The first layer whose outputs are in the group.
        members: For a side of a layer, the channels of each unit, shape (units, channels a unit). Behind a flattening,
            a channel is several features; in a grouped convolution, a unit takes one channel of every group.
        heads: The attention module whose heads the units are, if they are.
    """

    name: str
    members: Mapping[Side, Tensor] = field(repr=False)
    heads: str | None = None

    @property
    def units(self) -> int:
        """How many units there are."""
        return len(next(iter(self.members.values())))

    def layers(self, network: nn.Module) -> tuple[str, ...]:
        """Return the layers with weights whose outputs are in the group."""
        modules = dict(network.named_modules())
        return tuple(s.layer for s in self.members if s.is_output and weight_of(modules[s.layer]) is not None)


@dataclass(frozen=True)
class Coupling:
    """What can be removed, and what not: layer name to the reason."""

    groups: tuple[ChannelGroup, ...]
    protected: Mapping[str, str]


def coupled_groups(network: nn.Module, example_inputs: tuple[Any, ...]) -> Coupling:
    """Find the coupled channels of a network, and prove of every group that removing it is zeroing it.

    The dependency graph is torch-pruning's (Fang et al. 2023, arXiv:2301.12900): residual additions, concatenation,
    depthwise and grouped convolutions, norms, linear layers after flattening. It takes any operation that it does not
    know for an elementwise one, so no group is believed: in a copy of the network in double precision, every second
    unit is once set to zero and once removed, and a group whose outputs differ, or that does not run, is protected.

    Args:
        network: Not changed.
        example_inputs: What it is called with; two rows suffice.

    Raises:
        ValueError: If the network cannot be run on ``example_inputs``.

    >>> coupling = coupled_groups(nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 4)), (torch.ones(2, 2),))
    >>> [(group.name, group.units) for group in coupling.groups], dict(coupling.protected)
    ([('0', 3)], {'2': 'its channels are outputs of the network'})
    """
    trial = Trial(network, example_inputs)
    groups: list[ChannelGroup] = []
    protected: dict[str, str] = {}
    heads = ((first, ChannelGroup(first, members, heads=name)) for name, first, members in head_groups(network))
    for root, found in (*_traced_groups(network, example_inputs), *heads):
        if isinstance(found, str):
            protected.setdefault(root, found)
        elif reason := trial.objection(found):
            protected |= dict.fromkeys(found.layers(network), reason)
        else:
            groups.append(found)
            for layer in found.layers(network):
                protected.pop(layer, None)
    return Coupling(tuple(groups), protected)


def kept_sides(groups: Iterable[ChannelGroup], kept: Iterable[Tensor], module: nn.Module) -> dict[Side, Tensor]:
    """Return the channels that stay on every side of a layer that loses some.

    Args:
        groups: Groups; several may have members on one and the same side (a concatenation).
        kept: For each group a mask over its units, True = stays.
        module: The network, for the widths of its layers.
    """
    sides: dict[Side, Tensor] = {}
    layers = dict(module.named_modules())
    for group, mask in zip(groups, kept, strict=True):
        if bool(mask.all()):
            continue
        for side, units in group.members.items():
            if side not in sides:
                sides[side] = torch.ones(width(layers[side.layer], output=side.is_output), dtype=torch.bool)
            sides[side][units[~mask.cpu()].flatten()] = False
    return {side: mask.nonzero().flatten() for side, mask in sides.items()}


def unit_masks(module: nn.Module, groups: Iterable[ChannelGroup], kept: Iterable[Tensor]) -> dict[str, Tensor]:
    """Return masks for the parameters that hold units which do not stay: weights, biases, scales, consumers' weights.

    Args:
        module: The network.
        groups: The groups.
        kept: For each group a mask over its units, True = stays.

    >>> group = ChannelGroup("", {Side("", "out"): torch.tensor([[0], [1]])})
    >>> unit_masks(nn.Linear(1, 2), [group], [torch.tensor([True, False])])
    {'weight': tensor([[ True],
            [False]]), 'bias': tensor([ True, False])}
    """
    layers = dict(module.named_modules())
    masks: dict[str, Tensor] = {}
    for group, mask in zip(groups, kept, strict=True):
        for side, units in group.members.items():
            layer = layers[side.layer]
            gone = units[~mask.cpu()].flatten()
            for key, dim in channel_tensors(layer, output=side.is_output).items():
                tensor = getattr(layer, key)
                if not len(gone) or key.startswith("running_"):
                    continue  # statistics of channels without scale and shift reach nothing
                name = f"{side.layer}.{key}" if side.layer else key
                whole = masks.setdefault(name, torch.ones(tensor.shape, dtype=torch.bool, device=tensor.device))
                # Inputs of a grouped convolution count anew in each of its groups.
                local = gone if side.is_output else gone % tensor.shape[dim]
                whole.index_fill_(dim, local.to(tensor.device), False)
    return masks


@torch.no_grad()
def zero_units_(module: nn.Module, groups: Iterable[ChannelGroup], kept: Iterable[Tensor]) -> None:
    """Set everything of the units that do not stay to zero.

    >>> network = nn.Linear(2, 2)
    >>> group = ChannelGroup("", {Side("", "out"): torch.tensor([[0], [1]])})
    >>> zero_units_(network, [group], [torch.tensor([True, False])]); network.bias.count_nonzero()
    tensor(1)
    """
    for name, mask in unit_masks(module, groups, kept).items():
        module.get_parameter(name).masked_fill_(mask.logical_not(), 0.0)


def remove_units_(
    module: nn.Module,
    groups: Sequence[ChannelGroup],
    kept: Sequence[Tensor],
    *,
    optimizers: Iterable[torch.optim.Optimizer] = (),
) -> None:
    """Cut the units that do not stay out of the network; an attention module then has fewer heads."""
    cut_(module, kept_sides(groups, kept, module), optimizers=optimizers)
    for group, mask in zip(groups, kept, strict=True):
        if group.heads is not None:
            narrow_(module.get_submodule(group.heads), int(mask.sum()))


class Trial:
    """Compares zeroed with removed units, in double precision where the network can."""

    def __init__(self, network: nn.Module, example_inputs: tuple[Any, ...]) -> None:
        self._network = copied(network).eval().requires_grad_(False)
        self._inputs = example_inputs
        try:
            self._shape = _shapes(self._run(self._network))
        except Exception as error:
            raise ValueError(f"example_inputs must be what the network is called with, got: {error}") from error
        doubled = copied(self._network).double()
        inputs = tuple(value.double() if _is_real(value) else value for value in example_inputs)
        try:
            doubled(*inputs)
        except RuntimeError:  # a tensor made inside in single precision
            self._tolerance = 1e-4
        else:
            self._network, self._inputs, self._tolerance = doubled, inputs, _TOLERANCE

    def objection(self, group: ChannelGroup) -> str | None:
        """Return why units of this group cannot be removed, or None if they can."""
        if group.units < 2:
            return "it has a single unit"
        kept = torch.arange(group.units) % 2 == 0
        zeroed, removed = copied(self._network), copied(self._network)
        zero_units_(zeroed, [group], [kept])
        expected = self._run(zeroed)
        try:
            remove_units_(removed, [group], [kept])
            outputs = self._run(removed)
        except Exception as error:
            return f"the network does not run without them ({str(error).splitlines()[0][:100]})"
        if _shapes(outputs) != self._shape:
            return "its channels are outputs of the network"
        scale = max(float(tensor.abs().max()) for tensor in expected)
        worst = max(float((a - b).abs().max()) for a, b in zip(expected, outputs, strict=True))
        if not worst <= self._tolerance * max(scale, 1e-30):
            return f"removing them is not zeroing them, the outputs differ by {worst:.1e}"
        return None

    @torch.no_grad()
    def _run(self, network: nn.Module) -> list[Tensor]:
        with torch.random.fork_rng(devices=[]):
            return flat_tensors(network(*self._inputs))


def _is_real(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def _shapes(outputs: Sequence[Tensor]) -> list[torch.Size]:
    return [tensor.shape for tensor in outputs]


def _traced_groups(network: nn.Module, example_inputs: tuple[Any, ...]) -> Iterator[tuple[str, ChannelGroup | str]]:
    """Yield the name of a producing layer with its group, or with the reason why it has none; no producer twice."""
    traced = copied(network).requires_grad_(True)
    traced.__dict__.pop("forward", None)  # of a network under quantization-aware training, the plain one
    names = {layer: name for name, layer in traced.named_modules()}
    owners: dict[int, int] = {}
    for layer in names:
        for parameter in layer.parameters(recurse=False):
            owners[id(parameter)] = owners.get(id(parameter), 0) + 1
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]), torch.enable_grad():
        warnings.simplefilter("ignore")
        graph = torch_pruning.DependencyGraph().build_dependency(traced, example_inputs, verbose=False)
    seen: set[str] = set()
    for layer, name in names.items():
        if not isinstance(layer, WEIGHTED) or name in seen:
            continue
        if layer not in graph.module2node:
            # The output projection of attention is not called as a layer, its weight is read.
            is_projection = isinstance(layer, nn.modules.linear.NonDynamicallyQuantizableLinear)
            unused = "the network does not use it on the example inputs"
            yield name, "attention keeps the width of its inputs" if is_projection else unused
            continue
        pruner = graph.get_pruner_of_module(layer).prune_out_channels
        channels = list(range(width(layer, output=True)))
        try:
            items = list(graph.get_pruning_group(layer, pruner, channels))
        except Exception as error:  # the graph cannot follow, for example a shortcut that pads channels
            yield name, f"the dependency graph does not follow them ({type(error).__name__}: {error})"
            continue
        found = _group(name, items, graph, names, shared={i for i, count in owners.items() if count > 1})
        if isinstance(found, ChannelGroup):
            seen.update(found.layers(traced))
        yield name, found


def _group(
    name: str, items: Sequence[Any], graph: Any, names: Mapping[Any, str], *, shared: set[int]
) -> ChannelGroup | str:
    """Return the group of one root layer, or why its members are not understood."""
    count = len(items[0].idxs)
    members: dict[Side, Tensor] = {}
    blocks = 1  # how many equal blocks of channels have to lose the same ones
    for item in items:
        layer = item.dep.target.module
        if item.dep.target.type == OPTYPE.PARAMETER:
            return "a parameter of its own is added to them"
        if layer not in names or not any(True for _ in layer.parameters(recurse=False)):
            continue
        side = Side(names[layer], "out" if graph.is_out_channel_pruning_fn(item.dep.handler) else "in")
        units = _member(layer, side, item, count, shared)
        if isinstance(units, str):
            return units
        if units is not None:
            members[side] = units
        if isinstance(layer, _ConvNd) and layer.groups > 1 and not is_depthwise(layer):
            blocks = max(blocks, layer.groups)
    if count % blocks:
        return f"its {count} channels do not divide into the {blocks} groups of a convolution"
    if blocks > 1:
        members = {
            side: units.view(blocks, count // blocks, -1).transpose(0, 1).flatten(1) for side, units in members.items()
        }
    return ChannelGroup(name, members)


def _member(layer: nn.Module, side: Side, item: Any, count: int, shared: set[int]) -> Tensor | str | None:
    """Return the channels of each unit on one side of a layer, None if it has none, or why they are not understood."""
    try:
        channels = width(layer, output=side.is_output)
    except TypeError as error:
        return f"{side.layer}: {error}"
    if isinstance(layer, nn.PReLU) and channels == 1:
        return None
    if is_parametrized(layer) or any(id(parameter) in shared for parameter in layer.parameters(recurse=False)):
        return f"{side.layer} has parametrized or shared parameters"
    units = _units(item.idxs, item.root_idxs, count)
    if units is None or int(units.max()) >= channels:
        return f"the dependency graph does not follow its channels to {side.layer}"
    return units


def _units(indices: Sequence[int], roots: Sequence[int], count: int) -> Tensor | None:
    """Return the channels of each unit, (count, channels a unit); None unless every unit has equally many."""
    index, root = torch.tensor(indices), torch.tensor(roots)
    if len(index) % count or not bool((torch.bincount(root, minlength=count) == len(index) // count).all()):
        return None
    return index[torch.argsort(root, stable=True)].view(count, -1)
