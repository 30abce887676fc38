"""Running statistics of batch norms, measured anew: after surgery they describe a network that is no more."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_edge.surgery.batchnorm import BATCH_NORM
from lightning_edge.surgery.calibration import BATCHES, calibration_inputs
from lightning_edge.surgery.calls import Arguments
from lightning_edge.surgery.capture import training_flags
from lightning_edge.surgery.captured import captured_of

_MOMENTUM = 6  # argument of the operator


@dataclass(frozen=True)
class BatchNormReport:
    """How far each batch norm's mean moved, in its old standard deviations (the largest of all channels)."""

    shifts: Mapping[str, float]
    rows: int
    """Rows of data that were looked at."""


@torch.no_grad()
def reestimate_batch_norms_(
    module: nn.Module, calibration: Any, *, batches: int | None = BATCHES, progress: bool = False
) -> BatchNormReport:
    """Replace the running mean and variance of every batch norm by those of the calibration data.

    This is the precise batch norm of Wu and Johnson 2021 (arXiv:2105.07576, sec. 3): every batch is normalized by its
    own statistics, as in training, and these are pooled over all batches, so that the variance between batches counts
    too. Everything else runs in evaluation mode, and no weight changes. It mends what pruning, sharing or rounding
    weights did to the scale of activations; of a network that :func:`~lightning_edge.surgery.post_training.quantize`
    returned, the norms see the quantized weights.

    Args:
        module: The network, plain or captured; changed in place.
        calibration: Batches of inputs, as ``quantize`` takes them; each of at least two rows, better of a hundred.
        batches: How many batches are looked at; None for all.
        progress: Show a progress bar.

    Raises:
        ValueError: If there is no batch norm with running statistics, or no data.

    >>> network = nn.Sequential(nn.BatchNorm1d(1))
    >>> _ = reestimate_batch_norms_(network, [torch.tensor([[1.0], [3.0]])])
    >>> network[0].running_mean, network[0].running_var
    (tensor([2.]), tensor([2.]))
    """
    norms = {name: norm for name, norm in module.named_modules() if isinstance(norm, _BatchNorm)}
    norms = {name: norm for name, norm in norms.items() if norm.running_mean is not None}
    if not norms:
        raise ValueError(f"module must have a batch norm with running statistics, got a {type(module).__name__}")
    before = {name: (_mean(norm).clone(), _variance(norm).clone()) for name, norm in norms.items()}
    counters = [
        (counter, counter.clone()) for norm in norms.values() if (counter := norm.num_batches_tracked) is not None
    ]
    pooled = {name: _Pooled() for name in norms}
    rows = 0
    example = Arguments()
    try:
        with training_flags(module, False), _batch_statistics(module, norms):
            for inputs in calibration_inputs(calibration, module, batches=batches, progress=progress):
                module(*inputs, **inputs.named)
                example = inputs.first(2)
                for name, norm in norms.items():
                    pooled[name].add(inputs.rows, _mean(norm), _variance(norm))
                rows += inputs.rows
    finally:
        for name, norm in norms.items():
            statistics = pooled[name].result() if pooled[name].weight else before[name]
            _mean(norm).copy_(statistics[0])
            _variance(norm).copy_(statistics[1])
        for counter, value in counters:
            counter.copy_(value)
    captured = captured_of(module)
    if captured is not None:
        captured.observe_weights(example)  # of the folded network: they depend on the variance
        if captured.observers_frozen:
            captured.freeze_observers()
    shifts = {
        name: float(((_mean(norm) - before[name][0]).abs() / (before[name][1] + norm.eps).sqrt()).max())
        for name, norm in norms.items()
    }
    return BatchNormReport(shifts, rows)


class _Pooled:
    """Mean and variance of the union of batches, from those of each."""

    def __init__(self) -> None:
        self.weight = 0.0
        self._mean = self._square = torch.zeros(())

    def add(self, rows: int, mean: Tensor, variance: Tensor) -> None:
        self.weight += rows
        # Weighted by rows, not by values: all images of a batch have the same number of positions.
        self._mean = self._mean + rows * mean.double()
        self._square = self._square + rows * (variance.double() + mean.double().square())

    def result(self) -> tuple[Tensor, Tensor]:
        mean = self._mean / self.weight
        return mean, self._square / self.weight - mean.square()


@contextmanager
def _batch_statistics(module: nn.Module, norms: Mapping[str, _BatchNorm]) -> Iterator[None]:
    """Let the norms alone train, with a momentum of one: the running statistics are then those of the last batch."""
    captured = captured_of(module)
    graph = None if captured is None else captured.graph_module
    nodes = [] if graph is None else graph.graph.find_nodes(op="call_function", target=BATCH_NORM)
    momenta = {name: norm.momentum for name, norm in norms.items()}
    literals = [node.args[_MOMENTUM] for node in nodes]
    for norm in norms.values():
        norm.momentum, norm.training = 1.0, True
    for node in nodes:  # a captured network holds its own copy; the change of mode has it compiled
        node.update_arg(_MOMENTUM, 1.0)
    try:
        yield
    finally:
        for name, norm in norms.items():
            norm.momentum, norm.training = momenta[name], False
        for node, literal in zip(nodes, literals, strict=True):
            node.update_arg(_MOMENTUM, literal)
        if graph is not None:
            graph.recompile()


def _mean(norm: _BatchNorm) -> Tensor:
    assert norm.running_mean is not None
    return norm.running_mean


def _variance(norm: _BatchNorm) -> Tensor:
    assert norm.running_var is not None
    return norm.running_var
