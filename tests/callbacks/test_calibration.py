import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lightning_edge import ExportArtifacts, QuantizationAwareTraining, load_artifact
from lightning_edge.callbacks import PostTrainingQuantization
from lightning_edge.surgery.quantization import CapturedNetwork, convert

HERE = Path(__file__).parent


def forward_of(task):
    return vars(task.model).get("forward")


def images_of(digits_loaders):
    return next(iter(digits_loaders()[1]))[0]


def test_the_network_is_int8_after_the_fit_and_so_is_the_file(fit, tmp_path, digits_loaders):
    export = ExportArtifacts(tmp_path / "out", formats=["onnx"])
    task, _ = fit(PostTrainingQuantization(batches=4), export, epochs=2)
    captured = forward_of(task)
    assert isinstance(captured, CapturedNetwork)
    assert captured.observers_frozen
    assert export.verifications["onnx"].agreement == 1.0
    images = images_of(digits_loaders)
    with torch.no_grad():
        expected = convert(task.model.eval())(images).numpy()
    assert (load_artifact(tmp_path / "out" / "model.onnx")(images.numpy()) == expected).all()
    assert "forward" not in task.model.state_dict()


def test_a_fit_of_no_epochs_quantizes_and_changes_no_weight(fit, task_class):
    torch.manual_seed(3)
    task = task_class()
    before = {name: value.clone() for name, value in task.state_dict().items()}
    fit(PostTrainingQuantization(batches=2), task=task, epochs=0)
    assert isinstance(forward_of(task), CapturedNetwork)
    assert all(torch.equal(value, before[name]) for name, value in task.state_dict().items())


def test_the_same_seed_draws_the_same_batches_whatever_came_before(fit, task_class):
    states = []
    for seed, draws in ((0, 0), (0, 5), (1, 0)):
        torch.manual_seed(3)
        task, callback = task_class(), PostTrainingQuantization(batches=1, seed=seed)
        fit(callback, task=task, epochs=0, seed=draws)
        states.append(callback.state_dict()["observers"])
    same = [[torch.equal(states[0][name], state[name]) for name in states[0]] for state in states]
    assert all(same[1])
    assert not all(same[2])


def test_options_are_used(fit, task_class):
    outputs, images = [], torch.rand(8, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    for options in ({}, {"keep": ["7"]}, {"equalize": True}, {"correct_bias": True}, {"observer": "minmax"}):
        torch.manual_seed(3)
        task = task_class()
        fit(PostTrainingQuantization(batches=2, **options), task=task, epochs=1)
        with torch.no_grad():
            outputs.append(task.eval()(images))
        names = {name.removesuffix(".weight") for name in forward_of(task).observers}
        assert ("7" in names) == ("keep" not in options)
    assert all(not torch.equal(outputs[0], other) for other in outputs[1:])
    assert all(float((outputs[0] - other).abs().max()) < float(outputs[0].std()) for other in outputs[1:])


def test_a_saved_state_is_taken_and_not_measured_again(fit, tmp_path, task_class):
    options = {"batches": 2, "equalize": True, "correct_bias": True}
    task, trainer = fit(PostTrainingQuantization(**options), epochs=0)
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)
    plain = task_class()
    plain.load_state_dict(saved["state_dict"])
    callback = PostTrainingQuantization(**options)
    again, _ = fit(callback, task=plain, epochs=0, ckpt_path=tmp_path / "last.ckpt", folder="again", seed=9)
    images = torch.rand(8, 1, 8, 8)
    with torch.no_grad():
        assert torch.equal(task.eval()(images), again.eval()(images))
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in task.state_dict().items())


@pytest.mark.parametrize("stage", ["test", "validate", "predict"])
def test_a_checkpoint_brings_the_ranges_back(fit, tmp_path, task_class, digits_loaders, stage):
    class Task(task_class):
        def test_step(self, batch, _):
            self(batch[0])

        def predict_step(self, batch, _):
            return self(batch[0])

    first = PostTrainingQuantization(batches=2)
    _, trainer = fit(first, task=Task(), epochs=0)
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    fresh = Task()
    trainer.callbacks[trainer.callbacks.index(first)] = PostTrainingQuantization()
    getattr(trainer, stage)(fresh, digits_loaders()[1], ckpt_path=tmp_path / "last.ckpt")
    assert isinstance(forward_of(fresh), CapturedNetwork)


def test_a_second_fit_of_the_same_module_goes_on(fit, tmp_path):
    task, trainer = fit(PostTrainingQuantization(batches=2), epochs=0)
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    again, _ = fit(PostTrainingQuantization(), task=task, epochs=0, ckpt_path=tmp_path / "last.ckpt", folder="again")
    assert forward_of(again) is forward_of(task)


def test_a_trial_run_quantizes_nothing(fit):
    task, _ = fit(PostTrainingQuantization(), fast_dev_run=True)
    assert forward_of(task) is None


def test_what_cannot_work_is_refused(fit, tmp_path):
    with pytest.raises(ValueError, match="batches must be a whole number, at least 1"):
        PostTrainingQuantization(batches=0)
    with pytest.raises(ValueError, match="observer must be one of"):
        PostTrainingQuantization(observer="best")
    with pytest.raises(ValueError, match="keep must match a linear or convolution layer, got 'fc9'"):
        fit(PostTrainingQuantization(keep=["fc9"]))
    with pytest.raises(ValueError, match="before ExportArtifacts, got the other order"):
        fit(ExportArtifacts(tmp_path / "out", formats=["onnx"]), PostTrainingQuantization())
    with pytest.raises(ValueError, match="callbacks must quantize a network once, got 2 PostTrainingQuantization"):
        fit(PostTrainingQuantization(), PostTrainingQuantization(network="model"))
    with pytest.raises(ValueError, match="callbacks must quantize once"):
        fit(PostTrainingQuantization(), QuantizationAwareTraining(1))
    with pytest.raises(ValueError, match="precision must keep weights in float32 for quantization, got '64-true'"):
        fit(PostTrainingQuantization(), precision="64-true")


WORKER = """
import hashlib, sys
from pathlib import Path
import torch
from conftest import DigitsTask, fit_digits
from lightning_edge.callbacks import PostTrainingQuantization

if __name__ == "__main__":
    torch.set_num_threads(1)
    callback = PostTrainingQuantization(batches=2, equalize=True, correct_bias=True)
    task, trainer = fit_digits(Path(sys.argv[1]), [callback], task=DigitsTask(), epochs=1, devices=2, strategy="ddp")
    tensors = [*callback.state_dict()["observers"].values(), *task.state_dict().values()]
    digest = hashlib.sha256(b"".join(value.contiguous().numpy().tobytes() for value in tensors)).hexdigest()
    (Path(sys.argv[1]) / f"rank{trainer.global_rank}.txt").write_text(digest)
"""


@pytest.mark.dist
def test_two_processes_hold_the_same_int8_network(tmp_path):
    (tmp_path / "worker.py").write_text(WORKER)
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST")}
    environment |= {"PYTHONPATH": os.pathsep.join([str(HERE), str(HERE.parents[1])]), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(tmp_path / "worker.py"), str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, done.stderr
    first, second = ((tmp_path / f"rank{rank}.txt").read_text() for rank in (0, 1))
    assert first == second
