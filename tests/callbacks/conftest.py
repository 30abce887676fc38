"""A small task on real digits, and one way to fit it."""

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import ModelCheckpoint
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_edge import ExactResume

collect_ignore = ["ddp_worker.py"]  # a script that test_ddp.py runs


class DigitsTask(L.LightningModule):
    """Batch norm, dropout and momentum: all that a resume has to get right."""

    def __init__(self):
        super().__init__()
        self.model = nn.Sequential(
            nn.Conv2d(1, 8, 3, padding=1, bias=False),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.Conv2d(8, 16, 3, stride=2),
            nn.ReLU(),
            nn.Flatten(),
            nn.Dropout(0.3),
            nn.Linear(144, 10),
        )

    def forward(self, x):
        return self.model(x)

    def training_step(self, batch, _):
        return F.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch, _):
        self.log("val/loss", F.cross_entropy(self(batch[0]), batch[1]), sync_dist=True)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.05, momentum=0.9, weight_decay=1e-3)


def digits(count=256, validation=64):
    """Return a shuffling train loader and a validation loader of real digits."""
    images, labels = load_digits(return_X_y=True)
    x = torch.tensor(images, dtype=torch.float32).view(-1, 1, 8, 8) / 16
    y = torch.tensor(labels)
    train = TensorDataset(x[:count], y[:count])
    return DataLoader(train, 32, shuffle=True), DataLoader(TensorDataset(x[-validation:], y[-validation:]), 64)


class EndsAfter(L.Callback):
    """Ends a fit early, as ``EarlyStopping`` does: nothing says so before."""

    def __init__(self, steps):
        self.steps = steps

    def on_train_batch_end(self, trainer, *_):
        trainer.should_stop = trainer.global_step >= self.steps


def fit_digits(folder, callbacks, *, task=None, loaders=None, ckpt_path=None, seed=1, epochs=4, ends=None, **options):
    """Fit the task and return it with its trainer; every epoch leaves ``folder/epoch=N.ckpt``."""
    L.seed_everything(seed, verbose=False)
    callbacks = [*callbacks, *([] if ends is None else [EndsAfter(ends)])]
    task = task or DigitsTask()
    checkpoints = ModelCheckpoint(folder, filename="{epoch}", save_top_k=-1, enable_version_counter=False)
    settings = {
        "max_epochs": epochs,
        "accelerator": "cpu",
        "devices": 1,
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    trainer = L.Trainer(**settings | options, callbacks=[*callbacks, checkpoints])
    trainer.fit(task, *(loaders or digits()), ckpt_path=ckpt_path)
    return task, trainer


@pytest.fixture
def fit(tmp_path):
    """Fit with ``ExactResume`` and the callbacks given; checkpoints go to ``tmp_path / folder``."""

    def run(*callbacks, folder="fit", exact=True, **options):
        return fit_digits(tmp_path / folder, [*([ExactResume()] if exact else []), *callbacks], **options)

    return run


@pytest.fixture
def task_class():
    return DigitsTask


@pytest.fixture
def digits_loaders():
    return digits
