"""Remove whole channels: the network gets narrower, and every runtime gets faster."""

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.optim import Optimizer

from lightning_edge.functional.channels import Cost, units_to_keep
from lightning_edge.surgery.coupling import (
    ChannelGroup,
    Coupling,
    coupled_groups,
    flat_tensors,
    remove_units_,
    zero_units_,
)
from lightning_edge.surgery.selection import WEIGHTED
from lightning_edge.surgery.slicing import channel_tensors, is_depthwise, sum_per_channel, weight_of, width
from lightning_edge.surgery.widths import Manifest, changed_widths, read_widths, rebuild_, widths_of

ChannelScore = Callable[[nn.Module, ChannelGroup], Tensor]
SCORES = ("l1", "l2", "taylor", "bn_scale", "random")
_TOLERANCE = 1e-5


@dataclass(frozen=True)
class SlimReport:
    """What :func:`slim_channels_` did.

    Attributes:
        manifest: Layer name to its sizes, for every layer that changed: enough to rebuild the shapes.
        macs: Multiply-accumulates of one input row before and after.
        parameters: Number of parameters before and after.
        protected: Layers whose outputs were left alone, and why.
        difference: Largest difference of the outputs on the example inputs, units zeroed against units removed, over
            the largest output (or 1, if that is larger).
    """

    manifest: Manifest
    macs: tuple[int, int]
    parameters: tuple[int, int]
    protected: Mapping[str, str] = field(default_factory=dict)
    difference: float = 0.0


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

    def kept(self, target: Target, scores: Sequence[Tensor], *, progress: float, scope: str) -> list[Tensor]:
        """Return which units of each group stay.

        Args:
            target: What may stay at the end.
            scores: For each group the importance of its units, at least 0.
            progress: How much of the way to the target, in [0, 1].
            scope: "global" or "layer".

        Raises:
            ValueError: If the target is out of reach.
        """
        sizes = [group.units for group in self.groups]
        costs: dict[str, Cost] = {"sparsity": sum, "macs": self._macs, "parameters": self._parameters}
        cost = costs[target.kind]
        steps = [_step(self._network, group, self.round_to) for group in self.groups]
        dense = cost(sizes)
        try:
            return units_to_keep(scores, cost=cost, budget=dense * target.budget(progress), scope=scope, steps=steps)
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
                    total += parameter.numel() - (gone if key in channel_tensors_or_none(layer) else 0)
        return total


def slim_channels_(  # noqa: PLR0913 - every option once, by keyword
    module: nn.Module,
    *,
    example_inputs: tuple[Any, ...] | Tensor | None = None,
    sparsity: float | None = None,
    macs: float | None = None,
    parameters: float | None = None,
    manifest: Mapping[str, Mapping[str, int]] | None = None,
    score: str | ChannelScore = "l2",
    scope: Literal["global", "layer"] = "global",
    round_to: int = 8,
    include: Sequence[str] = ("*",),
    exclude: Sequence[str] = (),
    protect_ends: bool = True,
    optimizer: Optimizer | None = None,
    generator: torch.Generator | None = None,
) -> SlimReport:
    """Remove the channels and attention heads of least importance from a network, physically.

    Channels that only go together (residual additions, concatenations, depthwise and grouped convolutions, batch norms,
    linear layers behind a flattening, heads of an attention) are removed together; what cannot be followed is left
    alone and named in the report. The parameters stay the same objects with smaller data.

    Args:
        module: The network; changed in place.
        example_inputs: What it is called with, a tensor or a tuple; two rows suffice. Not needed with ``manifest``.
        sparsity: Fraction of the removable channels that goes, in (0, 1).
        macs: Instead: fraction of the network's multiply-accumulates that may stay, in (0, 1).
        parameters: Instead: fraction of the network's parameters that may stay, in (0, 1).
        manifest: Instead: sizes that an earlier call reported (or a checkpoint carries); the plain network gets these
            shapes, its weights are then loaded with ``load_state_dict``.
        score: ``"l2"`` or ``"l1"`` norm of the weights of a unit in all its layers, ``"taylor"`` (squared sum of weight
            times gradient, Molchanov et al. 2019, arXiv:1906.10771; call ``backward`` first), ``"bn_scale"`` (the
            norm's |weight|, Liu et al. 2017, arXiv:1708.06519), ``"random"``, or a function from the network and a
            group to the importance of its units, at least 0.
        scope: ``"global"`` compares the units of all groups, ``"layer"`` narrows all groups alike.
        round_to: Widths stay multiples of this.
        include: Layers whose outputs may be cut, globs over names or class names.
        exclude: Layers whose outputs may not be cut.
        protect_ends: Leave the outputs of the first layer alone too.
        optimizer: Whose momentum and moments are cut alike, so that training goes on.
        generator: For ``score="random"``.

    Returns:
        Sizes, multiply-accumulates and parameters before and after, and what was left alone and why.

    Raises:
        ValueError: If an argument is out of its range, a target out of reach, or nothing can be removed.
        RuntimeError: If the outputs changed by the removal; the network is then as it was.

    >>> network = nn.Sequential(nn.Linear(4, 32), nn.ReLU(), nn.Linear(32, 2))
    >>> slim_channels_(network, example_inputs=torch.ones(2, 4), sparsity=0.5, protect_ends=False).manifest
    {'0': {'out_features': 16}, '2': {'in_features': 16}}
    """
    if manifest is not None:
        if not sparsity == macs == parameters is None:
            raise ValueError("manifest must be given alone, got a target too: it already says every width")
        counts = _parameter_count(module)
        rebuild_(module, manifest, optimizers=[optimizer] if optimizer else [])
        return SlimReport(read_widths(manifest), (0, 0), (counts, _parameter_count(module)))
    target = Target(sparsity=sparsity, macs=macs, parameters=parameters)
    check_options(score=score, scope=scope, round_to=round_to)
    if example_inputs is None:
        raise ValueError("example_inputs must be given to trace the network, got None")
    inputs = example_inputs if isinstance(example_inputs, tuple) else (example_inputs,)
    plan = ChannelPlan(module, inputs, include=include, exclude=exclude, protect_ends=protect_ends, round_to=round_to)
    scores = [score_units(module, group, score, generator=generator) for group in plan.groups]
    kept = plan.kept(target, scores, progress=1.0, scope=scope)
    return remove_(module, plan, kept, inputs, optimizers=[optimizer] if optimizer else [])


