"""Cut channels out of layers: parameters, buffers, sizes and the optimizer's moments, in place."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.optim import Optimizer
from torch.utils._pytree import tree_leaves


@dataclass(frozen=True)
class Side:
    """One side of a layer: its outputs (``out``) or its inputs (``in``)."""

    layer: str
    side: str

    @property
    def is_output(self) -> bool:
        """Whether it is the output side."""
        return self.side == "out"


def is_depthwise(layer: nn.Module) -> bool:
    """Return whether every output channel of a convolution sees one input channel, its own.

    >>> is_depthwise(nn.Conv2d(4, 4, 3, groups=4))
    True
    """
    return isinstance(layer, _ConvNd) and layer.groups == layer.in_channels == layer.out_channels > 1


def width(layer: nn.Module, *, output: bool) -> int:
    """Return how many channels (features) a layer has on one side.

    Raises:
        TypeError: If layers of this kind cannot be cut; names the kind.

    >>> width(nn.Linear(3, 5), output=True)
    5
    """
    if isinstance(layer, _ConvNd):
        return layer.out_channels if output else layer.in_channels
    if isinstance(layer, nn.Linear):
        return layer.out_features if output else layer.in_features
    if isinstance(layer, _NormBase):
        return layer.num_features
    if isinstance(layer, nn.PReLU):
        return layer.num_parameters
    if isinstance(layer, nn.MultiheadAttention) and layer.in_proj_weight is not None and output:
        return layer.in_proj_weight.shape[0]
    raise TypeError(f"{type(layer).__name__} mixes or orders channels in a way that is not known here")


def channel_tensors(layer: nn.Module, *, output: bool) -> dict[str, int]:
    """Return the parameters and buffers of a layer that have its channels on one side, with the dimension.

    Args:
        layer: A convolution, linear layer, batch or instance norm, PReLU, or attention (its fused projection).
        output: Which side; all but convolutions and linear layers have only outputs.

    >>> channel_tensors(nn.Linear(3, 5), output=True)
    {'weight': 0, 'bias': 0}
    """
    if isinstance(layer, _ConvTransposeNd):
        dimensions = {"weight": 1, "bias": 0} if output else {"weight": 0}
    elif isinstance(layer, _ConvNd | nn.Linear):
        dimensions = {"weight": 0, "bias": 0} if output else {"weight": 1}
    elif isinstance(layer, nn.MultiheadAttention):
        dimensions = {"in_proj_weight": 0, "in_proj_bias": 0}
    else:
        dimensions = {"weight": 0, "bias": 0, "running_mean": 0, "running_var": 0}
    return {name: dim for name, dim in dimensions.items() if isinstance(getattr(layer, name, None), Tensor)}


def weight_of(layer: nn.Module) -> Tensor | None:
    """Return the matrix or kernel that a layer multiplies with, or None if it has none.

    >>> weight_of(nn.ReLU()) is None
    True
    """
    if isinstance(layer, _ConvNd | nn.Linear):
        return layer.weight
    return layer.in_proj_weight if isinstance(layer, nn.MultiheadAttention) else None


def sum_per_channel(values: Tensor, layer: nn.Module, *, output: bool) -> Tensor:
    """Sum a tensor of a layer's weight (or bias) shape over everything but its channels on one side.

    >>> sum_per_channel(torch.ones(5, 3), nn.Linear(3, 5), output=False)
    tensor([5., 5., 5.])
    """
    dim = next(iter(channel_tensors(layer, output=output).values()))  # the weight's
    sums = values.transpose(0, dim).flatten(1).sum(1) if values.ndim > 1 else values
    if isinstance(layer, _ConvNd) and layer.groups > 1 and not output:
        sums = sums.repeat(layer.groups)  # inputs of a grouped convolution: each group sees its own
    return sums.cpu()


@torch.no_grad()
def cut_(module: nn.Module, kept: Mapping[Side, Tensor], *, optimizers: Iterable[Optimizer] = ()) -> None:
    """Keep only some channels of some layers.

    Parameters stay the same objects, so that optimizers, tied names and whoever holds them keep them; gradients are
    dropped. In the optimizers, every state tensor of a parameter's shape (momentum, both moments of Adam) is cut alike,
    and every one that has dimensions of 1 in their place (the rows and columns of Adafactor) in the others.

    Args:
        module: Changed in place.
        kept: For a side of a layer, the indices of the channels that stay, increasing.
        optimizers: Whose states are cut too.

    Raises:
        ValueError: If an optimizer's state cannot be cut; nothing has changed then.
    """
    check_states(module, optimizers)
    layers = dict(module.named_modules())
    for side, indices in kept.items():
        layer = layers[side.layer]
        for name, dim in channel_tensors(layer, output=side.is_output).items():
            tensor = getattr(layer, name)
            local = indices.to(tensor.device)
            if isinstance(layer, _ConvNd) and layer.groups > 1 and not side.is_output:
                per_group = layer.in_channels // layer.groups  # the same inputs of every group stay
                local = torch.unique(local % per_group)
            _cut_tensor(tensor, dim, local, optimizers)
        resize(layer, len(indices), output=side.is_output)


def check_states(module: nn.Module, optimizers: Iterable[Optimizer]) -> None:
    """Raise a ValueError unless everything that the optimizers hold of a network can be cut with its parameters.

    >>> line = nn.Linear(2, 3)
    >>> check_states(line, [torch.optim.Adam(line.parameters())])
    """
    for optimizer in optimizers:
        for name, parameter in module.named_parameters():
            for key, value in optimizer.state.get(parameter, {}).items():
                if not _can_follow(value, parameter.shape):
                    raise ValueError(
                        "optimizer must hold states that can be cut with the weights, got"
                        f" {type(optimizer).__name__} with {key!r} of another shape than {name!r},"
                        f" {tuple(parameter.shape)}: take another optimizer, or cut before its first step"
                    )


def _can_follow(value: Any, shape: torch.Size) -> bool:
    """Return whether what an optimizer holds of a parameter can be cut with it; single numbers stay as they are."""
    tensors = [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor) and leaf.numel() > 1]
    return not tensors or (isinstance(value, Tensor) and _follows(value, shape))


def _follows(state: Tensor, shape: torch.Size) -> bool:
    """Return whether a state has the dimensions of its parameter, or 1 in their place."""
    return state.ndim == len(shape) and all(size in (1, full) for size, full in zip(state.shape, shape, strict=True))


def resize(layer: nn.Module, size: int, *, output: bool) -> None:
    """Set what a layer says of its own width on one side.

    >>> layer = nn.Linear(3, 5)
    >>> resize(layer, 4, output=True); layer.out_features
    4
    """
    if isinstance(layer, _ConvNd):
        if is_depthwise(layer):
            layer.groups = layer.in_channels = layer.out_channels = size
        elif output:
            layer.out_channels = size
        else:
            layer.in_channels = size
    elif isinstance(layer, nn.Linear):
        setattr(layer, "out_features" if output else "in_features", size)
    elif isinstance(layer, nn.PReLU):
        layer.num_parameters = size
    elif isinstance(layer, _NormBase):
        layer.num_features = size


def _cut_tensor(tensor: Tensor, dim: int, indices: Tensor, optimizers: Iterable[Optimizer]) -> None:
    shape = tensor.shape
    tensor.data = tensor.data.index_select(dim, indices)
    tensor.grad = None
    for optimizer in optimizers:
        state: dict[str, Any] = optimizer.state.get(tensor, {})
        for key, value in state.items():
            if isinstance(value, Tensor) and _follows(value, shape) and value.shape[dim] == shape[dim]:
                state[key] = value.index_select(dim, indices)
