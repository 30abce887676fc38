import math

import pytest
import torch
from mobile_network import digits, distance, trained, uneven
from torch import nn

from lightning_edge import quantize
from lightning_edge.surgery.quantization_sensitivity import (
    KeptLayers,
    QuantizationSensitivityReport,
    QuantizationSensitivityRow,
    layers_to_keep,
    quantization_sensitivity,
)


def report_of(network, **options):
    return quantization_sensitivity(network, digits(), lambda other: distance(other, network), **options)


def test_layers_that_are_hard_to_quantize_are_kept_until_the_loss_fits():
    network = uneven()
    report = report_of(network)
    costs = {row.layer: row.value for row in report.rows}
    assert report.dense == pytest.approx(0.0, abs=1e-6)
    assert max(costs, key=costs.get) == "6"
    assert costs["17"] < 0.001 < 0.05 < costs["12"]
    kept = report.keep(0.2 * report.quantized)
    assert set(kept) == {"0", "3", "6", "9"}
    assert distance(quantize(network, digits(), keep=kept), network) < 0.2 * report.quantized
    assert report.keep(report.quantized) == ()


def test_every_layer_is_measured_alone():
    network = trained()
    report = report_of(network)
    assert [row.layer for row in report.rows] == ["0", "3", "6", "9", "12", "17"]
    assert [row.size for row in report.rows] == [network[index].weight.numel() for index in (0, 3, 6, 9, 12, 17)]
    assert all(0 < row.value < 3 * report.quantized for row in report.rows)


def test_a_second_call_goes_on_where_the_first_was_interrupted(tmp_path):
    network, path, calls = uneven(), tmp_path / "new" / "rows.json", []

    def evaluate(other):
        calls.append(1)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return distance(other, network)

    with pytest.raises(KeyboardInterrupt):
        quantization_sensitivity(network, digits(), evaluate, path=path)
    resumed = quantization_sensitivity(network, digits(), evaluate, path=path)
    assert len(calls) == 5 + 2 + 4  # float, int8, and the layers that were left
    assert resumed == report_of(network)


def test_a_metric_that_is_no_number_can_be_gone_on_with(tmp_path):
    network, path = nn.Sequential(nn.Linear(4, 2)), tmp_path / "rows.json"
    batch, calls = torch.randn(4, 4), []

    def evaluate(other):
        calls.append(1)
        with torch.no_grad():
            return 0.0 if torch.equal(other(batch), network(batch)) else math.nan

    for count in (3, 5):  # float, int8, and the layer; then the first two
        quantization_sensitivity(network, [batch], evaluate, path=path)
        assert len(calls) == count


def test_rows_of_another_network_or_another_file_are_refused(tmp_path):
    path = tmp_path / "rows.json"
    report_of(trained(), path=path)
    with pytest.raises(ValueError, match="path must hold rows of this network"):
        report_of(uneven(), path=path)
    path.write_text("[]")
    with pytest.raises(ValueError, match="or one that quantization_sensitivity wrote"):
        report_of(trained(), path=path)


def test_the_network_is_left_alone_and_a_bad_metric_is_refused():
    network = nn.Sequential(nn.Linear(4, 2))
    with pytest.raises(ValueError, match="evaluate must return a finite metric"):
        quantization_sensitivity(network, [torch.randn(4, 4)], lambda _: math.nan)
    assert "forward" not in vars(network)


def rows(*values):
    return tuple(QuantizationSensitivityRow(name, 1, value) for name, value in zip("abc", values, strict=True))


@pytest.mark.parametrize(
    ("max_drop", "kept"), [(0.6, ()), (0.3, ("b",)), (0.1, ("b", "c")), (0.05, ("b", "c", "a")), (0.0, ("b", "c", "a"))]
)
def test_as_many_layers_are_kept_as_it_takes(max_drop, kept):
    report = QuantizationSensitivityReport(rows(0.8, 0.5, 0.7), dense=0.9, quantized=0.3, higher_is_better=True)
    assert report.keep(max_drop + 1e-9) == kept


def test_a_layer_whose_metric_is_no_number_is_kept_first():
    report = QuantizationSensitivityReport(rows(0.1, math.nan, 0.2), dense=0.1, quantized=math.nan)
    assert report.keep(1.0) == ("b",)
    with pytest.raises(ValueError, match="max_drop must be at least 0"):
        report.keep(-0.1)


def test_layers_are_kept_until_what_is_measured_with_them_fits():
    network = uneven()
    report, measured = report_of(network), []

    def measure(keep):
        measured.append(keep)
        return distance(quantize(network, digits(), keep=keep), network)

    chosen = layers_to_keep(report, measure, max_drop=0.2 * report.quantized)
    assert chosen.keep == report.ranked[: len(chosen.keep)] == measured[-1]
    assert chosen.value == measure(chosen.keep) <= 0.2 * report.quantized
    assert layers_to_keep(report, measure, max_drop=report.quantized).keep == ()


def test_the_estimate_is_extended_by_the_next_layer_and_an_end_is_said():
    report = QuantizationSensitivityReport(rows(0.1, 0.3, 0.2), dense=0.0, quantized=0.6)
    assert report.keep(0.31) == ("b",)
    chosen = layers_to_keep(report, lambda keep: 0.5 if len(keep) < 2 else 0.25, max_drop=0.31)
    assert chosen == KeptLayers(("b", "c"), 0.25)
    with pytest.raises(ValueError, match="max_drop must be what int8 in one layer costs, or more, got 0.31: even with"):
        layers_to_keep(report, lambda keep: 1.0, max_drop=0.31)
