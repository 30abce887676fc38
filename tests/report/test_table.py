import io

from rich.console import Console

from lightning_edge.report import print_table
from lightning_edge.report.text import cells, count_text, energy_text


def printed(report):
    stream = io.StringIO()
    print_table(report, file=stream)
    return stream.getvalue()


def test_every_cell_of_a_row_stands_whole_on_one_line_of_a_pipe(report):
    lines = printed(report).splitlines()
    for row in report.rows:
        line = next(line for line in lines if line.strip().startswith(f"{row.name} "))
        assert [cell for cell in cells(row) if cell not in line] == []
    assert "…" not in printed(report)


def test_every_sentence_of_the_caption_stands_whole_on_one_line_of_a_pipe(report):
    assert [line for line in report.caption if line not in printed(report).splitlines()] == []


def test_a_narrow_terminal_cuts_nothing_off(report, monkeypatch):
    monkeypatch.setenv("COLUMNS", "70")
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert Console(file=io.StringIO()).is_terminal
    letters = "".join(printed(report).split())
    assert "…" not in letters
    assert "5,432" in letters


def test_counts_and_energies_choose_their_units():
    assert [count_text(n) for n in (0, 999, 1000, 184_400, 999_999, 2_293_000, 4e9)] == [
        "0", "999", "1 k", "184 k", "1,000 k", "2.29 M", "4 G",
    ]  # fmt: skip
    assert [energy_text(j) for j in (2e-3, 2.864e-4, 5e-9)] == ["2.0 mJ", "286.4 µJ", "5.0 nJ"]
