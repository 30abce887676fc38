"""Remove whole channels: the network gets narrower, and every runtime gets faster."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_edge.surgery.calibration import calibration_inputs
from lightning_edge.surgery.channel_plan import ChannelPlan, Target
from lightning_edge.surgery.channel_scores import SCORES, ChannelScore, score_units
from lightning_edge.surgery.copying import copied
from lightning_edge.surgery.coupling import remove_units_, zero_units_
from lightning_edge.surgery.distillation import recorded
from lightning_edge.surgery.outputs import flat_tensors
from lightning_edge.surgery.reconstruction import readers, reconstruct_
from lightning_edge.surgery.selection import check_built
from lightning_edge.surgery.widths import Manifest, changed_widths, read_widths, rebuild_, widths_of

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


def slim_channels_(  # noqa: PLR0913 - every option once, by keyword
    module: nn.Module,
    manifest: Mapping[str, Mapping[str, int]] | None = None,
    *,
    example_inputs: tuple[Any, ...] | Tensor | None = None,
    sparsity: float | None = None,
    macs: float | None = None,
    parameters: float | None = None,
    score: str | ChannelScore = "l2",
    scope: Literal["global", "layer"] = "global",
    round_to: int = 8,
    include: Sequence[str] = ("*",),
    exclude: Sequence[str] = (),
    protect_ends: bool = True,
    optimizer: Optimizer | None = None,
    generator: torch.Generator | None = None,
    calibration: Any = None,
) -> SlimReport:
    """Remove the channels and attention heads of least importance from a network, physically.

    Channels that only go together (residual additions, concatenations, depthwise and grouped convolutions, batch norms,
    linear layers behind a flattening, heads of an attention) are removed together; what cannot be followed is left
    alone and named in the report. The parameters stay the same objects with smaller data.

    Args:
        module: The network; changed in place.
        manifest: Instead of a target: sizes that an earlier call reported (or a checkpoint carries); the plain network
            gets these shapes, its weights are then loaded with ``load_state_dict``.
        example_inputs: What it is called with, a tensor or a tuple; two rows suffice. Not needed with ``manifest``.
        sparsity: Fraction of the removable channels that goes, in (0, 1).
        macs: Instead: fraction of the network's multiply-accumulates that may stay, in (0, 1).
        parameters: Instead: fraction of the network's parameters that may stay, in (0, 1).
        score: ``"l2"`` or ``"l1"`` norm of the weights of a unit in all its layers, ``"taylor"`` (squared sum of weight
            times gradient, Molchanov et al. 2019, arXiv:1906.10771; call ``backward`` first), ``"bn_scale"`` (the
            norm's |weight|, Liu et al. 2017, arXiv:1708.06519), ``"random"``, or a function from the network and a
            group to the importance of its units, at least 0.
        scope: ``"global"`` compares the units of all groups, ``"layer"`` narrows all groups alike.
        round_to: Widths stay multiples of this.
        include: Layers whose outputs may be cut, globs over names or class names.
        exclude: Layers whose outputs may not be cut.
        protect_ends: Leave the outputs of the first layer alone too.
        optimizer: Whose momentum, moments and their rows and columns are cut alike, so that training goes on.
        generator: For ``score="random"``.
        calibration: An iterable of batches, or a data module, as ``quantize`` takes it: the layers that read removed
            channels are refit on up to 16 of its batches, by least squares, to what they gave before (He et al. 2017,
            arXiv:1707.06168). Without training that is worth most of the accuracy.

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
        check_built(module)
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
    before = copied(module)
    try:
        if calibration is not None:
            zero_and_refit_(module, plan, kept, list(calibration_inputs(calibration, module)))
        return remove_(module, plan, kept, inputs, optimizers=[optimizer] if optimizer else [])
    except BaseException:
        if widths_of(module) == widths_of(before):
            module.load_state_dict(before.state_dict())
        raise


def zero_and_refit_(
    module: nn.Module, plan: ChannelPlan, kept: Sequence[Tensor], batches: Sequence[tuple[Any, ...]]
) -> None:
    """Set units to zero, and refit the layers that read them; see :mod:`lightning_edge.surgery.reconstruction`."""
    before = copied(module)
    zero_units_(module, plan.groups, kept)
    reconstruct_(module, before, readers(module, plan.groups, kept), batches)
    zero_units_(module, plan.groups, kept)  # outputs of a refit layer that go themselves


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
    slimmed = copied(module)
    zeroed = copied(module)
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


@torch.no_grad()
def narrowed_layers(
    module: nn.Module, plan: ChannelPlan, layers: Sequence[str], example_inputs: tuple[Any, ...]
) -> list[str]:
    """Return which of the layers would give outputs of other shapes if all that the plan may cut were cut.

    Args:
        module: The network of the plan; not changed.
        plan: What may be cut.
        layers: Qualified names; a layer that cuts nothing itself hands on what a narrow one gives it.
        example_inputs: What the network is called with.

    >>> network = nn.Sequential(nn.Linear(4, 32), nn.ReLU(), nn.Linear(32, 2))
    >>> plan = ChannelPlan(network, (torch.ones(2, 4),), protect_ends=False)
    >>> narrowed_layers(network, plan, ["1", "2"], (torch.ones(2, 4),))
    ['1']
    """
    slimmed = copied(module).eval()
    remove_units_(slimmed, plan.groups, [torch.arange(group.units) == 0 for group in plan.groups])
    shapes = []
    for network in (copied(module).eval(), slimmed):
        with recorded(network, layers) as calls, torch.random.fork_rng(devices=[]):
            network(*example_inputs)
        shapes.append({name: features.shape for name, features in calls[0].features.items()})
    return [name for name in layers if shapes[0].get(name) != shapes[1].get(name)]


def check_options(*, score: str | ChannelScore, scope: str, round_to: int) -> None:
    """Raise a ValueError unless the options of channel pruning are known."""
    if not callable(score) and score not in SCORES:
        raise ValueError(f"score must be one of {list(SCORES)} or a callable, got {score!r}")
    if scope not in ("global", "layer"):
        raise ValueError(f"scope must be 'global' or 'layer', got {scope!r}")
    if isinstance(round_to, bool) or not isinstance(round_to, int) or round_to < 1:
        raise ValueError(f"round_to must be a whole number of at least 1, got {round_to!r}")


@torch.no_grad()
def _eval(network: nn.Module, inputs: tuple[Any, ...]) -> list[Tensor]:
    with torch.random.fork_rng(devices=[]):
        return flat_tensors(network.eval()(*inputs))


def _parameter_count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
