"""How much each unit of a group of coupled channels matters."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from lightning_edge.surgery.coupling import ChannelGroup
from lightning_edge.surgery.slicing import channel_tensors, sum_per_channel, weight_of

ChannelScore = Callable[[nn.Module, ChannelGroup], Tensor]
SCORES = ("l1", "l2", "taylor", "bn_scale", "random")


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
