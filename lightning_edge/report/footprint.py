"""How much a network weighs and computes, layer by layer."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode


@dataclass(frozen=True)
class LayerFootprint:
    """Counts of one layer; its weights are its parameters of at least two dimensions (no bias, no norm).

    ``distinct`` counts the different values among the weights, zero included; ``effective_macs`` are the
    multiply-accumulates whose weight is not zero.
    """

    name: str
    kind: str
    parameters: int
    weights: int
    nonzero: int
    distinct: int
    macs: int
    effective_macs: int

    @property
    def weight_bytes(self) -> int:
        """Bytes of all parameters in fp32."""
        return 4 * self.parameters

    @property
    def kept(self) -> float:
        """Fraction of the weights that are not zero; 1 for a layer without weights."""
        return self.nonzero / self.weights if self.weights else 1.0


@dataclass(frozen=True)
class Footprint:
    """Counts of a network and of each layer that has parameters, for one input (batch 1)."""

    layers: tuple[LayerFootprint, ...]
    parameters: int
    macs: int
    effective_macs: int

    @property
    def weight_bytes(self) -> int:
        """Bytes of all parameters in fp32; buffers (running statistics) are not counted."""
        return 4 * self.parameters

    @property
    def weights(self) -> int:
        """Weights of all layers."""
        return sum(layer.weights for layer in self.layers)

    @property
    def nonzero(self) -> int:
        """Weights that are not zero."""
        return sum(layer.nonzero for layer in self.layers)

    @property
    def sparsity(self) -> float:
        """Fraction of zeros among the weights."""
        return 1.0 - self.nonzero / self.weights if self.weights else 0.0


def footprint(network: nn.Module, example_inputs: Sequence[Tensor]) -> Footprint:
    """Return the parameters, weights and multiply-accumulates of a network, for one input.

    Multiply-accumulates are half the operations that ``FlopCounterMode`` counts (matrix products and convolutions; a
    padded border counts as computed). Those with a zero weight are taken in proportion to a layer's zeros. It is the
    class's own ``forward`` that runs, also when quantization-aware training has put its graph into the instance.

    Args:
        network: Counted in eval mode; its modes and values are as before afterwards.
        example_inputs: Arguments of ``forward``; of each tensor only the first item of the batch is used.

    >>> footprint(nn.Linear(3, 4), [torch.zeros(2, 3)]).macs
    12
    """
    modes = {module: module.training for module in network.modules()}
    network.eval()
    try:
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            _Plain(network)(*(tensor[:1] for tensor in example_inputs))
    finally:
        for module, training in modes.items():
            module.training = training
    operations = {name: sum(counts.values()) for name, counts in counter.get_flop_counts().items()}
    layers = tuple(
        _layer(name, module, _own_macs(name, module, operations))
        for name, module in network.named_modules()
        if any(True for _ in module.parameters(recurse=False))
    )
    macs = counter.get_total_flops() // 2
    saved = sum(layer.macs - layer.effective_macs for layer in layers)
    return Footprint(layers, sum(p.numel() for p in network.parameters()), macs, macs - saved)


def of_integers(counts: Footprint, converted: nn.Module) -> Footprint:
    """Return the counts of the integers that a quantized network computes with: some weights have become zero.

    Args:
        counts: Of the network in float.
        converted: What ``surgery.quantization.convert`` made of it, integers in buffers ``NAME.weight_int8``.
    """
    integers = dict(converted.named_buffers())
    layers = []
    for layer in counts.layers:
        values = integers.get(f"{layer.name}.weight_int8")
        if values is not None and values.numel() == layer.weights:
            nonzero, distinct = int(values.count_nonzero()), len(torch.unique(values))
            effective = round(layer.macs * nonzero / layer.weights)
            layer = replace(layer, nonzero=nonzero, distinct=distinct, effective_macs=effective)
        layers.append(layer)
    saved = sum(layer.macs - layer.effective_macs for layer in layers)
    return replace(counts, layers=tuple(layers), effective_macs=counts.macs - saved)


class _Plain(nn.Module):
    """The network by the forward of its class; as a child it has a name, below which its layers are counted."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, *inputs: Tensor) -> Any:
        return type(self.network).forward(self.network, *inputs)


def _own_macs(name: str, module: nn.Module, operations: dict[str, int]) -> int:
    """Return what the module computes itself, without its children."""
    # The network itself is not called, only its class's forward: its operations are those of the wrapper.
    key = f"_Plain.network.{name}" if name else "_Plain"
    prefix = f"_Plain.network.{name}." if name else "_Plain.network."
    children = sum(operations.get(prefix + child, 0) for child, _ in module.named_children())
    return (operations.get(key, 0) - children) // 2


def _layer(name: str, module: nn.Module, macs: int) -> LayerFootprint:
    parameters = list(module.parameters(recurse=False))
    values = [parameter.detach().flatten() for parameter in parameters if parameter.ndim > 1]
    weights = torch.cat(values) if values else torch.empty(0)
    nonzero = int(weights.count_nonzero())
    return LayerFootprint(
        name=name,
        kind=type(module).__name__,
        parameters=sum(parameter.numel() for parameter in parameters),
        weights=weights.numel(),
        nonzero=nonzero,
        distinct=len(torch.unique(weights)),
        macs=macs,
        effective_macs=round(macs * nonzero / weights.numel()) if values else macs,
    )
