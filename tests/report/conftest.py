"""A report of two artefacts, with numbers that could be true."""

import pytest
import torch

from lightning_edge.export.timing import Latency
from lightning_edge.export.verification import Verification
from lightning_edge.models import DigitsNet
from lightning_edge.report import (
    EpochRecord,
    Measurement,
    Report,
    Score,
    footprint,
    report_row,
)


@pytest.fixture
def report():
    torch.manual_seed(0)
    dense, small = DigitsNet(), DigitsNet()
    with torch.no_grad():
        small.fc1.weight[:, 32:] = 0.0
    sizes = {
        "dense": footprint(dense, [torch.zeros(1, 1, 8, 8)]),
        "network": footprint(small, [torch.zeros(1, 1, 8, 8)]),
    }

    def measured(file, size_bytes, wrong, milliseconds):
        latency = Latency(milliseconds, 2 * milliseconds, 100, 1, "onnxruntime", (milliseconds,) * 20)
        return Measurement(file, size_bytes, Score(wrong, 599), latency)

    return Report(
        title="Prune & share <weights>",
        command="lightning-edge recipe=deep_compression",
        environment={"python": "3.11"},
        baseline=report_row(
            "dense", measured("baseline.onnx", 173_000, 6, 0.05), dense=sizes["dense"], network=sizes["dense"]
        ),
        artifacts=(
            report_row(
                "edge",
                measured("model.edge", 5_432, 8, 0.051),
                **sizes,
                verified=Verification(rows=180, agreeing=180, largest_difference=2e-6),
            ),
            report_row("pte, int8", measured("model.pte", 45_000, 9, 0.03), **sizes, mac_type="int8"),
        ),
        layers=sizes["network"],
        history=(
            EpochRecord("dense", 0, 0.1),
            EpochRecord("compression", 0, 0.02, 0.5, 5000),
            EpochRecord("compression", 1, 0.02, 0.9, 33),
        ),
        notes=("seed 0",),
    )