def remove_(
    module: nn.Module,
    plan: ChannelPlan,
    kept: Sequence[Tensor],
    example_inputs: tuple[Any, ...],
    *,
    optimizers: Iterable[Optimizer] = (),
) -> SlimReport:
    """Remove units from a network, and prove on the example inputs that zeroing them gives the same outputs.

    Raises:
        RuntimeError: If the outputs differ by more than 1e-5 of the largest; the network is then as it was.
    """
    before = widths_of(module)
    macs, parameters = (
        (plan.macs([torch.ones(g.units) for g in plan.groups]), plan.macs(kept)),
        _parameter_count(module),
    )
    slimmed = copy.deepcopy(module)
    zeroed = copy.deepcopy(module)
    zero_units_(zeroed, plan.groups, kept)
    remove_units_(slimmed, plan.groups, kept)
    expected, outputs = _eval(zeroed, example_inputs), _eval(slimmed, example_inputs)
    scale = max(1.0, *(float(tensor.abs().max()) for tensor in expected))
    worst = max(float((a - b).abs().max()) for a, b in zip(expected, outputs, strict=True))
    difference = worst / scale
    if not difference <= _TOLERANCE:
        raise RuntimeError(
            f"outputs must not change when zeroed channels are removed, got a difference of {difference:.1e}: please"
            " report the network; nothing was removed"
        )
    remove_units_(module, plan.groups, kept, optimizers=list(optimizers))
    manifest = changed_widths(before, widths_of(module))
    return SlimReport(manifest, macs, (parameters, _parameter_count(module)), plan.protected, difference)


def score_units(
    module: nn.Module, group: ChannelGroup, score: str | ChannelScore, *, generator: torch.Generator | None = None
) -> Tensor:
    """Return the importance of the units of a group, float32 at least 0, shape (units,), on the CPU.

    Raises:
        ValueError: If the score needs what is not there: gradients, or a batch norm; or a callable's answer is wrong.
    """
    if callable(score):
        scores = score(module, group).detach().float().cpu()
        if scores.shape != (group.units,) or not bool((scores >= 0).all()):
            raise ValueError(f"score must return {group.units} numbers of at least 0, got {tuple(scores.shape)}")
        return scores
    if score == "random":
        return torch.rand(group.units, generator=generator)
    if score == "taylor":
        return unit_taylor(module, group).square()
    if score == "bn_scale":
        return _bn_scale(module, group)
    power = 1 if score == "l1" else 2
    total = torch.zeros(group.units)
    layers = dict(module.named_modules())
    for side, units in group.members.items():
        layer = layers[side.layer]
        weight = weight_of(layer)
        if weight is not None:
            norms = sum_per_channel(weight.detach().float().abs().pow(power), layer, output=side.is_output)
            # The mean over a layer's channels is 1: a layer of large fan-in does not drown the others.
            total += (norms / norms.mean().clamp_min(1e-30))[units].sum(1)
    return total if power == 1 else total.sqrt()


