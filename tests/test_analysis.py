"""The recipe of the sensitivity, on real digits through the command line, killed and resumed."""

import inspect
import re
from xml.etree import ElementTree

import lightning as L
import pytest
import torch
from hydra.utils import instantiate

from lightning_edge.analysis import QuantizationSensitivityAnalysis, SensitivityAnalysis
from lightning_edge.cli import main
from lightning_edge.config import compose
from lightning_edge.config_check import check
from lightning_edge.surgery import sensitivity as surgery

pytestmark = pytest.mark.recipe
SHORT = ("dense.trainer.max_epochs=1", "trainer.enable_progress_bar=false", "sensitivity.sparsities=[0.5,0.9]")
FILES = {"sensitivity.csv", "sensitivity.svg", "sensitivity.md", "baseline.ckpt"}


def run(folder, *overrides):
    return main(["recipe=sensitivity", f"hydra.run.dir={folder}", *SHORT, *overrides])


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The folder of a run that was never killed."""
    folder = tmp_path_factory.mktemp("whole")
    assert run(folder) == 0
    return folder


def test_the_recipe_lists_every_argument():
    parameters = inspect.signature(SensitivityAnalysis).parameters
    assert set(compose(["recipe=sensitivity"]).sensitivity) - {"_target_"} == set(parameters)


def test_the_defaults_of_the_recipe_are_those_of_the_class():
    assert instantiate(compose(["recipe=sensitivity"]).sensitivity) == SensitivityAnalysis(
        sparsities=[*surgery.SPARSITIES], include=["*"], exclude=[]
    )


def test_a_misspelt_key_is_refused_before_anything_runs():
    cfg = compose(["recipe=sensitivity", "+sensitivity.max_dorp=0.1"])
    with pytest.raises(ValueError, match=r"sensitivity.max_dorp must be an argument .*did you mean 'max_drop'\?"):
        check(cfg)


def test_a_run_writes_the_rows_the_curves_and_the_proposal(whole):
    assert {path.name for path in whole.iterdir() if path.suffix != ".log"} == {*FILES, ".hydra"}
    rows = [line.split(",") for line in (whole / "sensitivity.csv").read_text().splitlines()[2:]]
    assert [(row[0], row[2]) for row in rows] == [
        (layer, sparsity) for layer in ("conv1", "conv2", "conv3", "fc1", "fc2") for sparsity in ("0.5", "0.9")
    ]
    assert ElementTree.parse(whole / "sensitivity.svg").getroot().tag.endswith("svg")
    assert "| conv1 | 216 |" in (whole / "sensitivity.md").read_text()


def test_the_dense_value_is_the_error_on_the_validation_images(whole):
    cfg = compose(["recipe=sensitivity"])
    model, data = instantiate(cfg.model), instantiate(cfg.data)
    model.load_state_dict(torch.load(whole / "baseline.ckpt", weights_only=True)["state_dict"])
    data.setup()
    images, labels = data.validation.__getitems__(range(len(data.validation)))
    with torch.no_grad():
        wrong = int((model.eval()(images).argmax(1) != labels).sum())
    dense = re.search("dense value (.*)", (whole / "sensitivity.csv").read_text())[1]
    assert float(dense) == pytest.approx(wrong / len(labels))


@pytest.mark.parametrize("calls", [1, 4])
def test_a_killed_run_goes_on_without_repeating_rows(whole, tmp_path, monkeypatch, capsys, calls):
    done = []
    validate = L.Trainer.validate

    def dies(self, *arguments, **options):
        done.append(1)
        if len(done) > calls:
            raise KeyboardInterrupt
        return validate(self, *arguments, **options)

    monkeypatch.setattr(L.Trainer, "validate", dies)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, f"baseline={whole}/baseline.ckpt")
    assert not (tmp_path / "sensitivity.md").exists()
    kept, calls = calls, 100
    done.clear()
    assert main([f"resume={tmp_path}"]) == 0
    assert kept + len(done) == 11
    for name in FILES:
        assert (tmp_path / name).read_bytes() == (whole / name).read_bytes()
    assert "callbacks.pruning.sparsity={" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("sensitivity.include=[fc9]", "include must match a linear or convolution layer, got 'fc9'"),
        ("sensitivity.sparsities=[50]", "sparsities must be one or more fractions of zeros in (0, 1), got [50]"),
        ("sensitivity.max_drop=-1", "max_drop must be at least 0, got -1"),
    ],
)
def test_what_cannot_work_is_said_before_any_training(tmp_path, capsys, override, message):
    assert run(tmp_path / "new", override) == 1
    assert message in capsys.readouterr().err
    assert not (tmp_path / "new" / "baseline").exists()


def test_a_metric_that_is_not_logged_is_answered_with_those_that_are(whole, tmp_path, capsys):
    assert run(tmp_path, f"baseline={whole}/baseline.ckpt", "sensitivity.monitor=val/eror") == 1
    assert "monitor must be one of ['val/error', 'val/loss'], got 'val/eror'" in capsys.readouterr().err


def test_the_recipe_of_the_quantization_sensitivity_chooses_layers_that_the_next_run_keeps(whole, tmp_path, capsys):
    cfg = compose(["recipe=quantization_sensitivity"])
    assert instantiate(cfg.sensitivity) == QuantizationSensitivityAnalysis()
    arguments = [f"hydra.run.dir={tmp_path}/run", f"baseline={whole}/baseline.ckpt", "sensitivity.max_drop=1.0"]
    assert main(["recipe=quantization_sensitivity", "trainer.enable_progress_bar=false", *arguments]) == 0
    said = capsys.readouterr().out
    assert "'callbacks.calibration.keep=[]'" in said
    assert "| conv1 | 216 |" in said
    assert {path.name for path in (tmp_path / "run").iterdir()} >= {
        "quantization_sensitivity.json",
        "quantization_sensitivity.md",
    }
