"""The command line: what it prints, what it runs, and how it answers mistakes. The stages themselves are stand-ins."""

import logging
import os
import runpy
import subprocess
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import pytest
from hydra.errors import InstantiationException
from hydra.utils import instantiate
from omegaconf import OmegaConf

import lightning_edge
from lightning_edge.cli import main
from lightning_edge.config import recipe_titles

SHORT = ["trainer.max_epochs=2", "dense.trainer.max_epochs=1"]


@pytest.fixture(autouse=True)
def no_full_error(monkeypatch):
    monkeypatch.delenv("HYDRA_FULL_ERROR", raising=False)


class Stages:
    """Stands for the stages of a run: remembers what it was called with, then does as it is told."""

    def __init__(self):
        self.calls = []
        self.error = None

    def run(self, cfg, folder):
        self.calls.append((cfg, folder, Path.cwd(), os.environ.get("HYDRA_FULL_ERROR")))
        if self.error is not None:
            raise self.error


@pytest.fixture
def stages(monkeypatch):
    stages = Stages()
    module = ModuleType("lightning_edge.pipeline")
    module.run = stages.run
    monkeypatch.setitem(sys.modules, "lightning_edge.pipeline", module)
    return stages


def answer(capsys, *arguments):
    """Return the exit code and the single message of a command line that fails."""
    code = main(arguments)
    error = capsys.readouterr().err
    assert "Traceback" not in error
    assert error.endswith("(HYDRA_FULL_ERROR=1 shows the stack trace)\n")
    return code, error


def test_without_arguments_the_recipes_are_listed_one_line_each(capsys):
    assert main([]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len([line for line in lines if line.startswith(("  deep_compression     ", "  qat_int8   "))]) == 2


@pytest.mark.parametrize("flag", ["-h", "--help"])
def test_help_tells_the_commands(capsys, flag):
    assert main([flag]) == 0
    assert "lightning-edge inspect FILE" in capsys.readouterr().out


def test_the_version_is_printed(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.strip() == lightning_edge.__version__


def test_python_dash_m_is_the_same_command(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["lightning-edge"])
    with pytest.raises(SystemExit) as stop:
        runpy.run_module("lightning_edge", run_name="__main__")
    assert stop.value.code == 0
    assert "recipes:" in capsys.readouterr().out


def test_a_recipe_runs_in_the_output_folder(stages, tmp_path):
    assert main(["recipe=deep_compression", "hydra.run.dir=out", *SHORT, "callbacks.sharing.clusters=16"]) == 0
    [(cfg, folder, cwd, _)] = stages.calls
    assert (folder, cwd, cfg.output) == (tmp_path / "out", tmp_path, str(tmp_path / "out"))
    assert (cfg.callbacks.sharing.clusters, cfg.resume) == (16, None)
    assert (folder / ".hydra/config.yaml").is_file()


def test_the_command_line_is_put_back_after_a_run(stages):
    before = list(sys.argv)
    main(["recipe=qat_int8", "hydra.run.dir=out"])
    assert sys.argv == before


def test_a_sweep_runs_every_recipe(stages, tmp_path, capsys):
    assert main(["-m", "recipe=deep_compression,qat_int8", "hydra.sweep.dir=sweep"]) == 0
    assert [folder for _, folder, _, _ in stages.calls] == [tmp_path / "sweep/0", tmp_path / "sweep/1"]
    assert [sorted(cfg.export.formats) for cfg, _, _, _ in stages.calls] == [["edge", "onnx"], ["onnx", "pte"]]


def test_an_interrupted_run_goes_on_with_its_saved_configuration(stages, tmp_path, monkeypatch):
    started, elsewhere = tmp_path / "started", tmp_path / "elsewhere"
    started.mkdir()
    elsewhere.mkdir()
    monkeypatch.chdir(started)
    main(["recipe=deep_compression", "hydra.run.dir=out", *SHORT, "data=mnist", "data.path=mnist.npz"])
    monkeypatch.chdir(elsewhere)
    monkeypatch.setattr(sys, "argv", ["lightning-edge"])
    assert main(["resume=../started/out", "threads=2"]) == 0
    (first, _, _, _), (second, folder, cwd, _) = stages.calls
    assert folder == started / "out"
    assert cwd == started  # so that data.path means what it meant
    assert (second.resume, second.threads) == (str(folder), 2)
    assert sys.argv == ["lightning-edge", f"resume={folder}", "threads=2"]  # what Lightning repeats for other ranks
    second.resume, second.threads = None, None
    assert second == first
    assert not list(elsewhere.iterdir())


def test_a_run_goes_on_where_the_folder_it_was_started_from_is_gone(stages, tmp_path, monkeypatch):
    started = tmp_path / "started"
    started.mkdir()
    monkeypatch.chdir(started)
    main(["recipe=qat_int8", f"hydra.run.dir={tmp_path}/out"])
    monkeypatch.chdir(tmp_path)
    started.rmdir()
    monkeypatch.setattr(sys, "argv", ["lightning-edge"])
    assert main(["resume=out"]) == 0
    assert stages.calls[1][2] == tmp_path


def test_a_folder_without_a_saved_configuration_cannot_be_resumed(capsys, tmp_path):
    code, said = answer(capsys, "resume=nothing")
    assert code == 1
    assert "resume must name the folder of a run, got 'nothing'" in said


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("seed=1", "must not change its result, got ['seed=1']"),
        ("threats=1", "threats must be a key of the saved configuration: did you mean 'threads'?"),
        ("+threads=1", "must be key=value, got '+threads=1'"),
        ("~threads", "must be key=value, got '~threads'"),
        ("threads=1,2", "must be key=value, got 'threads=1,2'"),
    ],
)
def test_a_resumed_run_takes_only_overrides_that_leave_its_result(stages, capsys, override, message):
    main(["recipe=qat_int8", "hydra.run.dir=out"])
    code, said = answer(capsys, "resume=out", override)
    assert (code, len(stages.calls)) == (1, 1)
    assert message in said


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["recipe=deep_compresion"],
            f"recipe must be one of {', '.join(recipe_titles())}, got 'deep_compresion': did you mean",
        ),
        (
            ["recipe=qat_int8", "model=lenet6"],
            "model must be one of digits_net, lenet300, lenet5, resnet20, resnet56, resnet8, got 'lenet6': did you",
        ),
        (["recipe=qat_int8", "trainer.max_epoch=3"], "trainer.max_epoch must be a key of the configuration: did you"),
        (["recipe=qat_int8", "trianer.devices=3"], "trianer.devices must be a key of the configuration: did you mean"),
        (["recipe=qat_int8", "modle=lenet5"], "modle must be a key of the configuration: did you mean 'model'?"),
        (["recipe=qat_int8", "~callbacks.quantisation"], "did you mean 'callbacks.quantization'"),
        (["recipe=qat_int8", "callbacks.pruning.sparsity=0.5"], "callbacks.pruning.sparsity must be a key"),
        (["-m", "recipe=qat_int8,qat_int9"], "got 'qat_int9': did you mean 'qat_int8'"),
        (["recipe=qat_int8", "+trainer.max_epoch=3"], "trainer.max_epoch must be an argument of lightning.Trainer"),
        (["recipe=qat_int8", "trainer.max_epochs=-1"], "trainer.max_epochs must be at least 1 for ${epoch_at:"),
        (["data=mnist"], "callbacks must hold a technique or an export"),
    ],
)
def test_a_mistake_is_answered_with_the_nearest_choice_before_anything_runs(stages, capsys, arguments, message):
    code, said = answer(capsys, *arguments, "hydra.run.dir=out")
    assert (code, stages.calls) == (1, [])
    assert message in said


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("deep_compression", "must be key=value, got 'deep_compression': did you mean 'recipe=deep_compression'?"),
        ('a.layers={"conv?": fc}', "a.layers must have a value that Hydra can read, got"),
        ("inspekt", "did you mean 'inspect'?"),
    ],
)
def test_what_is_no_override_is_wrong_usage(capsys, argument, message):
    code, said = answer(capsys, argument)
    assert code == 2
    assert message in said


