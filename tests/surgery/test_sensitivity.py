import math

import pytest
import torch
from torch import nn

from lightning_edge.surgery.sensitivity import SensitivityReport, SensitivityRow, sensitivity


class Net(nn.Module):
    """Layers whose names are awkward as patterns: that of a class, and one with a star."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.Linear = nn.Linear(6, 5)
        self.norm = nn.BatchNorm1d(5)
        self.head = nn.Linear(5, 4)
        self.add_module("h*", nn.Linear(4, 3))

    def forward(self, x):
        return getattr(self, "h*")(self.head(self.norm(self.Linear(x))))


def zeros(module):
    """The zeros of all three layers in one number."""
    counts = [int((layer.weight == 0).sum()) for layer in (module.Linear, module.head, getattr(module, "h*"))]
    return float(10_000 * counts[0] + 100 * counts[1] + counts[2])


def report_of(points, *, dense=0.1, higher_is_better=False):
    rows = [SensitivityRow(layer, 10, *point) for layer, curve in points.items() for point in curve]
    return SensitivityReport(tuple(rows), dense, "0" * 64, higher_is_better)


def measure(module, evaluate=zeros, **options):
    return sensitivity(module, evaluate, **({"progress": False, "sparsities": [0.5]} | options))


def test_each_layer_is_pruned_alone_to_every_sparsity():
    report = measure(Net(), sparsities=[0.9, 0.5])
    assert report.dense == 0.0
    assert [(row.layer, row.size, row.sparsity, row.value) for row in report.rows] == [
        ("Linear", 30, 0.5, 150_000.0),
        ("Linear", 30, 0.9, 270_000.0),
        ("head", 20, 0.5, 1000.0),
        ("head", 20, 0.9, 1800.0),
        ("h*", 12, 0.5, 6.0),
        ("h*", 12, 0.9, 10.0),
    ]


def test_the_smallest_weights_are_those_that_go():
    module = Net()
    weight = module.head.weight.detach().clone()
    seen = []
    measure(module, lambda m: seen.append(m.head.weight.detach().clone()) or 0.0, include=["head"])
    threshold = weight.abs().flatten().sort().values[9]
    assert torch.equal(seen[1], torch.where(weight.abs() > threshold, weight, 0.0))


def test_the_weights_come_back_bit_by_bit():
    module = Net()
    with torch.no_grad():
        module.head.weight[0, :2] = torch.tensor([-0.0, 1e-42])
    before = {name: value.clone() for name, value in module.state_dict().items()}
    measure(module)
    for name, value in module.state_dict().items():
        assert torch.equal(value.view(-1).view(torch.uint8), before[name].view(-1).view(torch.uint8)), name


def test_the_weights_come_back_when_the_evaluation_fails():
    module = Net()
    before = module.head.weight.detach().clone()

    def evaluate(network):
        if bool((network.head.weight == 0).any()):
            raise RuntimeError("no memory")
        return 0.0

    with pytest.raises(RuntimeError, match="no memory"):
        measure(module, evaluate)
    assert torch.equal(module.head.weight, before)


def test_layers_can_be_chosen():
    assert list(measure(Net(), include=["h*"], exclude=["head"]).curves) == ["h*"]


def test_a_network_that_is_one_layer_has_an_empty_name():
    report = measure(nn.Linear(4, 2), lambda layer: float((layer.weight == 0).sum()))
    assert [(row.layer, row.value) for row in report.rows] == [("", 4.0)]


def test_a_shared_weight_is_measured_once_and_stays_shared():
    module = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    module[1].weight = module[0].weight
    report = measure(module, lambda m: float((m[1].weight == 0).sum()))
    assert [(row.layer, row.value) for row in report.rows] == [("0", 8.0)]
    assert module[1].weight is module[0].weight


class Killed(Exception):
    pass


@pytest.mark.parametrize("calls", range(7))
def test_a_killed_measurement_goes_on_without_repeating_rows(tmp_path, calls):
    path, count = tmp_path / "new" / "rows.csv", 0

    def evaluate(module):
        nonlocal count
        if count == calls:
            raise Killed
        count += 1
        return zeros(module) + 1 / 3

    module, options = Net(), {"sparsities": [0.5, 0.7], "path": path}
    with pytest.raises(Killed):
        measure(module, evaluate, **options)
    calls = 100
    report = measure(module, evaluate, **options)
    assert count == 7
    assert report == measure(Net(), lambda m: zeros(m) + 1 / 3, sparsities=[0.5, 0.7])
    assert [file.name for file in path.parent.iterdir()] == ["rows.csv"]
    whole = path.read_bytes()
    assert measure(module, lambda _: 1 / 0, **options) == report
    assert report.write_csv(tmp_path / "again.csv").read_bytes() == whole


def test_other_sparsities_and_layers_are_added_to_the_file(tmp_path):
    path = tmp_path / "rows.csv"
    measure(Net(), include=["head"], path=path)
    report = measure(Net(), sparsities=[0.7], path=path)
    assert len(report.rows) == 3
    assert [line.split(",")[::2] for line in path.read_text().splitlines()[2:]] == [
        ["head", "0.5"],
        ["Linear", "0.7"],
        ["head", "0.7"],
        ["h*", "0.7"],
    ]


def test_the_file_of_another_network_is_refused(tmp_path):
    path, other = tmp_path / "rows.csv", Net()
    measure(Net(), path=path)
    with torch.no_grad():
        other.norm.running_mean += 1e-6
    with pytest.raises(ValueError, match=r"path must hold rows of this network .*rows\.csv with those of another"):
        measure(other, path=path)


@pytest.mark.parametrize("text", ["", "a,b\n1,2\n", f"# network {'0' * 64}, dense value 0.1\nlayer,size\n"])
def test_a_file_of_something_else_is_refused_and_kept(tmp_path, text):
    path = tmp_path / "rows.csv"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"path must be a new file or one that sensitivity wrote, got .*rows\.csv"):
        measure(Net(), path=path)
    assert path.read_text() == text


@pytest.mark.parametrize("row", ["head,20,half,0.1", "head,20"])
def test_a_damaged_row_is_refused(tmp_path, row):
    path = tmp_path / "rows.csv"
    measure(Net(), path=path)
    path.write_text(f"{path.read_text()}{row}\n")
    with pytest.raises(ValueError, match=r"path must hold layer, size, sparsity, value in every row, got .*'head'"):
        measure(Net(), path=path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sparsities": []}, r"sparsities must be one or more fractions of zeros in \(0, 1\), got \[\]"),
        ({"sparsities": [0.5, 1.0]}, r"sparsities must .*got \[0\.5, 1\.0\]"),
        ({"sparsities": [0.0]}, r"sparsities must .*got \[0\.0\]"),
        ({"include": ["fc9"]}, "include must match a linear or convolution layer, got 'fc9'"),
        ({"evaluate": lambda _: math.nan}, "evaluate must return a finite metric for the dense network, got nan"),
    ],
)
def test_what_cannot_work_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        measure(Net(), **options)


def test_an_evaluation_that_moves_batch_norm_is_refused():
    module = Net().train()
    with pytest.raises(ValueError, match="evaluate must leave the network as it is, .* eval mode"):
        measure(module, lambda m: m(torch.randn(8, 6)).mean().item())


def test_the_proposal_is_the_last_sparsity_within_the_drop_and_a_line_from_there():
    report = report_of({
        "bears": [(0.5, 0.1), (0.9, 0.12)],
        "between": [(0.5, 0.11), (0.9, 0.31)],
        "early": [(0.5, 0.2), (0.9, 0.9)],
        "dips": [(0.5, 0.2), (0.7, 0.1), (0.9, 0.3)],
        "broken": [(0.5, math.nan), (0.9, math.inf)],
    })  # fmt: skip
    assert report.propose(0.05) == {"bears": 0.9, "between": 0.58, "early": 0.25, "dips": 0.75}


def test_of_a_metric_that_grows_with_quality_the_loss_counts():
    report = report_of({"fc": [(0.5, 0.9), (0.9, 0.7)]}, dense=0.9, higher_is_better=True)
    assert report.propose(0.1) == {"fc": 0.7}
    assert report.propose(0.2) == {"fc": 0.9}


def test_a_drop_that_is_only_rounding_over_the_limit_is_within_it():
    assert 0.07 - 0.06 > 0.01
    assert report_of({"fc": [(0.9, 0.07)]}, dense=0.06).propose(0.01) == {"fc": 0.9}


def test_without_any_drop_a_layer_that_loses_is_left_out():
    assert report_of({"fc": [(0.5, 0.2)], "better": [(0.5, 0.05), (0.7, 0.1), (0.9, 0.2)]}).propose(0) == {
        "better": 0.7
    }


def test_a_proposal_never_lies_above_the_line_or_below_the_measured_sparsity():
    assert report_of({"fc": [(0.3, 0.1), (0.9, 0.4)]}).propose(0.1) == {"fc": 0.5}
    assert report_of({"fc": [(0.57, 0.1), (0.9, 1e9)]}).propose(0.1) == {"fc": 0.57}


@pytest.mark.parametrize("max_drop", [-0.1, math.nan])
def test_a_negative_drop_is_refused(max_drop):
    with pytest.raises(ValueError, match="max_drop must be at least 0, got"):
        report_of({"fc": [(0.5, 0.1)]}).propose(max_drop)


def test_the_bar_shows_how_far_it_is(capsys):
    measure(Net(), progress=True)
    assert "3/3" in capsys.readouterr().out
