import pytest

from lightning_edge.report import environment


def test_the_ratio_relates_to_the_dense_fp32_parameters(report):
    assert [row.ratio for row in report.rows] == [4 * 42_898 / row.size_bytes for row in report.rows]


def test_energy_is_of_dense_arithmetic_on_expanded_weights(report):
    dense, edge, int8 = (row.energy for row in report.rows)
    macs = report.baseline.macs
    assert edge == dense
    assert dense.joules == pytest.approx((macs * 4.6 + 42_898 * 640) * 1e-12)
    assert int8.joules == pytest.approx((macs * 0.3 + 42_898 / 4 * 640) * 1e-12)


def test_zero_skipping_energy_is_of_the_products_that_are_left_and_the_bytes_of_the_file(report):
    edge = report.artifacts[0]
    assert edge.effective_macs == edge.macs - 16384 * 7 // 8
    expected = (edge.effective_macs * 4.6 + 5_432 / 4 * 640) * 1e-12
    assert edge.zero_skipping_energy.joules == pytest.approx(expected)


def test_the_caption_says_how_every_number_format_was_estimated(report):
    caption = "\n".join(report.caption)
    assert caption.count("4.6 pJ per fp32") == caption.count("0.3 pJ per int8") == 1
    assert "dense baseline's fp32 parameters" in caption
    assert "EIE" in caption


def test_the_environment_names_no_host_and_no_path():
    facts = environment()
    assert {"machine", "python", "torch", "onnxruntime", "lightning_edge"} <= set(facts)
    assert not any("/" in value for value in facts.values())
