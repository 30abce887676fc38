import copy
from functools import partial

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import EMAWeightAveraging
from lightning.pytorch.tuner import Tuner
from students import Net, Task, data, fit, loaders, network
from torch import nn
from torch.utils.data import DataLoader

from lightning_edge import ChannelPruning, DistillationModule, DistillationTerm
from lightning_edge.functional.distillation import hint_loss, soft_target_loss
from lightning_edge.modules import ClassificationModule, MovingAverage, pretrained
from lightning_edge.modules.teachers import Teachers
from lightning_edge.surgery.selection import find_network, network_path

LAYERS = {
    "soft": DistillationTerm("soft_targets", weight=0.5, temperature=2.0),
    "hint": DistillationTerm("hint", layers={"conv": "conv"}),
    "contrast": DistillationTerm("contrastive", layers={"norm": "norm"}),
    "label": DistillationTerm("decoupled"),
}


def test_a_student_keeps_its_own_steps_logs_optimizer_and_hooks(tmp_path):
    task = Task(network())
    trainer = fit(DistillationModule(task, network(1)), tmp_path)
    assert {"train/loss", "val/loss", "epoch", "distillation/soft_targets", "distillation/task"} <= set(
        trainer.callback_metrics
    )
    assert task.hooks == ["training_step", "batch 0", "training_step", "batch 1", "training_step", "batch 2"] * 2
    assert trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(0.001)


def test_the_loss_is_the_weighted_sum_of_the_task_and_the_terms(tmp_path):
    student, teacher, (inputs, labels) = network(), network(1, 16), data().tensors
    student.drop.p = 0.0
    module = DistillationModule(
        ClassificationModule(student, num_classes=4),
        teacher,
        {
            "soft": DistillationTerm(weight=0.7, temperature=3.0),
            "hint": DistillationTerm("hint", weight=2.0, layers={"norm": "norm"}),
        },
        task_weight=0.2,
    )
    trainer = fit(module, tmp_path, limit_train_batches=0)
    module.trainer = trainer
    module.log_dict = lambda *_, **__: None
    module.student.log = lambda *_, **__: None
    module.train()
    loss = module.training_step((inputs, labels), 0)
    student.train()
    logits, features = student(inputs), student.norm(student.conv(inputs))
    teacher.eval()
    expected = (
        0.2 * F.cross_entropy(logits, labels)
        + 0.7 * soft_target_loss(logits, teacher(inputs), temperature=3.0)
        + 2.0
        * hint_loss(
            module.matching.adapters["hint_0_0_student"].projection(features), teacher.norm(teacher.conv(inputs))
        )
    )
    assert loss.item() == pytest.approx(expected.item(), rel=1e-4)


def test_the_teacher_is_frozen_in_evaluation_mode_and_nowhere_to_be_found(tmp_path):
    teacher = ClassificationModule(network(1, 16))
    before = copy.deepcopy(teacher.network.state_dict())
    module = DistillationModule(Task(network()), teacher, LAYERS)
    trainer = fit(module.train(), tmp_path)
    module.train()
    assert not teacher.network.training
    assert all(torch.equal(before[name], value) for name, value in teacher.network.state_dict().items())
    owned = {id(parameter) for parameter in module.parameters()}
    stepped = {id(p) for group in trainer.optimizers[0].param_groups for p in group["params"]}
    theirs = {id(parameter) for parameter in teacher.parameters()}
    assert not theirs & (owned | stepped)
    assert stepped == owned  # the adapters are stepped with the student
    state = torch.load(tmp_path / "epoch=1.ckpt", weights_only=True)["state_dict"]
    assert {name.split(".")[0] for name in state} == {"student", "matching"}
    assert all("adapters" in name for name in state if name.startswith("matching"))


def test_the_student_s_state_is_plain_and_strict(tmp_path):
    module = DistillationModule(Task(network()), network(1, 16), LAYERS)
    fit(module, tmp_path)
    Net().load_state_dict(module.student_state_dict(), strict=True)


