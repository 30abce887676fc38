import json
import re
from dataclasses import replace
from html.parser import HTMLParser

import pytest

from lightning_edge.report import write_report
from lightning_edge.report.text import cells


class Page(HTMLParser):
    """Collects the cells of a page's tables and every address it would load."""

    def __init__(self):
        super().__init__()
        self.cells, self.addresses, self.open = [], [], []

    def handle_starttag(self, tag, attributes):
        self.open.append(tag)
        loading = {"src", "href", "xlink:href"}
        self.addresses += [value for name, value in attributes if name in loading and not value.startswith("#")]
        if tag == "td":
            self.cells.append("")

    def handle_endtag(self, tag):
        while self.open and self.open.pop() != tag:
            pass

    def handle_data(self, data):
        if self.open and self.open[-1] == "td":
            self.cells[-1] += data


def test_three_files_are_written_and_nothing_else(report, tmp_path):
    paths = write_report(report, tmp_path / "new")
    assert [path.name for path in paths] == ["report.json", "report.md", "report.html"]
    assert sorted((tmp_path / "new").iterdir()) == sorted(paths)


def test_json_holds_every_number(report, tmp_path):
    document = json.loads(write_report(report, tmp_path)[0].read_text())
    edge = document["artifacts"][0]
    assert edge["size_bytes"] == 5432
    assert edge["error"]["wrong"] == 8
    assert edge["error"]["error_percent"] == pytest.approx(100 * 8 / 599)
    assert edge["energy"]["joules"] == report.artifacts[0].energy.joules
    assert edge["verified"] == {
        "rows": 180,
        "agreeing": 180,
        "largest_difference": 2e-6,
        "right": None,
        "right_as_trained": None,
    }
    assert edge["latency"]["threads"] == 1
    assert document["artifacts"][1]["verified"] is None
    assert document["history"][2] == {
        "stage": "compression",
        "epoch": 1,
        "val_error": 0.02,
        "sparsity": 0.9,
        "distinct_values": 33,
    }
    assert document["layers"]["layers"][0]["name"] == "conv1"
    assert document["layers"]["weight_bytes"] == 4 * 42_898


def test_markdown_tables_have_a_cell_for_every_column(report, tmp_path):
    lines = write_report(report, tmp_path)[1].read_text().splitlines()
    widths = [line.count("|") for line in lines if line.startswith("|")]
    assert sorted(set(widths)) == [9, 10]
    assert f"| {' | '.join(cells(report.artifacts[0]))} |" in lines


def test_the_page_shows_every_cell_and_loads_nothing(report, tmp_path):
    text = write_report(report, tmp_path)[2].read_text()
    page = Page()
    page.feed(text)
    assert page.cells[: 3 * 9] == [cell for row in report.rows for cell in cells(row)]
    assert page.addresses == []
    assert "<script" not in text
    assert "@import" not in text
    assert not re.search(r"url\((?!#)", text)
    assert text.count("<svg") == 4


def test_the_page_escapes_what_it_is_given(report, tmp_path):
    text = write_report(report, tmp_path)[2].read_text()
    assert "Prune &amp; share &lt;weights&gt;" in text
    assert "<weights>" not in text


def test_a_report_without_curves_notes_or_artifacts_is_a_report_too(report, tmp_path):
    bare = replace(report, history=(), notes=(), artifacts=())
    text = write_report(bare, tmp_path)[2].read_text()
    assert text.count("<svg") == 3


def test_writing_again_replaces_and_gives_the_same_bytes(report, tmp_path):
    first = [path.read_bytes() for path in write_report(report, tmp_path)]
    assert [path.read_bytes() for path in write_report(report, tmp_path)] == first
