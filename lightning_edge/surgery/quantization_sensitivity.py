"""What each layer's quantization costs on its own, and which layers to leave in float for it."""

import json
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.progress import track
from torch import nn

from lightning_edge.surgery.calibration import BATCHES
from lightning_edge.surgery.capture import tensor_at
from lightning_edge.surgery.captured import captured_of
from lightning_edge.surgery.observers import RangeObserver
from lightning_edge.surgery.post_training import quantize


@dataclass(frozen=True)
class QuantizationSensitivityRow:
    """The metric with this layer alone in int8."""

    layer: str
    size: int
    """Number of its weights."""
    value: float


@dataclass(frozen=True)
class QuantizationSensitivityReport:
    """The metric for each layer, in network order, beside that of the float and of the whole int8 network."""

    rows: tuple[QuantizationSensitivityRow, ...]
    dense: float
    quantized: float
    """With all layers in int8."""
    higher_is_better: bool = False

    def drop(self, value: float) -> float:
        """Return how much worse than dense a metric is, in its own unit; infinite where it is not a number."""
        drop = self.dense - value if self.higher_is_better else value - self.dense
        return math.inf if math.isnan(drop) else drop

    @property
    def ranked(self) -> tuple[str, ...]:
        """The layers, most sensitive first."""
        return tuple(row.layer for row in sorted(self.rows, key=lambda row: -self.drop(row.value)))

    def keep(self, max_drop: float) -> tuple[str, ...]:
        """Return the layers to keep in float so that the metric is at most about ``max_drop`` worse than dense.

        None, if the whole int8 network is good enough as measured. Else layers are left out from the one that costs
        most, until the costs of the others, measured alone and added up, fit: an estimate, to be measured again.

        Args:
            max_drop: In the unit of the metric, at least 0.

        Returns:
            Names, most sensitive first; what ``keep=`` of ``quantize`` takes.

        Raises:
            ValueError: If ``max_drop`` is negative.

        >>> rows = tuple(QuantizationSensitivityRow(name, 9, value) for name, value in [("a", 0.1), ("b", 0.4)])
        >>> QuantizationSensitivityReport(rows, dense=0.1, quantized=0.5).keep(max_drop=0.1)
        ('b',)
        """
        if not max_drop >= 0.0:
            raise ValueError(f"max_drop must be at least 0, got {max_drop}: how much worse than dense it may be")
        if self.drop(self.quantized) <= max_drop:
            return ()
        costs = {row.layer: max(0.0, self.drop(row.value)) for row in self.rows}
        for count in range(1, len(self.ranked)):
            if sum(costs[layer] for layer in self.ranked[count:]) <= max_drop:
                return self.ranked[:count]
        return self.ranked


@dataclass(frozen=True)
class KeptLayers:
    """Layers to keep in float, and the metric that was measured with them."""

    keep: tuple[str, ...]
    """What ``keep=`` of ``quantize`` and of the callbacks takes, most sensitive first."""
    value: float


