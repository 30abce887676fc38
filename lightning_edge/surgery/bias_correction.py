"""Biases that make up for what rounding the weights did to the mean of each channel."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Interpreter, Node

from lightning_edge.surgery.batchnorm import CONVOLUTIONS, WEIGHTED, weight_of
from lightning_edge.surgery.calibration import calibration_inputs
from lightning_edge.surgery.calls import joined
from lightning_edge.surgery.capture import training_flags
from lightning_edge.surgery.captured import CapturedNetwork, captured_of
from lightning_edge.surgery.copying import copied
from lightning_edge.surgery.quantization import capture_

BATCHES = 4


@dataclass(frozen=True)
class BiasCorrectionReport:
    """What was added to the biases: the largest absolute shift of a channel, by layer, in network order."""

    shifts: Mapping[str, float]
    uncorrected: tuple[str, ...]
    """Layers without a bias, and without a batch norm behind them that has one."""


@torch.no_grad()
def correct_bias_(
    quantized: nn.Module,
    module: nn.Module,
    calibration: Any,
    *,
    batches: int | None = BATCHES,
    progress: bool = False,
) -> BiasCorrectionReport:
    """Shift each bias of a quantized network until the mean of every channel is that of the float network.

    Bias correction of Nagel et al. 2019 (arXiv:1906.04721, sec. 4.2 and appendix D), with means from data: layer by
    layer in the order of the network, each with all layers before it corrected. It is done in one pass in which the
    batches go through each layer together, so memory grows with ``batches``. The bias of a layer with a batch norm is
    the batch norm's.

    Args:
        quantized: What ``quantize(module, ..., scheme="int8_static")`` returned; changed in place.
        module: The float network; not changed.
        calibration: Batches of inputs, as ``quantize`` takes them.
        batches: How many batches are looked at; None for all.
        progress: Show a progress bar.

    Raises:
        ValueError: If ``quantized`` is no static int8 network, ``module`` another one, or there is no data.

    >>> from lightning_edge.surgery.post_training import quantize
    >>> network, data = nn.Sequential(nn.Linear(4, 3)), [torch.randn(8, 4)]
    >>> list(correct_bias_(quantize(network, data), network, data).shifts)
    ['0']
    """
    captured = captured_of(quantized)
    if captured is None:
        raise ValueError(
            f"quantized must be a network of scheme 'int8_static', got a {type(quantized).__name__} that computes in"
            " float: the other schemes have no activations to correct"
        )
    inputs = joined(list(calibration_inputs(calibration, quantized, batches=batches, progress=progress)))
    reference = copied(module)
    plain = capture_(reference, inputs)
    layers = _corrected_at(captured)
    if layers.keys() != _corrected_at(plain).keys():
        raise ValueError(
            f"module must be the network that quantized was made of, got a {type(module).__name__} with other layers"
        )
    with training_flags(reference, False), plain.in_float():
        expected = _Means(plain, layers)
        expected.run(*inputs, *inputs.named.values())
    with training_flags(quantized, False):
        captured(*inputs.first(1), **inputs.first(1).named)  # follows the flags
        correcting = _Means(captured, layers, expected=expected.means)
        correcting.run(*inputs, *inputs.named.values())
    shifted = correcting.shifts
    return BiasCorrectionReport(shifted, tuple(name for name, _ in layers.values() if name not in shifted))


class _Means(Interpreter):
    """Run a captured graph and keep the mean of each layer's output per channel; with ``expected``, correct it."""

    def __init__(
        self,
        captured: CapturedNetwork,
        layers: Mapping[str, tuple[str, int]],
        *,
        expected: Mapping[str, Tensor] | None = None,
    ) -> None:
        super().__init__(captured.graph_module)
        self.means: dict[str, Tensor] = {}
        self.shifts: dict[str, float] = {}
        self._layers, self._expected = layers, expected

    def run_node(self, node: Node) -> Any:
        """Run one operator."""
        value = super().run_node(node)
        if node.name not in self._layers:
            return value
        name, axis = self._layers[node.name]
        mean = value.mean([dimension for dimension in range(value.ndim) if dimension != axis % value.ndim])
        if self._expected is None:
            self.means[node.name] = mean
            return value
        bias = _bias(node)
        if bias is None:
            return value
        shift = self._expected[node.name] - mean
        parameter = self.fetch_attr(bias)
        parameter.add_(shift)
        self.shifts[name] = float(shift.abs().max())
        return value + shift.reshape(-1, *[1] * (value.ndim - 1 - axis % value.ndim))


def _corrected_at(captured: CapturedNetwork) -> dict[str, tuple[str, int]]:
    """Where each layer's output is whole, behind its batch norm: the node to the layer's name and its channel axis."""
    found = {}
    for node in captured.graph_module.graph.nodes:
        if node.target not in WEIGHTED or node.args[1].op != "call_module":
            continue
        layer = weight_of(node.args[1]).removesuffix("weight").removesuffix(".")
        end = captured.norms.get(node.name, node.name)
        found[end] = (layer, 1 if node.target in CONVOLUTIONS else -1)
    return found


def _bias(node: Node) -> str | None:
    """The name of the parameter that is added last."""
    operand = node.args[2] if len(node.args) > 2 else None
    return str(operand.target) if isinstance(operand, Node) and operand.op == "get_attr" else None