def test_adapters_are_trained(tmp_path):
    module = DistillationModule(Task(network()), network(1, 16), LAYERS)
    module_of_an_epoch = copy.deepcopy(module)
    fit(module, tmp_path / "two")
    fit(module_of_an_epoch, tmp_path / "one", epochs=1)
    trained, earlier = (m.matching.adapters.state_dict() for m in (module, module_of_an_epoch))
    assert len(trained) == 6  # a convolution, and two projections, each with a bias
    assert all(not torch.equal(value, earlier[name]) for name, value in trained.items())


def test_a_checkpoint_loads_without_the_teacher(tmp_path):
    module = DistillationModule(Task(network()), network(1, 16), LAYERS)
    trainer = fit(module, tmp_path)
    loaded = DistillationModule.load_from_checkpoint(tmp_path / "epoch=1.ckpt", student=Task(), weights_only=True)
    inputs = data().tensors[0]
    assert torch.equal(loaded.eval().student.net(inputs), module.eval().student.net(inputs))
    results = trainer.validate(
        DistillationModule(Task()), loaders()[1], ckpt_path=tmp_path / "epoch=1.ckpt", verbose=False
    )
    assert results[0]["val/loss"] == pytest.approx(float(trainer.callback_metrics["val/loss"]))
    with pytest.raises(ValueError, match="teacher must be given to train a student, got None"):
        fit(loaded, tmp_path / "none")


@pytest.mark.parametrize("make", [lambda: network(1, 16), lambda: MovingAverage(0.8)])
def test_resumed_equals_uninterrupted(tmp_path, make):
    terms = LAYERS | {"late": DistillationTerm("squared", weight=0.0, end_weight=1.0)}
    whole = DistillationModule(Task(network()), make(), terms)
    fit(whole, tmp_path / "whole", epochs=3)
    resumed = DistillationModule(Task(network(5)), make(), terms)
    fit(resumed, tmp_path / "resumed", epochs=3, ckpt_path=tmp_path / "whole" / "epoch=0.ckpt")
    assert whole.state_dict().keys() == resumed.state_dict().keys()
    assert all(torch.equal(value, resumed.state_dict()[name]) for name, value in whole.state_dict().items())
    averages, others = whole.matching.teachers.averages(), resumed.matching.teachers.averages()
    assert all(torch.equal(value, others[name]) for name, value in averages.items())


def test_a_moving_average_follows_the_student(tmp_path):
    module = DistillationModule(Task(network()), MovingAverage(0.0))
    fit(module, tmp_path, epochs=1)
    for name, value in module.matching.teachers.averages().items():
        torch.testing.assert_close(value, module.student_state_dict()[name.removeprefix("0.")], msg=name)
    assert not network(0).load_state_dict(module.student_state_dict()).missing_keys


@pytest.mark.parametrize("epoch", [0, 1])
def test_a_moving_average_gets_narrow_with_the_student_and_resumes(tmp_path, epoch):
    def narrowing():
        return ChannelPruning(sparsity=0.5, end_epoch=1, remove_epoch=1, round_to=2, protect_ends=False)

    def module():
        torch.manual_seed(0)
        net = nn.Sequential(Net(), nn.ReLU(), nn.Linear(4, 4))
        return DistillationModule(Task(net), MovingAverage(0.8))

    whole, resumed = module(), module()
    fit(whole, tmp_path / "whole", narrowing(), epochs=3)
    fit(resumed, tmp_path / "resumed", narrowing(), epochs=3, ckpt_path=tmp_path / "whole" / f"epoch={epoch}.ckpt")
    averages, others = (each.matching.teachers.averages() for each in (whole, resumed))
    assert averages["0.0.conv.weight"].shape[0] == 4
    assert all(torch.equal(value, others[name]) for name, value in averages.items())


def test_a_path_is_a_teacher_of_the_student_s_own_architecture(tmp_path):
    dense = ClassificationModule(network(3))
    torch.save({"state_dict": dense.state_dict()}, tmp_path / "dense.ckpt")
    module = DistillationModule(Task(network()), tmp_path / "dense.ckpt")
    fit(module, tmp_path, epochs=1)
    taught = module.matching.teachers.networks[0]
    assert torch.equal(taught.conv.weight, dense.network.conv.weight)
    assert torch.equal(pretrained(Net(), tmp_path / "dense.ckpt").conv.weight, dense.network.conv.weight)
    with pytest.raises(FileNotFoundError, match="checkpoint must be a file"):
        fit(DistillationModule(Task(), str(tmp_path / "none.ckpt")), tmp_path)


