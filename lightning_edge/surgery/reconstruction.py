"""Refit the layers that read removed channels, so that they give again what they gave before."""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_edge.surgery.capture import training_flags
from lightning_edge.surgery.coupling import ChannelGroup
from lightning_edge.surgery.slicing import is_depthwise

_POSITIONS = 2**15  # of each batch and layer: more says nothing new
_RIDGE = 1e-3  # of the mean square of an input, towards the weight as it is
_SEED = 0

Refittable = nn.Linear | nn.Conv1d | nn.Conv2d


@torch.no_grad()
def reconstruct_(
    module: nn.Module, reference: nn.Module, layers: Sequence[str], batches: Iterable[tuple[Any, ...]]
) -> None:
    """Refit layers by least squares to their outputs in another network (He et al. 2017, arXiv:1707.06168).

    Layer by layer, in the order in which they are called: what a layer reads in ``module``, errors of earlier layers
    included, is to give what the same layer gives in ``reference``. Ridge regression towards the present weight; inputs
    that are zero everywhere keep theirs. Both networks run in evaluation mode.

    Args:
        module: The network whose channels are zero; these layers' weights and biases are changed.
        reference: The same network before.
        layers: Names of linear or convolution layers, each called once.
        batches: Positional inputs; kept in memory, and run once for every layer.

    Raises:
        ValueError: If there is no batch, or a layer is not called.

    >>> from lightning_edge.surgery.copying import copied
    >>> network, data = nn.Sequential(nn.Linear(1, 2), nn.Linear(2, 1)), torch.linspace(-1, 1, 64)[:, None]
    >>> with torch.no_grad(): _ = [nn.init.ones_(parameter) for parameter in network.parameters()]
    >>> dense = copied(network)
    >>> with torch.no_grad(): _ = network[0].weight[0].zero_(), network[0].bias[0].zero_()
    >>> reconstruct_(network, dense, ["1"], [(data,)]); bool((network(data) - dense(data)).abs().max() < 0.01)
    True
    """
    inputs = list(batches)
    if not inputs:
        raise ValueError("batches must hold at least one batch to refit layers on, got none")
    with training_flags(module, False), training_flags(reference, False):
        for name in _in_order(reference, layers, inputs[0]):
            _refit_(module, reference, name, inputs)


def readers(module: nn.Module, groups: Iterable[ChannelGroup], kept: Iterable[Tensor]) -> list[str]:
    """Return the layers that read channels which do not stay, and that can be refit.

    >>> from lightning_edge.surgery.slicing import Side
    >>> units = torch.tensor([[0], [1]])
    >>> group = ChannelGroup("0", {Side("0", "out"): units, Side("1", "in"): units})
    >>> readers(nn.Sequential(nn.Linear(1, 2), nn.Linear(2, 1)), [group], [torch.tensor([True, False])])
    ['1']
    """
    layers = dict(module.named_modules())
    found = {
        side.layer: None
        for group, mask in zip(groups, kept, strict=True)
        if not bool(mask.all())
        for side in group.members
        if not side.is_output and _can_refit(layers[side.layer])
    }
    return list(found)


def _can_refit(layer: nn.Module) -> bool:
    if isinstance(layer, nn.Linear):
        return True
    return isinstance(layer, nn.Conv1d | nn.Conv2d) and layer.groups == 1 and not is_depthwise(layer)


def _in_order(network: nn.Module, names: Sequence[str], inputs: tuple[Any, ...]) -> list[str]:
    """Return the names in the order of their first calls."""
    called: dict[str, None] = {}
    handles = [
        network.get_submodule(name).register_forward_pre_hook(lambda *_, name=name: called.setdefault(name))
        for name in names
    ]
    network(*inputs)
    for handle in handles:
        handle.remove()
    if missing := [name for name in names if name not in called]:
        raise ValueError(f"layers must be called by the network, got {missing[:3]}, which it does not call")
    return list(called)


def _refit_(module: nn.Module, reference: nn.Module, name: str, batches: Sequence[tuple[Any, ...]]) -> None:
    layer = module.get_submodule(name)
    assert isinstance(layer, Refittable)
    read: list[Tensor] = []
    given: list[Tensor] = []
    handles = [
        layer.register_forward_pre_hook(lambda _, args: read.append(args[0])),
        reference.get_submodule(name).register_forward_hook(lambda _, args, output: given.append(output)),
    ]
    generator = torch.Generator().manual_seed(_SEED)
    present = _flat(layer)
    gram, target = present.new_zeros(present.shape[1], present.shape[1]), torch.zeros_like(present)
    for inputs in batches:
        module(*inputs)
        reference(*inputs)
        rows, wanted = _rows(layer, read.pop()), _outputs(layer, given.pop())
        chosen = torch.randperm(len(rows), generator=generator)[:_POSITIONS].to(rows.device)
        rows, wanted = rows[chosen].double(), wanted[chosen].double()
        gram += rows.T @ rows
        target += wanted.T @ rows
    for handle in handles:
        handle.remove()
    live = gram.diagonal() > 0
    ridge = _RIDGE * gram.diagonal()[live].mean()
    solved = torch.linalg.solve(
        gram[live][:, live] + ridge * torch.eye(int(live.sum()), dtype=gram.dtype, device=gram.device),
        (target[:, live] + ridge * present[:, live]).T,
    ).T
    present[:, live] = solved
    if layer.bias is not None:
        layer.bias.copy_(present[:, -1])
        present = present[:, :-1]
    layer.weight.copy_(present.view_as(layer.weight))


def _flat(layer: Refittable) -> Tensor:
    """Return weight and bias as one matrix in double precision, (outputs, inputs and 1 for a bias)."""
    weight = layer.weight.flatten(1).double()
    return weight if layer.bias is None else torch.cat([weight, layer.bias.double()[:, None]], dim=1)


def _rows(layer: Refittable, values: Tensor) -> Tensor:
    """Return what each output position reads, (positions, inputs), with a column of ones for a bias."""
    if isinstance(layer, nn.Linear):
        rows = values.flatten(0, -2)
    else:
        mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
        padded = F.pad(values, layer._reversed_padding_repeated_twice, mode=mode)
        options = [layer.kernel_size, layer.dilation, layer.stride]
        if isinstance(layer, nn.Conv1d):
            padded, options = padded.unsqueeze(2), [(1, *option) for option in options]
        kernel, dilation, stride = options
        rows = F.unfold(padded, kernel, dilation=dilation, stride=stride).transpose(1, 2).flatten(0, 1)
    return rows if layer.bias is None else torch.cat([rows, rows.new_ones(len(rows), 1)], dim=1)


def _outputs(layer: Refittable, values: Tensor) -> Tensor:
    """Return the outputs, (positions, outputs), in the order of :func:`_rows`."""
    return values.flatten(0, -2) if isinstance(layer, nn.Linear) else values.flatten(2).transpose(1, 2).flatten(0, 1)
