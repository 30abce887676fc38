import copy

import pytest
import torch
from lightning import Callback, Trainer
from students import Net, Task, fit, loaders, network

from lightning_edge import DistillationModule, DistillationTerm, ExactResume
from lightning_edge.modules import MovingAverage
from lightning_edge.modules.teachers import Teachers
from lightning_edge.surgery.distillation import Call


@pytest.mark.parametrize("wrap", [lambda net: net, lambda net: lambda: net, Task, lambda net: torch.nn.Sequential(net)])
def test_the_student_itself_is_no_teacher(tmp_path, wrap):
    student = network()
    with pytest.raises(ValueError, match="teacher must have parameters of its own, got a .* copy.deepcopy"):
        fit(DistillationModule(Task(student), wrap(student)), tmp_path)
    assert all(parameter.requires_grad for parameter in student.parameters())
    fit(DistillationModule(Task(student), copy.deepcopy(student)), tmp_path, epochs=1)


def test_a_checkpoint_with_an_average_is_validated_loaded_and_trained_on(tmp_path):
    fit(DistillationModule(Task(network()), MovingAverage(0.8)), tmp_path)
    checkpoint = tmp_path / "epoch=1.ckpt"
    saved = torch.load(checkpoint, weights_only=True)["lightning_edge.moving_average_teachers"]
    module = DistillationModule(Task(network(3)), MovingAverage(0.8))
    trainer = Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, callbacks=[ExactResume()])
    trainer.validate(module, loaders()[1], ckpt_path=checkpoint, verbose=False)
    loaded = DistillationModule.load_from_checkpoint(
        checkpoint, student=Task(), teacher=MovingAverage(0.8), weights_only=True
    )
    fit(loaded, tmp_path / "on", limit_train_batches=0, limit_val_batches=0)
    averages = loaded.matching.teachers.averages()
    assert all(torch.equal(value, averages[name]) for name, value in saved.items())


def taught(precision, *, dtype=torch.float32):
    teachers = Teachers([network(1, 16).eval()], precision=precision)
    teachers.build(network())
    images = torch.randn(4, 1, 6, 6, generator=torch.Generator().manual_seed(0)).to(dtype)
    return teachers(0, Call((images,), {}), ["conv"], device=torch.device("cpu"))


def test_a_teacher_in_bf16_gives_float32():
    whole, half = taught(None), taught("bf16")
    assert half.output.dtype == half.features["conv"].dtype == torch.float32
    assert torch.equal(half.features["conv"], half.features["conv"].bfloat16().float())
    assert not torch.equal(half.output, whole.output)
    torch.testing.assert_close(half.output, whole.output, atol=0.05, rtol=0.05)


def test_a_teacher_in_float32_is_so_under_the_student_s_autocast():
    whole = taught(None)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert not torch.equal(taught(None).output, whole.output)
        assert torch.equal(taught("32").output, whole.output)


def test_a_teacher_is_given_numbers_of_its_own_kind():
    assert taught(None, dtype=torch.bfloat16).output.dtype == torch.float32


@pytest.mark.parametrize("teacher", ["32", "bf16", None])
@pytest.mark.parametrize("student", ["32-true", "bf16-mixed", "bf16-true", "64-true"])
def test_the_precisions_of_student_and_teacher_combine(tmp_path, student, teacher):
    terms = {
        "soft": DistillationTerm(),
        "hint": DistillationTerm("hint", layers={"conv": "conv"}),
        "view": DistillationTerm("contrastive", layers={"norm": "norm"}),
    }
    module = DistillationModule(Task(network()), network(1, 16), terms, teacher_precision=teacher)
    trainer = fit(module, tmp_path, precision=student, limit_train_batches=1)
    assert all(torch.isfinite(trainer.callback_metrics[f"distillation/{name}"]) for name in terms)
    Net().load_state_dict(module.student_state_dict())


def test_bad_arguments_fail_at_construction():
    with pytest.raises(ValueError, match=r"teacher_precision must be one of \('32', 'bf16'\) or None, got 'fp8'"):
        DistillationModule(Task(), network(), teacher_precision="fp8")
    with pytest.raises(ValueError, match="cache must be None with a MovingAverage"):
        DistillationModule(Task(), MovingAverage(), cache="folder")


def average_of(module):
    return {name.removeprefix("0."): value for name, value in module.matching.teachers.averages().items()}


@pytest.mark.parametrize("precision", ["bf16-true", "64-true"])
def test_an_average_follows_a_student_of_any_precision(tmp_path, precision):
    module = DistillationModule(Task(network()), MovingAverage(0.5))
    fit(module, tmp_path, precision=precision, epochs=1)
    assert not torch.equal(average_of(module)["conv.weight"].float(), network().conv.weight)


def test_tied_weights_move_once():
    student = torch.nn.Sequential(torch.nn.Linear(2, 2, bias=False), torch.nn.Linear(2, 2, bias=False))
    student[1].weight = student[0].weight
    teachers = Teachers([MovingAverage(0.9)])
    teachers.build(student)
    with torch.no_grad():
        before = student[0].weight.clone()
        student[0].weight += 1
    teachers.follow(student)
    torch.testing.assert_close(teachers.networks[0][0].weight, before + 0.1)


class Begins(Callback):
    """Looks at the average before the first step."""

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if batch_idx == 0:
            self.average = average_of(pl_module)["conv.weight"]


def test_an_average_begins_with_the_weights_that_a_fit_begins_with(tmp_path):
    fit(DistillationModule(Task(network()), network(1)), tmp_path / "other", epochs=1)  # no average in its checkpoint
    weights = torch.load(tmp_path / "other" / "epoch=0.ckpt", weights_only=True)["state_dict"]
    module, seen = DistillationModule(Task(network(5)), MovingAverage(0.5)), Begins()
    fit(module, tmp_path / "on", seen, ckpt_path=tmp_path / "other" / "epoch=0.ckpt", epochs=2)
    assert torch.equal(seen.average, weights["student.net.conv.weight"])
    module.student.net.load_state_dict(network(7).state_dict())
    fit(module, tmp_path / "again", seen, epochs=1)
    assert torch.equal(seen.average, network(7).conv.weight)


def test_a_copy_s_fit_leaves_the_average_alone(tmp_path):
    module = DistillationModule(Task(network()), MovingAverage(0.5))
    fit(module, tmp_path / "first", epochs=1)
    before = average_of(module)
    fit(copy.deepcopy(module), tmp_path / "second", epochs=1)
    assert all(torch.equal(value, average_of(module)[name]) for name, value in before.items())


def test_a_teacher_stays_in_evaluation_mode_in_all_its_parts(tmp_path):
    teacher = network(1)
    teacher.norm.train()
    fit(DistillationModule(Task(network()), teacher), tmp_path, epochs=1)
    assert not teacher.norm.training
    assert torch.equal(teacher.norm.running_mean, network(1).norm.running_mean)


def test_a_teacher_that_is_built_late_is_built(tmp_path):
    class Late(Task):
        def __init__(self):
            super().__init__()
            del self.net

        def configure_model(self):
            self.net = network(1)

    module = DistillationModule(Task(network()), Late())
    fit(module, tmp_path, epochs=1)
    assert torch.equal(module.matching.teachers.networks[0].conv.weight, network(1).conv.weight)


def test_what_is_no_teacher_is_refused():
    with pytest.raises(ValueError, match="teacher must be a network, a callable .* got 5"):
        DistillationModule(Task(), 5)