def quantization_sensitivity(
    module: nn.Module,
    calibration: Any,
    evaluate: Callable[[nn.Module], float],
    *,
    observer: str | Callable[[], RangeObserver] = "histogram",
    batches: int | None = BATCHES,
    keep: Sequence[str] = (),
    higher_is_better: bool = False,
    path: str | Path | None = None,
    progress: bool = False,
) -> QuantizationSensitivityReport:
    """Return the metric for every layer quantized alone: its weight, its input and its output, to int8.

    The network is calibrated once. Integer runtimes cannot keep a single output in float, so the file of a network with
    kept layers can differ a little from what is measured here.

    Args:
        module: The network; not changed.
        calibration: Batches of inputs, as :func:`~lightning_edge.surgery.post_training.quantize` takes them.
        evaluate: From a network to the metric, for example the error on the validation data. It should put the network
            into eval mode, and must not train it.
        observer: As ``quantize`` takes it.
        batches: How many batches are looked at; None for all.
        keep: Layers that are in float anyhow.
        higher_is_better: Whether the metric grows with quality, as an accuracy does.
        path: A ``.json`` that gets every row as soon as it is measured. A second call goes on behind the rows that it
            holds; ``evaluate``, the calibration and the other arguments have to be the same then.
        progress: Show a progress bar.

    Raises:
        ValueError: If ``quantize`` refuses the arguments, the dense metric is not finite, or ``path`` holds the rows
            of another network.

    >>> layer, batch = nn.Linear(4, 2), torch.randn(8, 4)
    >>> report = quantization_sensitivity(layer, [batch], lambda network: float(network(batch).detach().sum()))
    >>> [row.layer for row in report.rows]
    ['']
    """
    network = quantize(module, calibration, observer=observer, batches=batches, keep=keep)
    captured = captured_of(network)
    assert captured is not None

    def measured(values: Sequence[str] | None) -> float:
        with captured.quantizing_only(captured.observers if values is None else values):
            return float(evaluate(network))

    dense, quantized = measured(()), measured(None)
    if not math.isfinite(dense):
        raise ValueError(f"evaluate must return a finite metric for the float network, got {dense}")
    kept = None if path is None else Path(path)
    header = {"dense": dense, "quantized": quantized}
    known = _read(kept, header) if kept is not None and kept.exists() else {}
    layers = captured.values_of_layers()
    for layer, values in track(layers.items(), "sensitivity", disable=not progress):
        if layer not in known:
            size = tensor_at(network, f"{layer}.weight").numel()
            known[layer] = QuantizationSensitivityRow(layer, size, measured(values))
            _write(kept, header, known)
    rows = tuple(known[layer] for layer in layers)
    return QuantizationSensitivityReport(rows, dense, quantized, higher_is_better)


def layers_to_keep(
    report: QuantizationSensitivityReport, measure: Callable[[tuple[str, ...]], float], *, max_drop: float
) -> KeptLayers:
    """Return as few layers to keep in float as it takes, by what is measured with all of them kept together.

    The estimate of :meth:`QuantizationSensitivityReport.keep` is measured; while the metric is still too far from the
    dense one, the next layer is kept too.

    Args:
        report: From :func:`quantization_sensitivity`.
        measure: From the layers kept to the metric, for example
            ``lambda keep: evaluate(quantize(network, calibration, keep=keep))``.
        max_drop: How much worse than dense the metric may be, in its own unit, at least 0.

    Raises:
        ValueError: If ``max_drop`` is negative, or a single layer in int8 already costs more.

    >>> rows = tuple(QuantizationSensitivityRow(name, 9, value) for name, value in [("a", 0.2), ("b", 0.4), ("c", 0.1)])
    >>> report = QuantizationSensitivityReport(rows, dense=0.1, quantized=0.5)
    >>> layers_to_keep(report, lambda keep: 0.4 - 0.15 * len(keep), max_drop=0.1)
    KeptLayers(keep=('b', 'a'), value=0.10000000000000003)
    """
    count = len(report.keep(max_drop))
    while count < len(report.ranked):
        kept = report.ranked[:count]
        value = measure(kept) if kept else report.quantized
        if report.drop(value) <= max_drop:
            return KeptLayers(kept, value)
        count += 1
    raise ValueError(
        f"max_drop must be what int8 in one layer costs, or more, got {max_drop}: even with all layers but"
        f" {report.ranked[-1]!r} in float it is exceeded"
    )


def _write(path: Path | None, header: dict[str, float], known: dict[str, QuantizationSensitivityRow]) -> None:
    """Write what is known so far, whole or not at all; of several processes one does."""
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    if path is None or (distributed and torch.distributed.get_rank()):
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.unfinished")
    content = header | {"rows": [asdict(row) for row in known.values()]}
    unfinished.write_text(json.dumps(content, indent=1), encoding="utf-8")
    unfinished.replace(path)


def _read(path: Path, header: dict[str, float]) -> dict[str, QuantizationSensitivityRow]:
    """Return the rows, if float and int8 network are those that were measured then."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        rows = [QuantizationSensitivityRow(**row) for row in content["rows"]]
        found = {key: content[key] for key in header}
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"path must be a new file or one that quantization_sensitivity wrote, got {path}: choose another name"
        ) from error
    if json.dumps(found) != json.dumps(header):  # as text: a metric may be NaN
        raise ValueError(
            f"path must hold rows of this network, data and metric, got {path} with {found} where {header} was"
            " measured now: remove the file, or choose another name"
        )
    return {row.layer: row for row in rows}
