"""Whole runs on real digits through the command line, killed and resumed."""

import json
import os
import signal
import subprocess
import sys
import time
from functools import partial

import pytest
import torch

from lightning_edge import pipeline
from lightning_edge.artifact import inspect
from lightning_edge.callbacks import History
from lightning_edge.callbacks import export as export_module
from lightning_edge.cli import main
from lightning_edge.models import DigitsNet

pytestmark = pytest.mark.recipe
EPOCHS = 5
SHORT = (
    "dense.trainer.max_epochs=2",
    f"trainer.max_epochs={EPOCHS}",
    "callbacks.export.min_agreement=0.9",
    "model.network.dropout=0.2",
    "trainer.enable_progress_bar=false",
)


@pytest.fixture(scope="module", autouse=True)
def quick_timing():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline, "measure_artifacts", partial(pipeline.measure_artifacts, seconds=0.3))
        yield


@pytest.fixture
def killed(monkeypatch):
    """Let a run die at the end of an epoch of a stage, before its checkpoint is written."""

    class Killed(Exception):
        pass

    def kill(epoch, max_epochs):
        real = History.on_train_epoch_end

        def dies(self, trainer, pl_module):
            real(self, trainer, pl_module)
            if trainer.current_epoch == epoch and trainer.max_epochs == max_epochs:
                raise Killed

        monkeypatch.setattr(History, "on_train_epoch_end", dies)
        return Killed

    return kill


