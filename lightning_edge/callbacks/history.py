"""What a fit did, epoch by epoch, through every resume."""

from typing import Any

import lightning as L
import torch

from lightning_edge.surgery.selection import find_network, select_weights


class History(L.Callback):
    """Keep the validation metrics of every epoch, and the zeros and distinct values of the weights at its end.

    ``epochs`` is a list of mappings with ``"epoch"``, ``"sparsity"`` (zeros / all linear and convolution weights),
    ``"distinct_values"`` (largest number in a layer) and every metric whose name starts with ``"val"``.

    >>> History().state_dict()
    {'epochs': []}
    """

    def __init__(self, *, network: str | None = None) -> None:
        self.network = network
        self.epochs: list[dict[str, float]] = []

    @torch.no_grad()
    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Add this epoch."""
        weights = list(select_weights(find_network(pl_module, self.network), trainable=False).values())
        zeros, size = sum(int((w == 0).sum()) for w in weights), sum(w.numel() for w in weights)
        metrics = {name: float(value) for name, value in trainer.callback_metrics.items() if name.startswith("val")}
        distinct = max(len(torch.unique(weight)) for weight in weights)
        row = {"epoch": float(trainer.current_epoch), "sparsity": zeros / size, "distinct_values": float(distinct)}
        self.epochs.append(row | metrics)

    def state_dict(self) -> dict[str, Any]:
        """Return the epochs so far."""
        return {"epochs": self.epochs}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from the epochs of the checkpoint."""
        self.epochs = [dict(row) for row in state_dict["epochs"]]
