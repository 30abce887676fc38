import math
from functools import partial

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.optim.lr_scheduler import StepLR
from torch.utils.data import DataLoader, TensorDataset

from lightning_edge.modules import ClassificationModule


@pytest.fixture
def loader():
    draw = torch.Generator().manual_seed(0)
    images, labels = torch.randn(50, 6, generator=draw), torch.randint(0, 4, (50,), generator=draw)
    return DataLoader(TensorDataset(images, labels), 16)


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4))


def trainer(folder, **options):
    settings = {
        "max_epochs": 2,
        "accelerator": "cpu",
        "devices": 1,
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "default_root_dir": folder,
    }
    return L.Trainer(**settings | options)


def test_errors_and_losses_are_those_of_the_whole_set(loader, tmp_path):
    task = ClassificationModule(network(), num_classes=4)
    run = trainer(tmp_path)
    run.fit(task, loader, loader)
    images, labels = loader.dataset.tensors
    with torch.no_grad():
        logits = task(images)
    wrong = int((logits.argmax(1) != labels).sum())
    assert 0 < wrong < 50
    metrics = {name: float(value) for name, value in run.callback_metrics.items()}
    assert metrics["val/error"] == pytest.approx(wrong / 50, abs=1e-6)
    assert metrics["val/loss"] == pytest.approx(float(F.cross_entropy(logits, labels)), rel=1e-5)
    assert math.isfinite(metrics["train/loss"])
    run.test(task, loader, verbose=False)
    assert float(run.callback_metrics["test/error"]) == pytest.approx(wrong / 50, abs=1e-6)


def test_a_checkpoint_holds_the_network_alone_and_loads_with_weights_only(loader, tmp_path):
    task = ClassificationModule(
        network(), num_classes=4, optimizer=partial(torch.optim.Adam, lr=1e-3), scheduler=partial(StepLR, step_size=1)
    )
    run = trainer(tmp_path)
    run.fit(task, loader, loader)
    run.save_checkpoint(tmp_path / "a.ckpt")
    state = torch.load(tmp_path / "a.ckpt", weights_only=True)
    assert set(state["state_dict"]) == {f"network.{key}" for key in network().state_dict()}
    again = ClassificationModule.load_from_checkpoint(tmp_path / "a.ckpt", network=network(), num_classes=4)
    assert torch.equal(again.network[0].weight, task.network[0].weight)


def test_the_default_optimizer_is_sgd_and_leaves_frozen_parameters_out():
    task = ClassificationModule(network())
    task.network[0].requires_grad_(False)
    optimizer = task.configure_optimizers()
    assert optimizer.param_groups[0]["params"] == list(task.network[2].parameters())
    assert {key: optimizer.defaults[key] for key in ("lr", "momentum", "weight_decay")} == {
        "lr": 0.05,
        "momentum": 0.9,
        "weight_decay": 1e-4,
    }


@pytest.mark.parametrize(("interval", "steps"), [("epoch", 2), ("step", 8)])
def test_the_scheduler_steps_at_its_interval(loader, tmp_path, interval, steps):
    task = ClassificationModule(
        network(),
        num_classes=4,
        optimizer=partial(torch.optim.SGD, lr=1.0),
        scheduler=partial(StepLR, step_size=1, gamma=0.5),
        scheduler_interval=interval,
    )
    run = trainer(tmp_path, enable_checkpointing=False)
    run.fit(task, loader, loader)
    assert run.optimizers[0].param_groups[0]["lr"] == 0.5**steps


def test_smoothing_is_for_training_alone(loader):
    task = ClassificationModule(network(), num_classes=4, label_smoothing=0.3)
    logged = {}
    task.log = lambda name, value, **_: logged.update({name: value})
    batch = next(iter(loader))
    logits = task(batch[0])
    torch.testing.assert_close(task.training_step(batch, 0), F.cross_entropy(logits, batch[1], label_smoothing=0.3))
    task.validation_step(batch, 0)
    torch.testing.assert_close(logged["val/loss"], F.cross_entropy(logits, batch[1]))


@pytest.mark.parametrize("options", [{"scheduler_interval": "epochs"}, {"label_smoothing": 1.1}])
def test_a_bad_option_is_refused(options):
    with pytest.raises(ValueError, match=f"{next(iter(options))} must"):
        ClassificationModule(network(), **options)
