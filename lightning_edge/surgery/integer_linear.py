"""Linear layers that hold integers, in arithmetic that every exporter can write; torchao chooses the integers."""

from collections.abc import Collection
from functools import cache
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torchao.quantization import (
    Int8DynamicActivationInt8WeightConfig,
    IntxWeightOnlyConfig,
    quantize_,
)
from torchao.quantization.granularity import PerAxis, PerGroup

LinearScheme = Literal["int8_dynamic", "int8_weight_only", "int4_weight_only"]
_HALF_RANGE = 127.5  # torchao's symmetric scale: the largest value / half of the 255 steps


class IntegerLinear(nn.Module):
    """A linear layer with weights integer x scale, computing in float.

    Args:
        weight: int8, shape (out_features, groups, in_features / groups).
        scale: float, one for each group, shape (out_features, groups, 1).
        bias: Shape (out_features,), or None.

    >>> layer = IntegerLinear(torch.ones(1, 2, 3, dtype=torch.int8), torch.tensor([[[0.5], [1.0]]]), None)
    >>> layer(torch.ones(1, 6)).item()
    4.5
    """

    def __init__(self, weight: Tensor, scale: Tensor, bias: nn.Parameter | None) -> None:
        super().__init__()
        self.weight: Tensor
        self.scale: Tensor
        self.register_buffer("weight", weight)
        self.register_buffer("scale", scale)
        self.bias = bias

    def forward(self, inputs: Tensor) -> Tensor:
        """Return inputs x weight + bias."""
        return F.linear(inputs, (self.weight.to(self.scale.dtype) * self.scale).flatten(1), self.bias)


class DynamicIntegerLinear(IntegerLinear):
    """A linear layer that rounds each row of its input to int8, with a scale of the row's own, and sums in int32.

    Args:
        weight: int8, shape (out_features, in_features).
        scale: One for each output, shape (out_features,).
        bias: Shape (out_features,), or None.
    """

    def forward(self, inputs: Tensor) -> Tensor:
        """Return inputs x weight + bias."""
        rows = inputs.flatten(0, -2) if inputs.ndim > 1 else inputs.unsqueeze(0)
        steps = (rows.abs().amax(1, keepdim=True) / _HALF_RANGE).clamp(min=torch.finfo(rows.dtype).eps)
        integers = torch.round(rows / steps).clamp(-128, 127).to(torch.int8)
        sums = _product(integers, self.weight.t()).to(rows.dtype)
        outputs = (sums * steps * self.scale).reshape(*inputs.shape[:-1], len(self.weight))
        return outputs if self.bias is None else outputs + self.bias


@cache
def integer_products_are_exact() -> bool:
    """Return whether ``torch._int_mm`` on this processor sums int8 products as integers.

    On x86 processors without VNNI its kernels add pairs of products in 16 bits, and sums beyond them are cut off.
    """
    largest = torch.full((32, 64), 127, dtype=torch.int8)
    return bool((torch._int_mm(largest, largest.t()) == 64 * 127**2).all())


def _product(left: Tensor, right: Tensor) -> Tensor:
    """Return the exact product of two int8 matrices."""
    if left.device.type != "cpu" or torch.compiler.is_compiling() or integer_products_are_exact():
        return torch._int_mm(left, right)
    return left.double() @ right.double()  # exact below 2**53


def integer_linear_(
    network: nn.Module, scheme: LinearScheme, *, group_size: int, keep: Collection[nn.Module] = ()
) -> tuple[str, ...]:
    """Put integer layers in the place of linear ones.

    Args:
        network: Changed in place; it must not be a linear layer itself.
        scheme: int8 has a scale for each output, int4 one for each ``group_size`` weights of it.
        group_size: Of int4; must divide the inputs of every layer.
        keep: Layers that stay in float.

    Returns:
        The names of the layers.

    Raises:
        ValueError: If there is no such layer, or ``group_size`` does not fit.
    """
    layers = {
        name: layer
        for name, layer in network.named_modules()
        # An attention reads the weight of its output projection itself.
        if isinstance(layer, nn.Linear) and not isinstance(layer, NonDynamicallyQuantizableLinear) and layer not in keep
    }
    if not layers or network in layers.values():
        raise ValueError(
            f"scheme {scheme!r} quantizes linear layers inside of a network, got a {type(network).__name__} without"
            " any that is not kept: a lone layer goes into nn.Sequential"
        )
    if group_size < 1:
        raise ValueError(f"group_size must be at least 1, got {group_size}")
    for name, layer in layers.items():
        if scheme == "int4_weight_only" and layer.in_features % group_size:
            raise ValueError(
                f"group_size must divide in_features={layer.in_features}, got {group_size}, layer {name!r}: choose"
                " another, or keep the layer in float"
            )
    chosen = set(layers.values())
    quantize_(network, _config(scheme, group_size), filter_fn=lambda layer, _: layer in chosen)
    for name, layer in layers.items():
        owner, _, leaf = name.rpartition(".")
        setattr(network.get_submodule(owner), leaf, _replacement(layer, scheme))
        parent = network.get_submodule(owner)
        if isinstance(parent, nn.TransformerEncoderLayer):
            parent.activation_relu_or_gelu = 0  # keeps it from its fused path, which reads the weights itself
    return tuple(layers)


def _config(scheme: LinearScheme, group_size: int) -> Int8DynamicActivationInt8WeightConfig | IntxWeightOnlyConfig:
    if scheme == "int8_dynamic":
        return Int8DynamicActivationInt8WeightConfig(set_inductor_config=False)
    if scheme == "int8_weight_only":
        return IntxWeightOnlyConfig(weight_dtype=torch.int8, granularity=PerAxis(0))
    int4: torch.dtype = torch.int4  # type: ignore[attr-defined]  # torch does not declare it
    return IntxWeightOnlyConfig(weight_dtype=int4, granularity=PerGroup(group_size))


def _replacement(layer: nn.Linear, scheme: LinearScheme) -> nn.Module:
    weight = layer.weight
    integers, scale = weight.qdata, weight.scale  # type: ignore[attr-defined]  # torchao's tensor
    bias = layer.bias if isinstance(layer.bias, nn.Parameter) else None
    if scheme == "int8_dynamic":
        return DynamicIntegerLinear(integers.clone(), scale.flatten().clone(), bias)
    groups = scale.shape[1]
    return IntegerLinear(integers.reshape(len(integers), groups, -1).clone(), scale.unsqueeze(2).clone(), bias)
