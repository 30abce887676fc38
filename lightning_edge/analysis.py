"""A stage of a run that changes nothing: how far each layer of the dense baseline could be pruned, or quantized."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
from torch import nn

from lightning_edge.report.quantization_sensitivity import quantization_sensitivity_text
from lightning_edge.report.sensitivity import print_sensitivity, write_sensitivity
from lightning_edge.report.write import write_text
from lightning_edge.surgery.calibration import BATCHES
from lightning_edge.surgery.observers import observer_factory
from lightning_edge.surgery.post_training import quantize
from lightning_edge.surgery.quantization_sensitivity import KeptLayers, layers_to_keep, quantization_sensitivity
from lightning_edge.surgery.selection import find_network, network_path, select_weights
from lightning_edge.surgery.sensitivity import (
    SPARSITIES,
    SensitivityReport,
    check_max_drop,
    check_sparsities,
    sensitivity,
)


@dataclass(frozen=True)
class SensitivityAnalysis:
    """Measure on the validation data how far each layer can be pruned alone, and propose a target for each.

    Attributes:
        sparsities: Fractions of zeros at which every layer is measured, each in (0, 1).
        include: Layers to measure, globs over names or class names.
        exclude: Layers to leave out.
        max_drop: How much worse than dense the metric may be where a target is proposed, in the metric's unit.
        monitor: Name of the metric, as the LightningModule logs it in validation.
        higher_is_better: Whether it grows with quality.
        network: Dotted path of the network inside the LightningModule; see ``surgery.selection.network_path``.

    Raises:
        ValueError: If an argument is out of its range.

    >>> SensitivityAnalysis(sparsities=[0.5, 0.9], max_drop=0.02).monitor
    'val/error'
    """

    sparsities: Sequence[float] = SPARSITIES
    include: Sequence[str] = ("*",)
    exclude: Sequence[str] = ()
    max_drop: float = 0.01
    monitor: str = "val/error"
    higher_is_better: bool = False
    network: str | None = None

    def __post_init__(self) -> None:
        check_sparsities(self.sparsities)
        check_max_drop(self.max_drop)

    def check(self, network: nn.Module, *, max_epochs: float) -> None:
        """Raise a ValueError unless the patterns match layers of ``network``."""
        select_weights(network, include=self.include, exclude=self.exclude)

    def run(self, model: L.LightningModule, data: Any, trainer: L.Trainer, folder: Path) -> SensitivityReport:
        """Measure, write ``sensitivity.csv``, ``sensitivity.svg`` and ``sensitivity.md``, print; return the report.

        The rows that ``sensitivity.csv`` holds already, of an interrupted run, are not measured again. Several
        processes measure together; the first of them writes and prints.

        Args:
            model: The trained baseline; afterwards as it was before.
            data: A data module with validation data.
            trainer: Validates once for every row, on as many batches as its ``limit_val_batches`` says.
            folder: Of the run.

        Raises:
            ValueError: If validation does not log ``monitor``, or the file belongs to another network.
        """
        report = sensitivity(
            find_network(model, self.network),
            lambda _: _validated(trainer, model, data, self.monitor),
            sparsities=self.sparsities,
            include=self.include,
            exclude=self.exclude,
            higher_is_better=self.higher_is_better,
            path=folder / "sensitivity.csv",
            progress=trainer.is_global_zero,
        )
        if trainer.is_global_zero:
            write_sensitivity(report, folder, max_drop=self.max_drop, metric=self.monitor)
            print_sensitivity(report, max_drop=self.max_drop, metric=self.monitor)
            print(f"{folder / 'sensitivity.svg'} has the curves", flush=True)
        return report


@dataclass(frozen=True)
class QuantizationSensitivityAnalysis:
    """Measure on the validation data what int8 in each layer alone costs, and choose the layers to keep in float.

    Attributes:
        max_drop: How much worse than dense the metric may be with the layers chosen, in the metric's unit.
        observer: As ``quantize`` takes it.
        batches: How many training batches are looked at; None for all.
        monitor: Name of the metric, as the LightningModule logs it in validation.
        higher_is_better: Whether it grows with quality.
        network: Dotted path of the network inside the LightningModule; see ``surgery.selection.network_path``.

    Raises:
        ValueError: If an argument is out of its range.

    >>> QuantizationSensitivityAnalysis(max_drop=0.02).observer
    'histogram'
    """

    max_drop: float = 0.01
    observer: str = "histogram"
    batches: int | None = BATCHES
    monitor: str = "val/error"
    higher_is_better: bool = False
    network: str | None = None

    def __post_init__(self) -> None:
        check_max_drop(self.max_drop)
        observer_factory(self.observer)

    def check(self, network: nn.Module, *, max_epochs: float) -> None:
        """Raise a ValueError unless ``network`` has layers to quantize."""
        select_weights(network)

    def run(self, model: L.LightningModule, data: Any, trainer: L.Trainer, folder: Path) -> KeptLayers:
        """Measure, write ``quantization_sensitivity.json`` and ``.md``, print; return the layers to keep.

        The rows that the ``.json`` holds already, of an interrupted run, are not measured again.

        Args:
            model: The trained baseline; afterwards as it was before.
            data: A data module with training and validation data.
            trainer: Validates once for every row.
            folder: Of the run.

        Raises:
            ValueError: If validation does not log ``monitor``, the file belongs to another network, or ``max_drop``
                cannot be kept to.
        """
        path = network_path(model, self.network)
        network = find_network(model, self.network)
        options: dict[str, Any] = {"observer": self.observer, "batches": self.batches}

        def evaluate(other: nn.Module) -> float:
            if not path:
                return _validated(trainer, other, data, self.monitor)
            model.set_submodule(path, other)
            try:
                return _validated(trainer, model, data, self.monitor)
            finally:
                model.set_submodule(path, network)

        report = quantization_sensitivity(
            network,
            data,
            evaluate,
            higher_is_better=self.higher_is_better,
            path=folder / "quantization_sensitivity.json",
            progress=trainer.is_global_zero,
            **options,
        )
        chosen = layers_to_keep(
            report, lambda keep: evaluate(quantize(network, data, keep=keep, **options)), max_drop=self.max_drop
        )
        if trainer.is_global_zero:
            text = quantization_sensitivity_text(report, chosen, max_drop=self.max_drop, metric=self.monitor)
            write_text(folder / "quantization_sensitivity.md", text)
            print(text, flush=True)
        return chosen


def _validated(trainer: L.Trainer, model: Any, data: Any, monitor: str) -> float:
    results = trainer.validate(model, datamodule=data, verbose=False)
    logged = {name: value for metrics in results for name, value in metrics.items()}
    if monitor not in logged:
        raise ValueError(f"monitor must be one of {sorted(logged)}, got {monitor!r}, which is not logged")
    return logged[monitor]
