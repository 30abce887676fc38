"""A LightningModule that trains a classifier."""

from collections.abc import Callable, Iterable
from typing import Any, Literal

import lightning as L
import torch.nn.functional as F
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.optim import SGD, Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torchmetrics.classification import MulticlassHammingDistance

from lightning_edge.surgery.widths import load_widths_

Batch = tuple[Tensor, Tensor]


class ClassificationModule(L.LightningModule):
    """Train ``network`` with cross entropy; log ``train/loss``, ``val/loss``, ``val/error`` and ``test/error``.

    An error is the fraction of wrong images, in [0, 1]. Nothing but the network is in ``state_dict()``, and no
    hyper-parameter is saved: a checkpoint loads with ``weights_only=True``.

    Args:
        network: Maps inputs (batch, ...) to logits (batch, num_classes).
        optimizer: Called with the parameters, in Hydra a ``_partial_`` node. Default: SGD with learning rate 0.05,
            momentum 0.9 and weight decay 1e-4.
        scheduler: Called with the optimizer. Default: the learning rate is constant.
        scheduler_interval: Whether the scheduler steps after every ``"epoch"`` or every optimizer ``"step"``.
        num_classes: How many classes there are.
        label_smoothing: Of the training loss, in [0, 1]; the validation loss has none.

    Raises:
        ValueError: If an argument is out of its range.

    >>> import torch
    >>> ClassificationModule(nn.Linear(4, 10))(torch.zeros(2, 4)).shape
    torch.Size([2, 10])
    """

    def __init__(
        self,
        network: nn.Module,
        *,
        optimizer: Callable[[Iterable[nn.Parameter]], Optimizer] | None = None,
        scheduler: Callable[[Optimizer], LRScheduler] | None = None,
        scheduler_interval: Literal["epoch", "step"] = "epoch",
        num_classes: int = 10,
        label_smoothing: float = 0.0,
    ) -> None:
        super().__init__()
        if scheduler_interval not in ("epoch", "step"):
            raise ValueError(f"scheduler_interval must be 'epoch' or 'step', got {scheduler_interval!r}")
        if not 0.0 <= label_smoothing <= 1.0:
            raise ValueError(f"label_smoothing must lie in [0, 1], got {label_smoothing}")
        self.network = network
        self.optimizer = optimizer
        self.scheduler = scheduler
        self.scheduler_interval = scheduler_interval
        self.label_smoothing = label_smoothing
        # Micro-averaged, the Hamming distance is 1 - accuracy.
        self.val_error = MulticlassHammingDistance(num_classes, average="micro")
        self.test_error = MulticlassHammingDistance(num_classes, average="micro")

    def forward(self, inputs: Tensor) -> Tensor:
        """Return the logits, shape (batch, num_classes)."""
        logits: Tensor = self.network(inputs)
        return logits

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Give the network the widths of a checkpoint whose channels were removed, before its weights are loaded."""
        load_widths_(self.network, checkpoint)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Return the smoothed cross entropy of the batch, in nats."""
        inputs, labels = batch
        loss = F.cross_entropy(self(inputs), labels, label_smoothing=self.label_smoothing)
        self.log("train/loss", loss, on_step=False, on_epoch=True, sync_dist=True, batch_size=len(labels))
        return loss

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Count the wrong images of the batch."""
        inputs, labels = batch
        logits = self(inputs)
        self.val_error.update(logits, labels)
        self.log("val/loss", F.cross_entropy(logits, labels), sync_dist=True, batch_size=len(labels))
        self.log("val/error", self.val_error, prog_bar=True, batch_size=len(labels))

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        """Count the wrong images of the batch."""
        inputs, labels = batch
        self.test_error.update(self(inputs), labels)
        self.log("test/error", self.test_error, batch_size=len(labels))

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Return the optimizer over the trainable parameters of the network, and the scheduler if there is one."""
        parameters = [parameter for parameter in self.network.parameters() if parameter.requires_grad]
        optimizer = (
            SGD(parameters, lr=0.05, momentum=0.9, weight_decay=1e-4)
            if self.optimizer is None
            else self.optimizer(parameters)
        )
        if self.scheduler is None:
            return optimizer
        schedule: Any = {"scheduler": self.scheduler(optimizer), "interval": self.scheduler_interval}
        return {"optimizer": optimizer, "lr_scheduler": schedule}