def unit_taylor(module: nn.Module, group: ChannelGroup) -> Tensor:
    """Return for each unit the sum of weight times gradient over what it emits: the first-order change of the loss.

    Raises:
        ValueError: If there are no gradients.
    """
    layers = dict(module.named_modules())
    total = torch.zeros(group.units)
    for side, units in group.members.items():
        layer = layers[side.layer]
        if not side.is_output or weight_of(layer) is None:
            continue  # what a unit emits counts once; its norm and its consumers see the same change
        for name in channel_tensors(layer, output=True):
            parameter = getattr(layer, name)
            if parameter.grad is None:
                raise ValueError(f"score 'taylor' must find gradients, got none in {side.layer}: call backward first")
            product = (parameter.detach() * parameter.grad).float()
            total += sum_per_channel(product, layer, output=True)[units].sum(1)
    return total


def _bn_scale(module: nn.Module, group: ChannelGroup) -> Tensor:
    layers = dict(module.named_modules())
    total = torch.zeros(group.units)
    found = False
    for side, units in group.members.items():
        layer = layers[side.layer]
        if isinstance(layer, nn.modules.batchnorm._BatchNorm) and isinstance(layer.weight, Tensor):
            found = True
            total += layer.weight.detach().float().abs().cpu()[units].mean(1)
    if not found:
        raise ValueError(
            f"score 'bn_scale' must find a batch norm in every group, got none at {group.name!r}: exclude it"
        )
    return total


def check_options(*, score: str | ChannelScore, scope: str, round_to: int) -> None:
    """Raise a ValueError unless the options of channel pruning are known."""
    if not callable(score) and score not in SCORES:
        raise ValueError(f"score must be one of {list(SCORES)} or a callable, got {score!r}")
    if scope not in ("global", "layer"):
        raise ValueError(f"scope must be 'global' or 'layer', got {scope!r}")
    if isinstance(round_to, bool) or not isinstance(round_to, int) or round_to < 1:
        raise ValueError(f"round_to must be a whole number of at least 1, got {round_to!r}")


def check_patterns(network: nn.Module, *, include: Sequence[str], exclude: Sequence[str]) -> None:
    """Raise a ValueError unless every pattern matches a linear or convolution layer."""
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


def channel_tensors_or_none(layer: nn.Module) -> Mapping[str, int]:
    """Return the tensors that have a layer's output channels; none for a layer that cannot be cut."""
    try:
        width(layer, output=True)
    except TypeError:
        return {}
    return channel_tensors(layer, output=True)


def _output_positions(network: nn.Module, example_inputs: tuple[Any, ...]) -> dict[str, float]:
    """Return how often each weight of a layer is used for one input row."""
    rows = len(flat_tensors(example_inputs)[0])
    copied = copy.deepcopy(network).eval()
    positions: dict[str, float] = {}
    for name, layer in copied.named_modules():
        if isinstance(layer, nn.MultiheadAttention):
            # Its output projection is never called as a module.
            def attend(layer: nn.Module, inputs: Any, output: Any, name: str = name) -> None:
                tokens = output[0].numel() / output[0].shape[-1] / rows
                for part in (name, f"{name}.out_proj"):
                    positions[part] = positions.get(part, 0) + tokens

            layer.register_forward_hook(attend)
        elif isinstance(layer, WEIGHTED):

            def count(layer: nn.Module, inputs: Any, output: Tensor, name: str = name) -> None:
                transposed = isinstance(layer, nn.modules.conv._ConvTransposeNd)
                counted = inputs[0] if transposed else output  # a transposed convolution works for every input
                positions[name] = positions.get(name, 0) + counted.numel() / rows / width(layer, output=not transposed)

            layer.register_forward_hook(count)
    with torch.random.fork_rng(devices=[]), torch.enable_grad():  # else an encoder layer takes a path past its modules
        copied(*example_inputs)
    return positions


@torch.no_grad()
def _eval(network: nn.Module, inputs: tuple[Any, ...]) -> list[Tensor]:
    with torch.random.fork_rng(devices=[]):
        return flat_tensors(network.eval()(*inputs))


def _parameter_count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _reasons(protected: Mapping[str, str]) -> str:
    by_reason: dict[str, list[str]] = {}
    for name, reason in protected.items():
        by_reason.setdefault(reason, []).append(name)
    return "left alone: " + ("; ".join(f"{', '.join(names)}: {why}" for why, names in by_reason.items()) or "nothing")