@pytest.mark.parametrize(
    ("defaults", "body", "message"),
    [
        ("/callbacks", "callbacks: {pruning: {sparsty: 0.5}}", "callbacks.pruning.sparsty must be an argument of"),
        ("/callbacks", "traner: {max_epochs: 3}", "traner must be a key that something reads: did you mean 'trainer'"),
        ("/callback", "", "callback must be a key of the configuration: did you mean 'callbacks'"),
    ],
)
def test_a_mistake_inside_a_recipe_is_answered_too(stages, capsys, tmp_path, defaults, body, message):
    recipe = tmp_path / "mine/recipe/wrong.yaml"
    recipe.parent.mkdir(parents=True)
    recipe.write_text(f"# @package _global_\ndefaults: [{{override {defaults}: [default, pruning]}}]\n{body}\n")
    code, said = answer(capsys, "--config-dir", "mine", "recipe=wrong", "hydra.run.dir=out")
    assert (code, stages.calls) == (1, [])
    assert message in said


@pytest.mark.parametrize("error", [ValueError("include must match"), FileNotFoundError("no mnist.npz")], ids=repr)
@pytest.mark.parametrize("sweep", [[], ["-m"]], ids=["run", "sweep"])
def test_what_the_stages_refuse_is_one_message(stages, capsys, error, sweep):
    stages.error = error
    code, said = answer(capsys, *sweep, "recipe=qat_int8", "hydra.run.dir=out", "hydra.sweep.dir=out")
    assert code == 1
    assert f"lightning-edge: {error}\n" in said


def test_the_cause_of_a_failed_construction_is_what_is_said(stages, capsys):
    cfg = OmegaConf.create({"callbacks": {"sgd": {"_target_": "torch.optim.SGD", "params": [], "lr": 0.1}}})
    with pytest.raises(InstantiationException) as raised:
        instantiate(cfg.callbacks.sgd)
    stages.error = raised.value
    code, said = answer(capsys, "recipe=qat_int8", "hydra.run.dir=out")
    assert code == 1
    assert "lightning-edge: callbacks.sgd: optimizer got an empty parameter list\n" in said


