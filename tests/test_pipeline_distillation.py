"""Runs with a teacher through the command line, killed and resumed."""

import json
from functools import partial

import pytest
import torch

from lightning_edge import pipeline
from lightning_edge.callbacks import History
from lightning_edge.cli import main
from lightning_edge.models import DigitsNet

pytestmark = pytest.mark.recipe
EPOCHS = 4
QUICK = ("dense.trainer.max_epochs=2", f"trainer.max_epochs={EPOCHS}", "trainer.enable_progress_bar=false")
TINY = ("callbacks.pruning.end_epoch=1", "callbacks.sharing.at_epochs=[2]", "callbacks.export.min_agreement=0.9")


class Killed(Exception):
    pass


@pytest.fixture(scope="module", autouse=True)
def quick_timing():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline, "measure_artifacts", partial(pipeline.measure_artifacts, seconds=0.3))
        yield


@pytest.mark.slow
def test_a_compressed_network_learns_from_its_dense_self_and_resumes_to_the_same_bytes(tmp_path, monkeypatch):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert main(["recipe=edge_tiny", *QUICK, *TINY, f"hydra.run.dir={whole}"]) == 0
    real = History.on_train_epoch_end

    def dies(self, trainer, pl_module):
        real(self, trainer, pl_module)
        if trainer.current_epoch == 2 and trainer.max_epochs == EPOCHS:
            raise Killed

    monkeypatch.setattr(History, "on_train_epoch_end", dies)
    with pytest.raises(Killed):
        main(["recipe=edge_tiny", *QUICK, *TINY, f"hydra.run.dir={cut}"])
    monkeypatch.undo()
    assert main([f"resume={cut}"]) == 0
    assert (cut / "model.edge").read_bytes() == (whole / "model.edge").read_bytes()
    state = torch.load(whole / "last.ckpt", weights_only=True)["state_dict"]
    assert all(name.startswith("student.network.") for name in state)


@pytest.mark.slow
def test_a_larger_network_is_trained_first_and_teaches_the_same_network_from_scratch(tmp_path):
    small = ["model.network.width=0.25", "export.formats=[onnx]", "callbacks.export.min_agreement=0.9"]
    assert main(["recipe=distill", "trainer.max_epochs=2", *QUICK[2:], *small, f"hydra.run.dir={tmp_path}/run"]) == 0
    folder = tmp_path / "run"
    taught = torch.load(folder / "teacher.ckpt", weights_only=True)["state_dict"]
    assert taught["network.conv1.weight"].shape[0] == 48
    alone = torch.load(folder / "baseline.ckpt", weights_only=True)
    distilled = torch.load(folder / "last.ckpt", weights_only=True)
    assert alone["epoch"] == distilled["epoch"] == 1
    rates = [state["lr_schedulers"][0]["base_lrs"] for state in (alone, distilled)]
    assert rates[0] == rates[1]
    names = [row["name"] for row in json.loads((folder / "report.json").read_text())["artifacts"]]
    assert names == ["onnx"]
    DigitsNet(width=0.25).load_state_dict(
        {name.removeprefix("student.network."): value for name, value in distilled["state_dict"].items()}
    )


@pytest.mark.slow
def test_a_teacher_of_the_user_s_own_is_read_from_its_file(tmp_path):
    torch.save(DigitsNet(width=2.0).state_dict(), tmp_path / "teacher.pt")
    node = (
        "distillation.teacher={_target_: lightning_edge.modules.pretrained, checkpoint: TEACHER,"
        " network: {_target_: lightning_edge.models.DigitsNet, dropout: 0.0, width: 2.0}}"
    ).replace("TEACHER", str(tmp_path / "teacher.pt"))
    options = ["distillation=self", node, *QUICK, *TINY, f"hydra.run.dir={tmp_path}/run"]
    assert main(["recipe=deep_compression", "export.formats=[edge]", *options]) == 0
    assert not (tmp_path / "run" / "teacher.ckpt").exists()


def test_a_mistake_in_the_distillation_is_said_before_any_training(tmp_path, capsys):
    options = ["distillation=self", "distillation.losses.soft_targets.loss=kd", f"hydra.run.dir={tmp_path}/run"]
    assert main(["recipe=deep_compression", *options]) == 1
    assert "loss must be one of" in capsys.readouterr().err
    assert main(["recipe=deep_compression", "start=anew", f"hydra.run.dir={tmp_path}/run2"]) == 1
    assert "start must be dense or scratch, got 'anew'" in capsys.readouterr().err
    pairs = [("self", "conv9: conv9"), ("self", "conv1: conf1"), ("larger", "conv9: conv1"), ("larger", "conv1: conv9")]
    for number, (teacher, pair) in enumerate(pairs):
        term = f"{{_target_: lightning_edge.modules.DistillationTerm, loss: hint, layers: {{{pair}}}}}"
        hint = [f"distillation={teacher}", f"+distillation.losses.hint={term}"]
        assert main(["recipe=deep_compression", *hint, f"hydra.run.dir={tmp_path}/layers{number}"]) == 1
        assert "layers must name layers of the" in capsys.readouterr().err
        assert not (tmp_path / f"layers{number}" / "baseline").exists()
    integers = "callbacks=[default,pruning,sharing,quantization,export]"
    assert main(["recipe=edge_tiny", integers, f"hydra.run.dir={tmp_path}/order"]) == 1
    assert "WeightSharing must end before QuantizationAwareTraining fixes what it changes" in capsys.readouterr().err
    assert not (tmp_path / "order" / "baseline").exists()
    alone = "teacher={model: {network: {width: 2.0}}}"
    assert main(["recipe=share_weights", alone, f"hydra.run.dir={tmp_path}/run3"]) == 1
    assert "teacher must stand beside a distillation" in capsys.readouterr().err
    late = [
        *options[:1],
        "distillation.losses.soft_targets.end_weight=0.5",
        "distillation.losses.soft_targets.end_epoch=90",
    ]
    assert main(["recipe=deep_compression", *late, f"hydra.run.dir={tmp_path}/run4"]) == 1
    assert "end_epoch must be below the 60 epochs of the fit (zero-based), got 90" in capsys.readouterr().err
    assert main(["recipe=deep_compression", "distillation=checkpoint", f"hydra.run.dir={tmp_path}/run5"]) == 1
    assert "teacher must be given to train a student, got None" in capsys.readouterr().err
