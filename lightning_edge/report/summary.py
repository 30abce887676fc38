"""What a report says: rows for the baseline and each artefact, layers, curves, and where it was measured."""

import os
import platform
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version

import lightning_edge
from lightning_edge.export.timing import Latency
from lightning_edge.export.verification import Verification
from lightning_edge.functional.energy import EnergyEstimate, MacType, estimate_energy
from lightning_edge.report.footprint import Footprint
from lightning_edge.report.measure import Measurement, Score

_VALUE_BYTES: dict[MacType, int] = {"fp32": 4, "fp16": 2, "int8": 1}
_PACKAGES = ("torch", "lightning", "torchao", "numpy", "onnx", "onnxruntime", "executorch")


@dataclass(frozen=True)
class ReportRow:
    """One line of the table.

    ``ratio`` is the dense baseline's fp32 parameters in bytes over ``size_bytes``. ``energy`` is of the arithmetic that
    the runtime does: dense, on weights expanded in memory. ``zero_skipping_energy`` is of an accelerator that works on
    the coded weights and skips zeros, as EIE does (Han et al. 2016, arXiv:1602.01528): ``effective_macs``, and the
    file's bytes.
    """

    name: str
    file: str
    size_bytes: int
    ratio: float
    error: Score
    latency: Latency
    macs: int
    effective_macs: int
    energy: EnergyEstimate
    zero_skipping_energy: EnergyEstimate
    verified: Verification | None = None

    @property
    def runtime(self) -> str:
        """Name of the runtime in which error and latency were measured."""
        return self.latency.runtime


@dataclass(frozen=True)
class EpochRecord:
    """One point of the curves; what a stage does not have is None.

    ``val_error`` and ``sparsity`` are fractions; ``distinct_values`` is the largest count of any layer.
    """

    stage: str
    epoch: int
    val_error: float | None = None
    sparsity: float | None = None
    distinct_values: int | None = None


@dataclass(frozen=True)
class Report:
    """All that a run reports; ``layers`` is the footprint of the compressed network."""

    title: str
    command: str
    environment: Mapping[str, str]
    baseline: ReportRow
    artifacts: tuple[ReportRow, ...]
    layers: Footprint
    history: tuple[EpochRecord, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def rows(self) -> tuple[ReportRow, ...]:
        """The baseline, then the artefacts."""
        return (self.baseline, *self.artifacts)

    @property
    def caption(self) -> tuple[str, ...]:
        """How the columns were obtained, a sentence each."""
        methods = dict.fromkeys(row.energy.method for row in self.rows)
        return (
            "ratio: the dense baseline's fp32 parameters, 4 bytes each, over the bytes of the file.",
            "error: of the file, in its own runtime, on the whole test set. latency: one input, p50 and p95.",
            *(f"energy: {method}." for method in methods),
            "energy, dense: every multiply-accumulate, weights expanded in memory, which is what the runtime does.",
            "energy, zero-skip: non-zero multiply-accumulates and the file's bytes, for hardware that skips zeros"
            " and reads coded weights, such as EIE.",
        )


def report_row(
    name: str,
    measurement: Measurement,
    *,
    dense: Footprint,
    network: Footprint,
    mac_type: MacType = "fp32",
    verified: Verification | None = None,
) -> ReportRow:
    """Return the row of a measured file, its ratio and energies worked out.

    Args:
        name: What the table calls it.
        measurement: Of the file.
        dense: Footprint of the dense baseline, to which the ratio relates.
        network: Footprint of the network that is in the file.
        mac_type: Number format in which the file's runtime computes.
        verified: How far the file agrees with the trained network.

    >>> from torch import nn, zeros
    >>> from lightning_edge.report import footprint
    >>> size, timing = footprint(nn.Linear(2, 2), [zeros(1, 2)]), Latency(1.0, 1.0, 1, 1, "any", (1.0,))
    >>> report_row("a", Measurement("a.edge", 12, Score(0, 1), timing), dense=size, network=size).ratio
    2.0
    """
    return ReportRow(
        name=name,
        file=measurement.file,
        size_bytes=measurement.size_bytes,
        ratio=dense.weight_bytes / measurement.size_bytes,
        error=measurement.error,
        latency=measurement.latency,
        macs=network.macs,
        effective_macs=network.effective_macs,
        energy=estimate_energy(
            macs=network.macs, weight_bytes=network.parameters * _VALUE_BYTES[mac_type], mac_type=mac_type
        ),
        zero_skipping_energy=estimate_energy(
            macs=network.effective_macs, weight_bytes=measurement.size_bytes, mac_type=mac_type
        ),
        verified=verified,
    )


def environment() -> dict[str, str]:
    """Return the machine's kind and the versions that the numbers depend on.

    >>> "torch" in environment()
    True
    """
    facts = {
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores",
        "python": platform.python_version(),
        "lightning_edge": lightning_edge.__version__,
    }
    for package in _PACKAGES:
        try:
            facts[package] = version(package)
        except PackageNotFoundError:  # an extra
            facts[package] = "not installed"
    return facts