@pytest.mark.parametrize("sweep", [[], ["-m"]], ids=["run", "sweep"])
def test_a_bug_shows_its_trace(stages, sweep):
    stages.error = AssertionError("a bug")
    with pytest.raises(AssertionError, match="a bug"):
        main([*sweep, "recipe=qat_int8", "hydra.run.dir=out", "hydra.sweep.dir=out"])


def test_every_error_shows_its_trace_when_asked_for(stages, monkeypatch):
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    stages.error = ValueError("include must match")
    with pytest.raises(ValueError, match="include must match"):
        main(["recipe=qat_int8", "hydra.run.dir=out"])
    assert os.environ["HYDRA_FULL_ERROR"] == "1"


def test_the_stages_see_the_users_own_setting_of_full_errors(stages):
    main(["recipe=qat_int8", "hydra.run.dir=out"])
    assert stages.calls[0][3] is None
    assert "HYDRA_FULL_ERROR" not in os.environ


def test_the_console_belongs_to_the_stages(stages, tmp_path, capsys):
    main(["recipe=qat_int8", "hydra.run.dir=out"])
    logging.getLogger("somewhere").info("a line")
    assert capsys.readouterr() == ("", "")
    assert "a line" in (tmp_path / "out/lightning_edge.log").read_text()


def test_the_saved_configuration_can_be_printed(capsys):
    assert main(["recipe=qat_int8", "--cfg", "job"]) == 0
    assert "QuantizationAwareTraining" in capsys.readouterr().out


@dataclass(frozen=True)
class Section:
    name: str
    size_bytes: int


@dataclass(frozen=True)
class Tensor:
    name: str
    shape: tuple[int, ...]
    coding: str


@dataclass(frozen=True)
class Contents:
    size_bytes: int
    recipe_hash: str
    sections: tuple[Section, ...]
    tensors: tuple[Tensor, ...]


def test_inspect_prints_the_sections_and_the_tensors(monkeypatch, capsys):
    name = "a_network." * 6 + "[weight]"  # longer than what a table of 80 columns leaves for it
    contents = Contents(123456, "abc", (Section("graph", 1000),), (Tensor(name, (3, 4), "rans"),))
    monkeypatch.setattr("lightning_edge.artifact.inspect", lambda path, **_: contents, raising=False)
    assert main(["inspect", "model.edge"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[:2] == ["size bytes: 123,456", "recipe hash: abc"]
    assert [line.split() for line in lines if "graph" in line or "rans" in line] == [
        ["graph", "1,000"],
        [name, "3", "x", "4", "rans"],
    ]


def test_inspect_prints_that_a_file_has_no_tensors(monkeypatch, capsys):
    monkeypatch.setattr("lightning_edge.artifact.inspect", lambda path, **_: Contents(59, "", (), ()), raising=False)
    assert main(["inspect", "model.edge"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "tensors: none"


def test_a_damaged_file_is_one_message(monkeypatch, capsys):
    def damaged(path, **_):
        raise ValueError("checksum must be 1, got 2, at offset 3")

    monkeypatch.setattr("lightning_edge.artifact.inspect", damaged, raising=False)
    assert answer(capsys, "inspect", "model.edge") == (
        1,
        "lightning-edge: checksum must be 1, got 2, at offset 3\n(HYDRA_FULL_ERROR=1 shows the stack trace)\n",
    )


@pytest.mark.parametrize(
    "arguments",
    [["inspect"], ["unpack", "model.edge"], ["pack", "a", "b", "c"], ["run", "a", "--repeat", "x"]],
    ids=" ".join,
)
def test_a_missing_operand_is_wrong_usage(capsys, arguments):
    assert main(arguments) == 2
    assert "usage: lightning-edge" in capsys.readouterr().err


def test_warnings_between_libraries_do_not_reach_the_user(stages, monkeypatch):
    def warn(cfg, folder):
        for module in ("lightning.pytorch.utilities", "torchao.quantization", "mine"):
            warnings.warn_explicit("old", FutureWarning, "file.py", 1, module=module, registry={})
        warnings.warn_explicit("to the user", UserWarning, "file.py", 1, module="lightning.pytorch", registry={})

    monkeypatch.setattr(sys.modules["lightning_edge.pipeline"], "run", warn)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        assert main(["recipe=qat_int8", "hydra.run.dir=out"]) == 0
    assert [str(warning.message) for warning in seen] == ["old", "to the user"]


def test_a_wrong_command_line_is_answered_within_seconds():
    done = subprocess.run(
        [sys.executable, "-m", "lightning_edge", "recipe=qat_int8", "trainer.max_epoch=1"],
        capture_output=True,
        text=True,
        timeout=20,
        check=False,
    )
    assert done.returncode == 1
    assert done.stderr.count("\n") == 2