def test_several_teachers_count_by_their_shares(tmp_path):
    first, second = network(1), network(2)
    values = {}
    for name, teacher, weights in (("1", first, None), ("2", second, None), ("both", [first, lambda: second], [3, 1])):
        module = DistillationModule(Task(network()), teacher, teacher_weights=weights)
        trainer = fit(module, tmp_path / name, limit_train_batches=1, epochs=1)
        values[name] = float(trainer.callback_metrics["distillation/soft_targets"])
    assert values["both"] == pytest.approx(0.75 * values["1"] + 0.25 * values["2"], rel=1e-4)


@pytest.mark.filterwarnings("ignore:You're using the WeightAveraging callback with a model that overrides")
def test_an_averaged_student_has_no_teacher_and_keeps_its_adapters(tmp_path):
    module = DistillationModule(Task(network()), network(1, 16), LAYERS)
    averaging = EMAWeightAveraging(decay=0.5)
    fit(module, tmp_path, averaging)
    assert len(module.matching.adapters) == 3
    assert module.matching.teachers.networks[0].conv.weight.shape[0] == 16


def test_a_deep_copy_runs_its_own_hooks_and_shares_the_teacher():
    module = DistillationModule(Task(network()), network(1))
    twin = copy.deepcopy(module)
    for one in (module, twin):
        one.matching.build(one.student.net)
    assert twin.matching.teachers.networks[0] is module.matching.teachers.networks[0]
    twin.on_train_batch_end({"batch_idx": 7}, None, 0)
    assert twin.student.hooks == ["batch 7"]
    assert module.student.hooks == []


def test_callbacks_find_the_network_of_the_student():
    module = DistillationModule(Task(network()), network(1, 16))
    assert network_path(module) == "student.net"
    assert find_network(module) is module.student.net
    assert network_path(DistillationModule(network(), network(1), num_classes=4)) == "student.network"


def test_two_calls_of_the_network_in_a_step_are_averaged(tmp_path):
    class Twice(Task):
        def training_step(self, batch):
            views = self.net(batch[0]), self.net(-batch[0])
            loss = sum(F.cross_entropy(view, batch[1]) for view in views)
            return {"loss": loss, "batch_idx": 0}

    student = network()
    student.drop.p = 0.0
    module = DistillationModule(Twice(student), network(1))
    trainer = fit(module, tmp_path, limit_train_batches=1, epochs=1, max_steps=1)
    assert torch.isfinite(trainer.callback_metrics["distillation/soft_targets"])


