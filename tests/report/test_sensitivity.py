import io
import shlex
import xml.etree.ElementTree as ET

import matplotlib
import pytest

from lightning_edge.config import compose
from lightning_edge.report.sensitivity import override, print_sensitivity, sensitivity_plot, write_sensitivity
from lightning_edge.surgery.sensitivity import SensitivityReport, SensitivityRow


def report_of(names, *, higher_is_better=False):
    """The first layers lose most."""
    sign = -1 if higher_is_better else 1
    rows = [
        SensitivityRow(name, 1000 * (n + 1), sparsity, 0.5 + sign * 0.4 * sparsity / (n + 1))
        for n, name in enumerate(names)
        for sparsity in (0.5, 0.9)
    ]
    return SensitivityReport(tuple(rows), 0.5, "a" * 64, higher_is_better)


@pytest.fixture
def report():
    return report_of(["conv1", "layers.0.fc"])


def texts(svg):
    return [(e.text or "").strip() for e in ET.fromstring(svg).iter() if e.tag.endswith("}text")]


def printed(report, **options):
    stream = io.StringIO()
    print_sensitivity(report, **({"max_drop": 0.2, "metric": "val/error"} | options), file=stream)
    return stream.getvalue()


def test_the_picture_names_the_layers_the_metric_and_the_limit(report):
    shown = texts(sensitivity_plot(report, max_drop=0.01, metric="val/error"))
    assert {"conv1", "layers.0.fc", "val/error", "0.01 worse than dense"} <= set(shown)


@pytest.mark.parametrize("higher_is_better", [False, True])
def test_of_many_layers_the_most_sensitive_have_names(higher_is_better):
    names = [f"layer{n}.conv" for n in range(50)]
    shown = texts(sensitivity_plot(report_of(names, higher_is_better=higher_is_better), max_drop=0.1))
    legend = shown[shown.index("most sensitive first") + 1 :]
    assert legend == [*names[:8], "42 more", "0.1 worse than dense"]


def test_a_long_name_leaves_the_picture_its_room():
    shown = texts(sensitivity_plot(report_of(["encoder.layers." * 4 + "fc", ""]), max_drop=0.1))
    assert {"…er.layers.encoder.layers.fc", "network"} <= set(shown)


def test_drawing_is_repeatable_and_leaves_the_settings_alone(report):
    before = matplotlib.rcParams.copy()
    assert sensitivity_plot(report, max_drop=0.1) == sensitivity_plot(report, max_drop=0.1)
    assert matplotlib.rcParams == before


def test_the_table_shows_every_value_and_the_proposal(report):
    lines = [line.split() for line in printed(report).splitlines()]
    assert ["layer", "weights", "0.5", "0.9", "proposed"] in lines
    assert ["conv1", "1,000", "0.7000", "0.8600", "0.5"] in lines
    assert ["layers.0.fc", "2,000", "0.6000", "0.6800", "0.9"] in lines


def test_a_wide_table_is_not_cut_in_a_pipe():
    names = ["encoder.layers." * 8 + str(n) for n in range(2)]
    assert all(any(line.strip().startswith(name) for line in printed(report_of(names)).splitlines()) for name in names)


def test_names_are_no_markup():
    assert "[bold]" in printed(report_of(["[bold]"]))


def test_the_last_line_can_be_pasted_into_a_command(report):
    [argument] = shlex.split(printed(report).splitlines()[-1])
    sparsity = compose(["recipe=prune_weights", argument]).callbacks.pruning.sparsity
    assert sparsity == {"conv1": 0.5, "layers.0.fc": 0.9}


def test_a_name_that_the_command_line_cannot_take_becomes_a_glob():
    argument = override({"h*": 0.5, "größe": 0.25, "a[0]": 0.125, "": 0.9})
    assert argument == "callbacks.pruning.sparsity={h?:0.5,gr??e:0.25,a?0?:0.125,*:0.9}"
    assert len(compose(["recipe=prune_weights", argument]).callbacks.pruning.sparsity) == 4


def test_where_nothing_can_be_proposed_there_is_nothing_to_paste(report):
    assert "callbacks.pruning" not in printed(report, max_drop=0.0)
    assert "No layer can be pruned while val/error is at most 0 worse" in printed(report, max_drop=0.0)


def test_three_files_are_written_whole(report, tmp_path):
    paths = write_sensitivity(report, tmp_path / "new", max_drop=0.2, metric="val/error")
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == sorted(path.name for path in paths)
    rows, picture, text = (path.read_text(encoding="utf-8") for path in paths)
    assert rows.splitlines()[2] == "conv1,1000,0.5,0.7"
    assert "conv1" in texts(picture)
    assert "| conv1 | 1,000 | 0.7000 | 0.8600 | 0.5 |" in text
    assert "    'callbacks.pruning.sparsity={conv1:0.5,layers.0.fc:0.9}'\n" in text
