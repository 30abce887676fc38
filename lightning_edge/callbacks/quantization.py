"""Train a network with fake-quantized numbers: the int8 network that comes of it has learned to live with them."""

from typing import Any, ClassVar

import lightning as L
import torch
from torch import Tensor, nn

from lightning_edge.callbacks.base import CompressionCallback, require_agreement
from lightning_edge.callbacks.inputs import NetworkInputs
from lightning_edge.surgery.quantization import CapturedNetwork, capture_
from lightning_edge.surgery.selection import find_network


class QuantizationAwareTraining(CompressionCallback):
    """Quantization-aware training (Jacob et al. 2018, arXiv:1712.05877) that starts late and keeps checkpoints plain.

    From ``start_epoch`` the network's ``forward`` runs through a graph with torchao's fake quantizers, which shares
    the network's own parameters and buffers. Before, nothing is captured and nothing costs anything. The plain network
    stays registered under its own names: checkpoints, optimizers, DDP, averaging, pruning and sharing work on it as
    ever. The ranges of the observers live in this callback's state. After the fit the network keeps computing with
    fake-quantized numbers, so that ``trainer.test`` measures the int8 network; ``surgery.quantization.release_`` puts
    the plain one back.

    Args:
        start_epoch: Zero-based epoch from which numbers are quantized and ranges observed.
        freeze_observers_epoch: Epoch from which ranges stay as they are; the default is never.
        network: Dotted path of the network inside the LightningModule; see ``surgery.selection.network_path``.

    Raises:
        ValueError: If an epoch is out of its range, or the network cannot be captured; at the end of the fit, if
            ``start_epoch`` was not reached.

    >>> QuantizationAwareTraining(start_epoch=22, freeze_observers_epoch=26).fixes_at()
    26
    """

    technique: ClassVar[str] = "quantization"
    follows: ClassVar[tuple[str, ...]] = ("pruning", "channels", "sharing")

    def __init__(
        self, start_epoch: int, *, freeze_observers_epoch: int | None = None, network: str | None = None
    ) -> None:
        if start_epoch < 0:
            raise ValueError(f"start_epoch must be >= 0, got {start_epoch}")
        if freeze_observers_epoch is not None and freeze_observers_epoch <= start_epoch:
            raise ValueError(
                f"freeze_observers_epoch must be above start_epoch={start_epoch}, got {freeze_observers_epoch}:"
                " observers have to see an epoch of data before they are frozen"
            )
        self.start_epoch, self.freeze_observers_epoch, self.network = start_epoch, freeze_observers_epoch, network
        self.reset()

    @property
    def state_key(self) -> str:
        """Key of the state in a checkpoint."""
        return self._generate_state_key(network=self.network)

    def decisions(self) -> tuple[int, int]:
        """Return the epoch at which quantization starts, twice."""
        return self.start_epoch, self.start_epoch

    def fixes_at(self) -> float:
        """Return the epoch from which the ranges are frozen: nothing else may change the network after it."""
        return float("inf") if self.freeze_observers_epoch is None else self.freeze_observers_epoch

    def reset(self) -> None:
        """Forget the network of an earlier fit."""
        super().reset()
        self._captured: CapturedNetwork | None = None
        self._inputs = NetworkInputs()
        self._observers: dict[str, Tensor] | None = None
        self._frozen = False

    def check(self, network: nn.Module, *, max_epochs: float) -> None:
        """Raise unless quantization starts, and the observers freeze, within the fit."""
        for name, epoch in (("start_epoch", self.start_epoch), ("freeze_observers_epoch", self.freeze_observers_epoch)):
            if epoch is not None and epoch >= max_epochs:
                raise ValueError(f"{name} must be below max_epochs={max_epochs:g} (zero-based), got {epoch}")

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Go on from the observers of a resumed run; else see what the network's inputs look like."""
        super().on_fit_start(trainer, pl_module)
        self._resume(pl_module)
        if self._captured is None:
            self._inputs.watch(pl_module, find_network(pl_module, self.network))

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Bring the observers back when a checkpoint is validated; in a fit, agree on the ranges first."""
        self._resume(pl_module)
        self._synchronize(trainer)

    def on_test_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Bring the observers back when a checkpoint is tested."""
        self._resume(pl_module)

    def on_predict_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Bring the observers back when a checkpoint predicts."""
        self._resume(pl_module)

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Capture the network before the first batch of ``start_epoch``, and freeze the observers when it is time."""
        if self._captured is None and trainer.current_epoch >= self.start_epoch:
            self._inputs.take_from(batch)  # if nothing has run yet: from the first batch on, no sanity check
            self._capture(pl_module)
        frozen = trainer.current_epoch >= self.fixes_at()
        if self._captured is not None and frozen and not self._captured.observers_frozen:
            self._captured.freeze_observers()

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Agree on the ranges over all ranks, and log the widest of an activation."""
        self._synchronize(trainer)
        if self._captured is not None:
            low, high = self._captured.ranges()
            pl_module.log("quantization/widest_range", (high - low).max(), on_epoch=True, sync_dist=True)

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Raise if the fit ended before quantization started."""
        if self._captured is None and self.must_be_done(trainer):
            raise ValueError(
                f"QuantizationAwareTraining must start at epoch {self.start_epoch}, got a fit that ended at epoch"
                f" {trainer.current_epoch}: train for more epochs or start earlier"
            )

    def state_dict(self) -> dict[str, Any]:
        """Return the observers' state and the shapes of the inputs; nothing before the start."""
        if self._captured is None:
            return {}
        return {
            "observers": self._captured.observer_state(),
            "inputs": self._inputs.state(),
            "frozen": self._captured.observers_frozen,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep the observers until the network is where it will run."""
        super().load_state_dict(state_dict)
        self._captured = None  # of an earlier run of the trainer, maybe of another network
        self._observers, self._frozen = state_dict.get("observers"), bool(state_dict.get("frozen"))
        self._inputs = NetworkInputs(state_dict.get("inputs", ()))

    def _resume(self, pl_module: L.LightningModule) -> None:
        if self._observers is not None and self._captured is None:
            self._capture(pl_module)

    def _capture(self, pl_module: L.LightningModule) -> None:
        network = find_network(pl_module, self.network)
        inputs = self._inputs.example(pl_module.device)  # capturing reads shapes and types alone
        installed = vars(network).get("forward")
        if isinstance(installed, CapturedNetwork):  # a second run of the same module
            self._captured = installed
            if self._observers is not None:
                installed.load_observer_state(self._observers, frozen=self._frozen)
        else:
            self._captured = capture_(network, inputs, observers=self._observers, frozen=self._frozen)
        self._observers = None

    def _synchronize(self, trainer: L.Trainer) -> None:
        """Take the smallest minimum and the largest maximum of all ranks, which see different data."""
        if self._captured is None or trainer.world_size == 1 or self._captured.observers_frozen:
            return
        low, high = self._captured.ranges()
        torch.distributed.all_reduce(low, op=torch.distributed.ReduceOp.MIN)
        torch.distributed.all_reduce(high, op=torch.distributed.ReduceOp.MAX)
        self._captured.set_ranges(low, high)
        require_agreement(trainer, self._captured.observer_state().values(), what="the ranges of the observers")
