"""Remove the channels and neurons that unstructured pruning has left without an input or without an output."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from lightning_edge.surgery.captured import captured_of
from lightning_edge.surgery.copying import copied
from lightning_edge.surgery.coupling import (
    ChannelGroup,
    coupled_groups,
    kept_sides,
    remove_units_,
    zero_units_,
)
from lightning_edge.surgery.outputs import flat_tensors
from lightning_edge.surgery.quantization import capture_, release_
from lightning_edge.surgery.slicing import Side, is_depthwise, sum_per_channel, weight_of
from lightning_edge.surgery.unit_flow import ConsumerView
from lightning_edge.surgery.widths import Manifest, changed_widths, widths_of

_TOLERANCE = 1e-5


@dataclass(frozen=True)
class DeadUnitsReport:
    """What :func:`remove_dead_units_` did.

    Attributes:
        removed: Name of the group (its first layer) to how many of its units went.
        manifest: Sizes of the layers that changed, for ``slim_channels_(plain, manifest=...)``.
        difference: Largest difference of the outputs on the example inputs, over the largest output (or 1, if that is
            larger).
    """

    removed: Mapping[str, int]
    manifest: Manifest
    difference: float

    @property
    def count(self) -> int:
        """How many units went."""
        return sum(self.removed.values())


@torch.no_grad()
def remove_dead_units_(module: nn.Module, *, example_inputs: tuple[Any, ...] | Tensor) -> DeadUnitsReport:
    """Remove units that change no output in evaluation mode, and fold the constants that some of them emit.

    A unit (a channel, a neuron, an attention head) is dead when nothing reads it, or when all its weights are zero: it
    then emits a constant, which is added to its consumers' biases, or to the running mean of the batch norm behind a
    consumer without one. A constant that cannot be folded (the consumer pads with zeros) is left alone, and so is a
    unit that meets other data, or an operation that is not known, before its consumers. This goes on until nothing is
    dead: in a 98 %-sparse LeNet-300-100, most hidden units go.

    A network under quantization-aware training stays so: it is captured again with the ranges that it had, and only
    units that emit zero are taken for dead.

    Args:
        module: The network; changed in place. Its outputs in evaluation mode stay, its training would not.
        example_inputs: What it is called with, a tensor or a tuple; two rows suffice.

    Returns:
        How many units went; a network without dead units stays as it is.

    Raises:
        RuntimeError: If the outputs changed by more than 1e-5 of the largest; the network is then as it was.

    >>> network = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 4))
    >>> with torch.no_grad(): _ = network[0].weight[1].zero_()
    >>> remove_dead_units_(network, example_inputs=torch.ones(2, 2)).removed
    {'0': 1}
    """
    inputs = example_inputs if isinstance(example_inputs, tuple) else (example_inputs,)
    if captured_of(module) is not None:
        return _remove_captured_(module, inputs)
    return _remove_(module, inputs, fold=True)[0]


def _remove_captured_(module: nn.Module, inputs: tuple[Any, ...]) -> DeadUnitsReport:
    """Remove from the plain network, and capture it again with the observers that it had."""
    captured = vars(module)["forward"]
    observers = captured.observer_state()
    release_(module)
    try:
        # The integers of a constant are not the constant: none is folded but zero.
        report, kept = _remove_(module, inputs, fold=False)
    except BaseException:
        module.forward = captured
        raise
    for side, indices in kept.items():
        for key in [key for key in observers if side.is_output and key.startswith(f"{side.layer}.weight.")]:
            observers[key] = observers[key][indices.to(observers[key].device)]  # one for each output channel
    inputs = tuple(value[:2] for value in inputs)
    capture_(
        module,
        inputs,
        observers=observers,
        frozen=captured.observers_frozen,
        keep=captured.keep,
        weight_bits=captured.weight_bits,
        learned_steps=captured.learned_steps,
    )
    return report


def _remove_(module: nn.Module, inputs: tuple[Any, ...], *, fold: bool) -> tuple[DeadUnitsReport, dict[Side, Tensor]]:
    """Remove dead units; return the report, and which channels stay on the sides that lost some."""
    groups = [group for group in coupled_groups(module, inputs).groups if group.heads is None]
    before, was_training = widths_of(module), module.training
    trial = copied(module).eval()
    expected = _run(trial, inputs)
    alive = [torch.ones(group.units, dtype=torch.bool) for group in groups]
    while True:
        found = False
        for group, mask in zip(groups, alive, strict=True):
            dead = _dead_(trial, group, mask, inputs, fold=fold)
            mask &= ~dead
            found = found or bool(dead.any())
            # Zero everywhere: those before may have lost their last reader, those behind their last input.
            zero_units_(trial, [group], [mask])
        if not found:
            break
    remove_units_(trial, groups, alive)
    outputs = _run(trial, inputs)
    worst = max(float((a - b).abs().max()) for a, b in zip(expected, outputs, strict=True))
    scale = max(1.0, *(float(tensor.abs().max()) for tensor in expected))
    difference = worst / scale
    if not difference <= _TOLERANCE:
        raise RuntimeError(
            f"outputs must not change when dead units are removed, got a difference of {difference:.1e}: please report"
            " the network; nothing was removed"
        )
    kept = kept_sides(groups, alive, module)
    remove_units_(module, groups, alive)
    module.load_state_dict(trial.state_dict())
    module.train(was_training)
    removed = {group.name: int((~mask).sum()) for group, mask in zip(groups, alive, strict=True)}
    manifest = changed_widths(before, widths_of(module))
    return DeadUnitsReport({name: n for name, n in removed.items() if n}, manifest, difference), kept


def _dead_(trial: nn.Module, group: ChannelGroup, alive: Tensor, inputs: tuple[Any, ...], *, fold: bool) -> Tensor:
    """Return which units of a group are dead and not gone yet; what they emit has then been folded."""
    layers = dict(trial.named_modules())
    read = torch.zeros(group.units, dtype=torch.bool)
    fed = torch.zeros(group.units, dtype=torch.bool)
    for side, units in group.members.items():
        layer = layers[side.layer]
        weight = weight_of(layer)
        if weight is None or (side.is_output and is_depthwise(layer)):
            continue  # what passes a unit on neither reads nor feeds it
        used = (sum_per_channel((weight != 0).float(), layer, output=side.is_output) > 0)[units].any(1)
        if side.is_output:
            fed |= used
        else:
            read |= used
    silent = alive & ~read
    constant = alive & read & ~fed
    if bool((silent | constant).eq(alive).all()):
        # A layer of no channels runs nowhere: one stays.
        first = int(alive.nonzero()[0])
        silent[first] = constant[first] = False
    return silent | _fold_(trial, group, constant, inputs, fold=fold) if bool(constant.any()) else silent


def _fold_(trial: nn.Module, group: ChannelGroup, constant: Tensor, inputs: tuple[Any, ...], *, fold: bool) -> Tensor:
    """Add what units without inputs emit to their consumers; return for which units that was possible."""
    layers = dict(trial.named_modules())
    consumers = {side: units for side, units in group.members.items() if not side.is_output}
    seen = ConsumerView(trial, group, inputs)
    folded = constant.clone()
    for side, units in consumers.items():
        if side.layer not in seen.ranges:
            return torch.zeros_like(constant)  # not called, or constant on the example inputs alone
        low, high = seen.ranges[side.layer]
        flat = (high - low) <= _TOLERANCE * 0.1 * torch.maximum(high.abs(), torch.ones(()))
        takes_all = fold and _takes_constants(layers[side.layer], seen.norms.get(side.layer))
        takes = flat if takes_all else flat & (high == 0)
        folded &= takes[units].all(1)
    for side, units in consumers.items():
        layer = layers[side.layer]
        emitted = torch.zeros_like(seen.ranges[side.layer][1])
        channels = units[folded].flatten()
        emitted[channels] = seen.ranges[side.layer][1][channels]
        if not bool(emitted.any()):
            continue
        shift = _response(layer, emitted)
        bias = getattr(layer, "bias", None)
        if isinstance(bias, Tensor):
            bias.data += shift.to(bias)
        else:
            norm = seen.norms[side.layer]
            assert isinstance(norm.running_mean, Tensor)
            norm.running_mean -= shift.to(norm.running_mean)
    return folded


def _takes_constants(layer: nn.Module, norm: _BatchNorm | None) -> bool:
    """Return whether a constant input channel of a layer is the same as another bias."""
    if isinstance(layer, _ConvTransposeNd):
        return False  # the number of kernel positions that reach an output differs with the stride
    if isinstance(layer, _ConvNd) and layer.padding_mode == "zeros":
        padded = layer.padding == "same" if isinstance(layer.padding, str) else any(layer.padding)
        if padded and any(size > 1 for size in layer.kernel_size):
            return False  # at the border the padding's zeros come in
    return getattr(layer, "bias", None) is not None or (norm is not None and norm.running_mean is not None)


def _response(layer: nn.Module, emitted: Tensor) -> Tensor:
    """Return what constant input channels add to each output channel of a layer."""
    weight = weight_of(layer)
    assert weight is not None
    kernel_sums = weight.detach().cpu().flatten(2).sum(2) if weight.ndim > 2 else weight.detach().cpu()
    groups = getattr(layer, "groups", 1)
    seen = emitted.view(groups, -1).repeat_interleave(len(kernel_sums) // groups, 0)
    return (kernel_sums.double() * seen.double()).sum(1)


def _run(network: nn.Module, inputs: tuple[Any, ...]) -> list[Tensor]:
    with torch.random.fork_rng(devices=[]):
        return flat_tensors(network(*inputs))
