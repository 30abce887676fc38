import re
import xml.etree.ElementTree as ET

import matplotlib
import pytest

from lightning_edge.report import EpochRecord, plots


@pytest.fixture
def pictures(report):
    return {
        "bytes": plots.bytes_plot(report.rows),
        "error": plots.error_plot(report.rows),
        "curves": plots.curves_plot(report.history),
        "kept": plots.kept_plot(report.layers.layers),
    }


def texts(svg):
    return [text.strip() for element in ET.fromstring(svg).iter() for text in element.itertext() if text.strip()]


def test_pictures_are_svg_that_names_what_it_shows(pictures):
    assert "5,432 B · 31.6x" in texts(pictures["bytes"])
    assert {"dense", "edge", "pte, int8"} <= set(texts(pictures["error"]))
    assert {"val. error, %", "sparsity, %", "distinct values", "compression"} <= set(texts(pictures["curves"]))
    assert "2,048 of 16,384" in texts(pictures["kept"])
    assert "bn1" not in texts(pictures["kept"])


def test_all_colours_are_those_of_the_page(pictures):
    for svg in pictures.values():
        assert "var(--text)" in svg or "var(--muted)" in svg
        assert not re.findall(r"#0[1-6]0[1-6]0[1-6]", svg)


def test_no_id_occurs_twice_on_the_page_and_every_reference_has_one(pictures):
    page = "".join(pictures.values())
    ids = re.findall(r'\bid="([^"]+)"', page)
    assert len(ids) == len(set(ids))
    assert {*re.findall(r"url\(#([^)]+)\)", page), *re.findall(r'href="#([^"]+)"', page)} <= set(ids)


def test_a_curve_without_values_gets_no_panel():
    svg = plots.curves_plot([EpochRecord("dense", epoch, 0.1 / (epoch + 1)) for epoch in range(3)])
    assert "val. error, %" in texts(svg)
    assert "sparsity, %" not in texts(svg)


def test_drawing_is_repeatable_and_leaves_the_settings_alone(report, pictures):
    before = matplotlib.rcParams.copy()
    assert plots.error_plot(report.rows) == pictures["error"]
    assert matplotlib.rcParams == before
