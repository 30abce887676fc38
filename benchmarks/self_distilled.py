"""A classifier that also learns from its own dense self: what the pruning benchmark fine-tunes with."""

import copy
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from lightning_edge.modules import ClassificationModule


class SelfDistilled(ClassificationModule):
    """Train with 0.1 x cross entropy + 0.9 x soft targets (Hinton et al. 2015, arXiv:1503.02531) at temperature 4.

    The teacher is the network itself with its pretrained weights: it costs one inference a step. It is no submodule, so
    checkpoints and optimizer do not know it.
    """

    temperature = 4.0
    soft_weight = 0.9

    def __init__(
        self,
        network: nn.Module,
        *,
        teacher: str,
        optimizer: Callable[[Iterable[nn.Parameter]], Optimizer] | None = None,
        scheduler: Callable[[Optimizer], LRScheduler] | None = None,
        scheduler_interval: Literal["epoch", "step"] = "epoch",
        num_classes: int = 10,
        label_smoothing: float = 0.0,
    ) -> None:
        super().__init__(
            network,
            optimizer=optimizer,
            scheduler=scheduler,
            scheduler_interval=scheduler_interval,
            num_classes=num_classes,
            label_smoothing=label_smoothing,
        )
        weights = torch.load(Path(teacher), map_location="cpu", weights_only=True)["state_dict"]
        dense = copy.deepcopy(network)
        dense.load_state_dict({name.removeprefix("module."): value for name, value in weights.items()})
        object.__setattr__(self, "_teacher", dense.eval().requires_grad_(False))

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Return the mixed loss of the batch, in nats."""
        inputs, labels = batch
        with torch.no_grad():
            targets = self._teacher(inputs).float() / self.temperature
        logits = self(inputs).float()
        soft = F.kl_div(
            F.log_softmax(logits / self.temperature, 1),
            F.log_softmax(targets, 1),
            log_target=True,
            reduction="batchmean",
        )
        hard = F.cross_entropy(logits, labels)
        return (1 - self.soft_weight) * hard + self.soft_weight * self.temperature**2 * soft