def run(folder, *overrides):
    return main(["recipe=deep_compression", "export.formats=[edge]", f"hydra.run.dir={folder}", *SHORT, *overrides])


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The bytes of the run that was never killed."""
    folder = tmp_path_factory.mktemp("whole")
    assert run(folder) == 0
    return (folder / "model.edge").read_bytes()


@pytest.mark.slow
def test_deep_compression_writes_what_it_promises(tmp_path, capsys):
    assert main(["recipe=deep_compression", f"hydra.run.dir={tmp_path}/run", *SHORT]) == 0
    folder = tmp_path / "run"
    names = {path.name for path in folder.iterdir()}
    artefacts = {"model.edge", "model.onnx", "baseline.onnx"}
    assert names >= {"baseline.ckpt", "last.ckpt", "report.json", "report.md", "report.html", *artefacts}
    report = json.loads((folder / "report.json").read_text())
    for row in [report["baseline"], *report["artifacts"]]:
        assert row["size_bytes"] == (folder / row["file"]).stat().st_size
        assert row["error"]["total"] == 599
    tensors = inspect(folder / "model.edge").tensors
    assert max(tensor.distinct for tensor in tensors if tensor.name.endswith("weight")) <= 33
    assert "edge" in capsys.readouterr().out
    assert "<svg" in (folder / "report.html").read_text()


@pytest.mark.slow
def test_int8_runs_in_both_runtimes_from_a_given_baseline(tmp_path):
    pytest.importorskip("executorch")
    first, second = tmp_path / "first", tmp_path / "second"
    assert run(first, "trainer.max_epochs=2", "callbacks.sharing.at_epochs=[1]") == 0
    options = ["data.batch_size=128", f"baseline={first}/baseline.ckpt", f"hydra.run.dir={second}"]
    assert main(["recipe=qat_int8", *SHORT, *options]) == 0
    rows = json.loads((second / "report.json").read_text())["artifacts"]
    int8 = {row["file"]: row["error"]["wrong"] for row in rows if row["file"].startswith("model")}
    assert set(int8) == {"model.onnx", "model.pte"}
    assert abs(int8["model.onnx"] - int8["model.pte"]) <= 3
    assert (second / "baseline.ckpt").read_bytes() == (first / "baseline.ckpt").read_bytes()


@pytest.mark.parametrize("epoch", range(EPOCHS))
def test_a_compression_killed_at_any_epoch_gives_the_same_file(whole, killed, tmp_path, monkeypatch, capsys, epoch):
    with pytest.raises(killed(epoch, EPOCHS)):
        run(tmp_path)
    monkeypatch.undo()
    assert main([f"resume={tmp_path}"]) == 0
    assert (tmp_path / "model.edge").read_bytes() == whole
    resumed = f"compression: {EPOCHS} epochs, resumed from {tmp_path / 'last.ckpt'}"
    assert (resumed in capsys.readouterr().out) == (epoch > 0)


def test_a_baseline_killed_half_way_gives_the_same_file(whole, killed, tmp_path, monkeypatch):
    with pytest.raises(killed(1, 2)):
        run(tmp_path)
    monkeypatch.undo()
    assert main([f"resume={tmp_path}"]) == 0
    assert (tmp_path / "model.edge").read_bytes() == whole


def test_a_run_killed_during_export_gives_the_same_file(whole, tmp_path, monkeypatch):
    monkeypatch.setattr(export_module, "verify", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run(tmp_path)
    monkeypatch.undo()
    assert not (tmp_path / "model.edge").exists()
    assert main([f"resume={tmp_path}"]) == 0
    assert (tmp_path / "model.edge").read_bytes() == whole


def test_without_exact_resume_the_file_differs(whole, killed, tmp_path, monkeypatch):
    """The tests above have something to find."""
    with pytest.raises(killed(2, EPOCHS)):
        run(tmp_path, "~callbacks.exact_resume")
    monkeypatch.undo()
    with pytest.warns(UserWarning, match="resumed without ExactResume"):
        assert main([f"resume={tmp_path}"]) == 0
    assert (tmp_path / "model.edge").read_bytes()[61:] != whole[61:]  # behind the recipe's hash, which differs too


@pytest.mark.slow
def test_a_process_that_is_really_killed_goes_on(whole, tmp_path):
    overrides = ["recipe=deep_compression", "export.formats=[edge]", f"hydra.run.dir={tmp_path}", *SHORT]
    process = subprocess.Popen([sys.executable, "-m", "lightning_edge", *overrides])
    deadline = time.monotonic() + 120
    while not (tmp_path / "last.ckpt").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not (tmp_path / "model.edge").exists()
    assert main([f"resume={tmp_path}"]) == 0
    assert (tmp_path / "model.edge").read_bytes() == whole


def test_the_checkpoints_load_into_plain_networks(whole, tmp_path):
    run(tmp_path)
    for name in ("baseline.ckpt", "last.ckpt"):
        state = torch.load(tmp_path / name, weights_only=True)["state_dict"]
        prefix = "network." if name == "baseline.ckpt" else "student.network."  # no teacher is in it
        DigitsNet(dropout=0.2).load_state_dict({key.removeprefix(prefix): value for key, value in state.items()})


def test_a_folder_of_another_run_is_refused(tmp_path, capsys):
    (tmp_path / "last.ckpt").touch()
    assert run(tmp_path) == 1
    assert "hydra.run.dir must be a new folder" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("callbacks.pruning.include=[fc9]", "include must match a linear or convolution layer, got 'fc9'"),
        ("callbacks.sharing.at_epochs=[99]", "at_epochs must lie below max_epochs"),
        ("baseline=nowhere.ckpt", "baseline must be a checkpoint file, got 'nowhere.ckpt'"),
        ("callbacks.pruning.sparsity=95", "for 95 percent write 0.95"),
    ],
)
def test_what_cannot_work_is_said_before_any_training(tmp_path, capsys, override, message):
    start = time.process_time()
    assert run(tmp_path / "new", override) == 1
    assert message in capsys.readouterr().err
    assert time.process_time() - start < 10
    assert not (tmp_path / "new" / "baseline").exists()


@pytest.mark.parametrize("prefix", ["", "module."])
def test_the_plain_weights_of_a_network_are_a_baseline_too(tmp_path, prefix):
    torch.manual_seed(0)
    weights = {f"{prefix}{name}": value for name, value in DigitsNet().state_dict().items()}
    torch.save({"state_dict": weights} if prefix else weights, tmp_path / "net.pth")
    main(["recipe=prune_weights", f"baseline={tmp_path / 'net.pth'}", f"hydra.run.dir={tmp_path / 'run'}", *SHORT])
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert report["history"][0]["stage"] == "compression"


@pytest.mark.parametrize("epoch", [1, 2, 4])
def test_channels_killed_before_and_after_their_removal_give_the_same_file(tmp_path, killed, monkeypatch, epoch):
    arguments = ["recipe=prune_channels", *SHORT, "callbacks.channels.remove_epoch=2", "export.formats=[edge]"]
    assert main([*arguments, f"hydra.run.dir={tmp_path / 'whole'}"]) == 0
    with pytest.raises(killed(epoch, EPOCHS)):
        main([*arguments, f"hydra.run.dir={tmp_path / 'killed'}"])
    monkeypatch.undo()
    assert main([f"resume={tmp_path / 'killed'}"]) == 0
    whole, resumed = (tmp_path / name / "model.edge" for name in ("whole", "killed"))
    assert resumed.read_bytes() == whole.read_bytes()
    report = json.loads((tmp_path / "killed" / "report.json").read_text())
    assert report["artifacts"][0]["macs"] <= 0.5 * report["baseline"]["macs"]


def test_a_narrow_network_is_a_baseline_for_the_next_recipe(tmp_path):
    assert main(["recipe=prune_channels", *SHORT, f"hydra.run.dir={tmp_path / 'narrow'}"]) == 0
    baseline = f"baseline={tmp_path / 'narrow' / 'last.ckpt'}"
    assert main(["recipe=deep_compression", baseline, *SHORT, f"hydra.run.dir={tmp_path / 'packed'}"]) == 0
    narrow, packed = (json.loads((tmp_path / name / "report.json").read_text()) for name in ("narrow", "packed"))
    assert packed["baseline"]["macs"] == narrow["artifacts"][0]["macs"] < narrow["baseline"]["macs"]


def test_quantization_after_training_gives_the_same_file_twice_and_when_its_export_is_killed(tmp_path, monkeypatch):
    options = ["recipe=ptq_int8", "export.formats=[onnx]", "callbacks.calibration.batches=4", *SHORT]
    options.remove(f"trainer.max_epochs={EPOCHS}")  # the recipe trains no epoch more
    files = []
    for name in ("first", "second"):
        assert main([*options, f"hydra.run.dir={tmp_path / name}"]) == 0
        files.append((tmp_path / name / "model.onnx").read_bytes())
    monkeypatch.setattr(export_module, "verify", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        main([*options, f"hydra.run.dir={tmp_path / 'killed'}"])
    monkeypatch.undo()
    assert main([f"resume={tmp_path / 'killed'}"]) == 0
    (tmp_path / "second" / "model.onnx").unlink()
    assert main([f"resume={tmp_path / 'second'}"]) == 0
    files += [(tmp_path / name / "model.onnx").read_bytes() for name in ("killed", "second")]
    assert len(set(files)) == 1
    report = json.loads((tmp_path / "first" / "report.json").read_text())
    assert report["artifacts"][0]["error"]["wrong"] <= report["baseline"]["error"]["wrong"] + 3
    plain = torch.load(tmp_path / "first" / "last.ckpt", weights_only=True)["state_dict"]
    DigitsNet(dropout=0.2).load_state_dict({key.removeprefix("network."): value for key, value in plain.items()})
