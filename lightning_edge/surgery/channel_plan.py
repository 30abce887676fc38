"""What channel pruning may cut, what it costs, and which units a target leaves."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from lightning_edge.functional.channels import Cost, units_to_keep
from lightning_edge.surgery.copying import copied
from lightning_edge.surgery.coupling import ChannelGroup, Coupling, coupled_groups
from lightning_edge.surgery.outputs import flat_tensors
from lightning_edge.surgery.selection import WEIGHTED, check_built
from lightning_edge.surgery.slicing import channel_tensors, is_depthwise, weight_of, width

_TINY = torch.finfo(torch.float32).tiny


@dataclass(frozen=True)
class Target:
    """How much is to go: exactly one of three budgets.

    Attributes:
        sparsity: Fraction of the units of all unprotected groups that goes, in (0, 1).
        macs: Fraction of the network's multiply-accumulates that may stay, in (0, 1).
        parameters: Fraction of the network's parameters that may stay, in (0, 1).
    """

    sparsity: float | None = None
    macs: float | None = None
    parameters: float | None = None

    def __post_init__(self) -> None:
        given = {name: value for name, value in vars(self).items() if value is not None}
        if len(given) != 1:
            raise ValueError(f"exactly one of sparsity=, macs= and parameters= must be given, got {given or 'none'}")
        ((name, value),) = given.items()
        if isinstance(value, bool) or not 0.0 < value < 1.0:
            meaning = "that goes" if name == "sparsity" else "that stays"
            raise ValueError(f"{name} must lie in (0, 1), the fraction {meaning}, got {value!r}")

    @property
    def kind(self) -> str:
        """Which of the three is given."""
        return next(name for name, value in vars(self).items() if value is not None)

    def budget(self, progress: float) -> float:
        """Return the fraction that may stay when ``progress`` of the way is done.

        >>> Target(macs=0.5).budget(0.5)
        0.75
        """
        value: float = getattr(self, self.kind)
        return 1.0 - progress * (value if self.kind == "sparsity" else 1.0 - value)


class ChannelPlan:
    """The groups of a network that may be cut, what they cost, and the choice of units for a target.

    Args:
        network: Not changed.
        example_inputs: What it is called with.
        include: Layers whose outputs may be cut, globs over names or class names.
        exclude: Layers whose outputs may not.
        protect_ends: Leave the outputs of the first layer alone (those of the last are the network's outputs anyway).
        round_to: Widths stay multiples of this, where the layer is wide enough.

    Raises:
        ValueError: If nothing is left to cut; says why for the layers.
    """

    def __init__(
        self,
        network: nn.Module,
        example_inputs: tuple[Any, ...],
        *,
        include: Sequence[str] = ("*",),
        exclude: Sequence[str] = (),
        protect_ends: bool = True,
        round_to: int = 8,
    ) -> None:
        check_patterns(network, include=include, exclude=exclude)
        coupling = coupled_groups(network, example_inputs)
        self.protected = dict(coupling.protected)
        self.groups = self._choose(network, coupling, include, exclude, protect_ends)
        if not self.groups:
            raise ValueError(f"network must have channels that can be removed, got none; {_reasons(self.protected)}")
        self.round_to = round_to
        self._positions = _output_positions(network, example_inputs)
        self._network = network

    def kept(
        self,
        target: Target,
        scores: Sequence[Tensor],
        *,
        progress: float,
        scope: str,
        before: Sequence[Tensor] | None = None,
    ) -> list[Tensor]:
        """Return which units of each group stay.

        Args:
            target: What may stay at the end.
            scores: For each group the importance of its units, at least 0.
            progress: How much of the way to the target, in [0, 1].
            scope: "global" or "layer".
            before: Which units have stayed until now: none comes back, since nothing would ever train it again.

        Raises:
            ValueError: If the target is out of reach.
        """
        sizes = [group.units for group in self.groups]
        costs: dict[str, Cost] = {"sparsity": sum, "macs": self._macs, "parameters": self._parameters}
        cost = costs[target.kind]
        steps = [_step(self._network, group, self.round_to) for group in self.groups]
        dense = cost(sizes)
        gone = None if before is None else [int((~mask).sum()) for mask in before]
        if before is not None:
            # What is gone goes first.
            scores = [torch.where(mask, s + _TINY, 0.0) for mask, s in zip(before, scores, strict=True)]
        try:
            budget = dense * target.budget(progress)
            return units_to_keep(scores, cost=cost, budget=budget, scope=scope, steps=steps, gone=gone)
        except ValueError as error:
            raise ValueError(
                f"{target.kind} must be within reach, got {getattr(target, target.kind)}: of {dense:.4g}, {error};"
                f" lower round_to={self.round_to}, or let more layers be cut; {_reasons(self.protected)}"
            ) from error

    def macs(self, kept: Sequence[Tensor]) -> int:
        """Return the multiply-accumulates of one input row with these units."""
        return round(self._macs([int(mask.sum()) for mask in kept]))

    def _choose(
        self,
        network: nn.Module,
        coupling: Coupling,
        include: Sequence[str],
        exclude: Sequence[str],
        protect_ends: bool,
    ) -> tuple[ChannelGroup, ...]:
        layers = dict(network.named_modules())
        first = next(name for name, layer in layers.items() if weight_of(layer) is not None)
        chosen = []
        for group in coupling.groups:
            producers = group.layers(network)
            wanted = [
                name
                for name in producers
                if any(_matches(name, layers[name], p) for p in include)
                and not any(_matches(name, layers[name], p) for p in exclude)
            ]
            if protect_ends and first in producers:
                self.protected |= dict.fromkeys(producers, "the first layer is among them (protect_ends)")
            elif len(wanted) < len(producers):
                self.protected |= dict.fromkeys(producers, "include and exclude leave it out")
            else:
                chosen.append(group)
        return tuple(chosen)

    def _widths(self, kept: Sequence[int]) -> dict[tuple[str, bool], int]:
        """Return how many channels each side of a layer loses."""
        lost: dict[tuple[str, bool], int] = {}
        for group, stays in zip(self.groups, kept, strict=True):
            for side, units in group.members.items():
                key = (side.layer, side.is_output)
                lost[key] = lost.get(key, 0) + (group.units - stays) * units.shape[1]
        return lost

    def _macs(self, kept: Sequence[int]) -> float:
        lost = self._widths(kept)
        layers = dict(self._network.named_modules())
        return sum(
            positions * _weights(layers[name], lost.get((name, True), 0), lost.get((name, False), 0))
            for name, positions in self._positions.items()
        )

    def _parameters(self, kept: Sequence[int]) -> float:
        lost = self._widths(kept)
        total = 0.0
        for name, layer in self._network.named_modules():
            gone = lost.get((name, True), 0)
            for key, parameter in layer.named_parameters(recurse=False):
                if parameter is weight_of(layer):
                    total += _weights(layer, gone, lost.get((name, False), 0))
                else:
                    total += parameter.numel() - (gone if key in _channel_tensors(layer) else 0)
        return total


def check_patterns(network: nn.Module, *, include: Sequence[str], exclude: Sequence[str]) -> None:
    """Raise a ValueError unless every pattern matches a linear or convolution layer, and every layer is built."""
    check_built(network)
    layers = {name: layer for name, layer in network.named_modules() if isinstance(layer, WEIGHTED)}
    for argument, patterns in (("include", include), ("exclude", exclude)):
        for pattern in [patterns] if isinstance(patterns, str) else patterns:
            if isinstance(patterns, str) or not any(_matches(name, layer, pattern) for name, layer in layers.items()):
                raise ValueError(
                    f"{argument} must be a list of patterns that match a linear or convolution layer, got {pattern!r};"
                    f" the layers are {list(layers)[:6]}"
                )


def _matches(name: str, layer: nn.Module, pattern: str) -> bool:
    return fnmatchcase(name, pattern) or type(layer).__name__ == pattern


def _step(network: nn.Module, group: ChannelGroup, round_to: int) -> int:
    """Return how many units of a group keep its producers' widths multiples of ``round_to``."""
    if group.heads is not None:
        return 1
    channels = next(units.shape[1] for side, units in group.members.items() if side.is_output)
    return min(max(1, round_to // channels), max(1, group.units))


def _weights(layer: nn.Module, lost_out: int, lost_in: int) -> float:
    """Return how many weights a layer has after losing channels."""
    if isinstance(layer, nn.MultiheadAttention):
        return float((width(layer, output=True) - lost_out) * layer.embed_dim)
    out, into = width(layer, output=True) - lost_out, width(layer, output=False) - lost_in
    if isinstance(layer, _ConvNd):
        kernel = 1
        for size in layer.kernel_size:
            kernel *= size
        return kernel * out * (1 if is_depthwise(layer) else into / layer.groups)
    return out * into


def _channel_tensors(layer: nn.Module) -> Mapping[str, int]:
    """Return the tensors that have a layer's output channels; none for a layer that cannot be cut."""
    try:
        width(layer, output=True)
    except TypeError:
        return {}
    return channel_tensors(layer, output=True)


def _output_positions(network: nn.Module, example_inputs: tuple[Any, ...]) -> dict[str, float]:
    """Return how often each weight of a layer is used for one input row."""
    rows = len(flat_tensors(example_inputs)[0])
    trial = copied(network).eval()
    positions: dict[str, float] = {}
    for name, layer in trial.named_modules():
        if isinstance(layer, nn.MultiheadAttention):
            # Its output projection is never called as a module.
            def attend(layer: nn.Module, inputs: Any, output: Any, name: str = name) -> None:
                tokens = output[0].numel() / output[0].shape[-1] / rows
                for part in (name, f"{name}.out_proj"):
                    positions[part] = positions.get(part, 0) + tokens

            layer.register_forward_hook(attend)
        elif isinstance(layer, WEIGHTED):

            def count(layer: nn.Module, args: Any, kwargs: Any, output: Tensor, name: str = name) -> None:
                transposed = isinstance(layer, nn.modules.conv._ConvTransposeNd)
                # A transposed convolution works for every input.
                counted = (args[0] if args else kwargs["input"]) if transposed else output
                positions[name] = positions.get(name, 0) + counted.numel() / rows / width(layer, output=not transposed)

            layer.register_forward_hook(count, with_kwargs=True)
    with torch.random.fork_rng(devices=[]), torch.enable_grad():  # else an encoder layer takes a path past its modules
        trial(*example_inputs)
    return positions


def _reasons(protected: Mapping[str, str]) -> str:
    by_reason: dict[str, list[str]] = {}
    for name, reason in protected.items():
        by_reason.setdefault(reason, []).append(name)
    return "left alone: " + ("; ".join(f"{', '.join(names)}: {why}" for why, names in by_reason.items()) or "nothing")
