"""A student that does all that a student may do by itself, its data, and one way to fit it."""

import lightning as L
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_edge import ExactResume


class Net(nn.Module):
    def __init__(self, width=8):
        super().__init__()
        self.conv = nn.Conv2d(1, width, 3, padding=1)
        self.norm = nn.BatchNorm2d(width)
        self.drop = nn.Dropout(0.2)
        self.fc = nn.Linear(width, 4)

    def forward(self, images):
        return self.fc(self.drop(torch.relu(self.norm(self.conv(images)))).mean((2, 3)))


class Task(L.LightningModule):
    """Logs, steps its learning rate, counts its hooks: all that a student may do by itself."""

    def __init__(self, network=None):
        super().__init__()
        self.net = network or Net()
        self.hooks = []

    def training_step(self, batch, batch_idx):
        self.hooks.append("training_step")
        loss = F.cross_entropy(self.net(batch[0]), batch[1])
        self.log("train/loss", loss)
        return {"loss": loss, "batch_idx": batch_idx}

    def validation_step(self, batch):
        self.log("val/loss", F.cross_entropy(self.net(batch[0]), batch[1]))

    def on_train_batch_end(self, outputs, batch, batch_idx):
        self.hooks.append(f"batch {outputs['batch_idx']}")

    def on_train_epoch_end(self):
        self.log("epoch", float(self.current_epoch))

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), 0.1, momentum=0.9)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1)]


def data(rows=48):
    draw = torch.Generator().manual_seed(0)
    return TensorDataset(torch.randn(rows, 1, 6, 6, generator=draw), torch.randint(0, 4, (rows,), generator=draw))


def loaders():
    return DataLoader(data(), 16, shuffle=True), DataLoader(data(), 16)


def network(seed=0, width=8):
    torch.manual_seed(seed)
    return Net(width)


def fit(module, folder, *callbacks, epochs=2, ckpt_path=None, loader=None, **options):
    L.seed_everything(1, verbose=False)
    settings = {
        "max_epochs": epochs,
        "accelerator": "cpu",
        "devices": 1,
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "limit_val_batches": None if loader is None else 0,  # a loader of the test's own is for training
    }
    keep = ModelCheckpoint(folder, filename="{epoch}", save_top_k=-1, enable_version_counter=False)
    trainer = L.Trainer(**settings | options, callbacks=[ExactResume(), *callbacks, keep])
    trainer.fit(module, *(loaders() if loader is None else [loader, loader]), ckpt_path=ckpt_path)
    return trainer
