import random

import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from torch.utils.data import DataLoader, Dataset

from lightning_edge import ExactResume, WeightPruning


class Noisy(Dataset):
    """Random augmentation from all three global generators."""

    def __len__(self):
        return 32

    def __getitem__(self, index):
        noise = torch.rand(()) + random.random() + np.random.rand()
        return torch.full((1, 8, 8), float(index)) + noise, index % 10


class Batches(Callback):
    def __init__(self):
        self.sums = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.sums.append((trainer.current_epoch, batch[1].tolist(), float(batch[0].double().sum())))


def loaders(workers=0, **options):
    train = DataLoader(Noisy(), 8, shuffle=True, num_workers=workers, **options)
    return train, DataLoader(Noisy(), 16)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_resumed_run_sees_the_same_batches(fit, tmp_path, workers):
    whole, resumed = Batches(), Batches()
    fit(whole, loaders=loaders(workers), epochs=3)
    fit(resumed, loaders=loaders(workers), epochs=3, ckpt_path=tmp_path / "fit" / "epoch=0.ckpt", folder="resumed")
    assert resumed.sums == [row for row in whole.sums if row[0] >= 1]


def test_without_it_the_batches_differ(fit, tmp_path):
    whole, resumed = Batches(), Batches()
    fit(whole, loaders=loaders(), epochs=3, exact=False)
    checkpoint = tmp_path / "fit" / "epoch=0.ckpt"
    fit(resumed, loaders=loaders(), epochs=3, ckpt_path=checkpoint, folder="resumed", exact=False)
    assert resumed.sums != [row for row in whole.sums if row[0] >= 1]


def test_a_run_resumed_without_it_is_told_so(fit, tmp_path):
    fit(WeightPruning(0.5), epochs=2, exact=False)
    with pytest.warns(UserWarning, match="resumed without ExactResume"):
        fit(WeightPruning(0.5), epochs=2, exact=False, ckpt_path=tmp_path / "fit" / "epoch=0.ckpt", folder="resumed")


def test_states_survive_a_checkpoint_that_loads_with_weights_only(tmp_path):
    L.seed_everything(3, verbose=False)
    np.random.standard_normal()  # leaves a cached second normal number behind
    state = ExactResume().state_dict()
    expected = random.random(), np.random.standard_normal(), float(torch.rand(()))
    torch.save(state, tmp_path / "state.pt")
    L.seed_everything(4, verbose=False)
    callback = ExactResume()
    callback.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    callback.on_fit_start(L.Trainer(logger=False, accelerator="cpu", enable_checkpointing=False), L.LightningModule())
    assert (random.random(), np.random.standard_normal(), float(torch.rand(()))) == expected


def test_another_number_of_processes_is_refused(fit, tmp_path):
    fit(epochs=1)
    saved = torch.load(tmp_path / "fit" / "epoch=0.ckpt", weights_only=True)
    state = saved["callbacks"]["ExactResume"]
    state["ranks"] = state["ranks"] * 2
    torch.save(saved, tmp_path / "two.ckpt")
    with pytest.raises(ValueError, match="devices must equal that of the checkpoint.*got 1 processes.*states of 2"):
        fit(epochs=2, ckpt_path=tmp_path / "two.ckpt", folder="resumed")


def test_loaders_whose_randomness_is_out_of_reach_are_named(fit, tmp_path):
    fit(loaders=loaders(), epochs=2)
    with pytest.warns(UserWarning, match="generator of its own"):
        fit(
            loaders=loaders(generator=torch.Generator()),
            epochs=2,
            ckpt_path=tmp_path / "fit" / "epoch=0.ckpt",
            folder="resumed",
        )


def test_a_scheduler_that_loses_a_step_is_named(fit, tmp_path, task_class):
    class Plateau(task_class):
        def configure_optimizers(self):
            optimizer = super().configure_optimizers()
            scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "monitor": "val/loss"}}

    fit(task=Plateau(), epochs=2)
    with pytest.warns(UserWarning, match="ReduceLROnPlateau loses a step"):
        fit(task=Plateau(), epochs=2, ckpt_path=tmp_path / "fit" / "epoch=0.ckpt", folder="resumed")