def test_tokens_are_matched_through_an_output_adapter(tmp_path):
    class Tagger(L.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = nn.Sequential(nn.Embedding(11, 8), nn.Linear(8, 5))
            self.example_input_array = torch.zeros(2, 7, dtype=torch.long)

        def training_step(self, batch):
            return F.cross_entropy(self.net(batch["tokens"]).flatten(0, 1), batch["tags"].flatten())

        def configure_optimizers(self):
            return torch.optim.Adam(self.parameters())

    rows = [{"tokens": torch.arange(7), "tags": torch.arange(7) % 5}] * 8
    module = DistillationModule(
        Tagger(),
        Tagger(),
        {"soft": DistillationTerm(), "hidden": DistillationTerm("hint", layers={"0": "0"})},
        output_adapter=partial(torch.flatten, start_dim=0, end_dim=1),
    )
    trainer = L.Trainer(
        max_epochs=1,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, DataLoader(rows, 4))
    assert float(trainer.callback_metrics["distillation/hidden"]) > 0


def test_what_cannot_work_is_refused(tmp_path):
    class Manual(Task):
        def __init__(self):
            super().__init__()
            self.automatic_optimization = False

    class Silent(Task):
        def training_step(self, batch, batch_idx):
            return self.net.forward(batch[0]).mean()

    with pytest.raises(ValueError, match="student must use automatic optimization, got Manual"):
        DistillationModule(Manual(), network())
    with pytest.raises(ValueError, match="training_step of Silent must call its network, a Net"):
        fit(DistillationModule(Silent(), network()), tmp_path)
    with pytest.raises(ValueError, match="task_weight must be >= 0, got -1"):
        DistillationModule(Task(), network(), task_weight=-1)
    with pytest.raises(ValueError, match="losses must hold at least one term"):
        DistillationModule(Task(), network(), {})
    with pytest.raises(ValueError, match="layers must name layers of the teacher, got 'conf'.*'conv'"):
        fit(DistillationModule(Task(), network(), {"a": DistillationTerm("hint", layers={"conv": "conf"})}), tmp_path)
    late = {"soft": DistillationTerm(end_weight=0.0, end_epoch=5)}
    with pytest.raises(ValueError, match="end_epoch must be below the 2 epochs of the fit \\(zero-based\\), got 5"):
        fit(DistillationModule(Task(), network(), late), tmp_path)
    with pytest.raises(ValueError, match="teacher must be at least one network"):
        DistillationModule(Task(), [])
    with pytest.raises(ValueError, match="teacher_weights must be 2 numbers"):
        Teachers([network(), network()], [1.0])
    with pytest.raises(ValueError, match="decay must lie in"):
        MovingAverage(1.0)


class Configured(Task):
    def __init__(self, width=8):
        super().__init__(network(0, width))
        self.save_hyperparameters()


def test_hyperparameters_and_strictness_are_the_student_s(tmp_path):
    module = DistillationModule(Configured(width=6), network(1))
    assert dict(module.hparams) == {"width": 6}
    fit(module, tmp_path, epochs=1)
    assert torch.load(tmp_path / "epoch=0.ckpt", weights_only=False)["hyper_parameters"] == {"width": 6}
    assert module.strict_loading
    module.student.strict_loading = False
    assert not module.strict_loading


def test_the_learning_rate_that_a_tuner_finds_is_the_student_s(tmp_path, monkeypatch):
    class Tuned(Task):
        def __init__(self, lr=1e-3):
            super().__init__()
            self.save_hyperparameters()

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), self.hparams.lr)

    monkeypatch.chdir(tmp_path)
    module = DistillationModule(Tuned(), network(1))
    trainer = L.Trainer(
        max_epochs=20, accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False
    )
    found = Tuner(trainer).lr_find(module, *loaders(), num_training=30, early_stop_threshold=None)
    assert module.student.hparams.lr == module.hparams.lr == found.suggestion() != 1e-3


class MeasuresToo(Task):
    def training_step(self, batch, batch_idx):
        result = super().training_step(batch, batch_idx)
        with torch.no_grad():
            self.net(batch[0] + 1.0)
        return result


def test_a_call_without_gradients_does_not_count(tmp_path):
    values = []
    for task in (Task, MeasuresToo):
        student = network()
        student.drop.p = 0.0
        module = DistillationModule(task(student), network(1), {"out": DistillationTerm("squared")})
        student.norm.momentum = 0.0
        values.append(fit(module, tmp_path, epochs=1).callback_metrics["distillation/out"])
    assert torch.equal(*values)


def test_an_optimizer_of_named_parameters_knows_the_adapters(tmp_path):
    class Named(Task):
        def configure_optimizers(self):
            return torch.optim.SGD(self.named_parameters(), 0.1)

    module = DistillationModule(Named(network()), network(1, 16), LAYERS)
    (group,) = fit(module, tmp_path, epochs=1).optimizers[0].param_groups
    assert len(group["param_names"]) == len(group["params"])
    assert sum(name.startswith("matching.") for name in group["param_names"]) == len(list(module.matching.parameters()))


def test_images_of_several_sizes_are_adapted(tmp_path):
    class Sizes(torch.utils.data.IterableDataset):
        def __iter__(self):
            for size in (6, 8, 10):
                yield torch.randn(4, 1, size, size), torch.randint(0, 4, (4,))

    teacher = network(1, 16)
    teacher.conv.stride = (2, 2)
    terms = {"hint": DistillationTerm("hint", layers={"conv": "conv"})}
    trainer = fit(
        DistillationModule(Task(network()), teacher, terms), tmp_path, loader=DataLoader(Sizes(), batch_size=None)
    )
    assert torch.isfinite(trainer.callback_metrics["distillation/hint"])
