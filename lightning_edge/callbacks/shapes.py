"""What has to be seen to when the shapes of a network change on the way: companions, checkpoints, the strategy."""

import math
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import WeightAveraging
from lightning.pytorch.strategies import DDPStrategy, Strategy
from torch import nn

from lightning_edge.callbacks.base import CompressionCallback, callbacks_of, compressing
from lightning_edge.surgery.widths import WIDTHS_KEY, Manifest, has_widths


def check_company(trainer: L.Trainer, callback: CompressionCallback, *, remove_epoch: int | None) -> None:
    """Refuse callbacks that would hold on to the wide shapes.

    Args:
        trainer: Its callbacks are looked at.
        callback: The one that removes channels.
        remove_epoch: When; None: at the end of the fit.

    Raises:
        ValueError: With the epoch that would do.
    """
    for other in callbacks_of(trainer):
        if remove_epoch is not None and isinstance(other, WeightAveraging):
            raise ValueError(
                f"remove_epoch must be None with WeightAveraging, whose average has the wide shapes, got"
                f" {remove_epoch}: the channels are then removed at the end of the fit"
            )
    techniques = compressing(trainer)
    removed = math.inf if remove_epoch is None else remove_epoch, techniques.index(callback)
    for place, technique in enumerate(techniques):
        if technique is callback or not technique.knows_its_epochs():
            continue
        first = technique.decisions()[0]
        # Within an epoch channels go at its start, and networks are captured at the first batch.
        at_start = technique.technique != "quantization" and not technique.decides_in_steps()
        turn = place if at_start else math.inf
        if (first, turn) < removed and technique.technique in ("pruning", "sharing", "quantization"):
            order = f", and {type(callback).__name__} before it in the list" if first == remove_epoch else ""
            raise ValueError(
                f"remove_epoch must be at most {first}, where {type(technique).__name__} begins to hold on to the"
                f" shapes of the weights{order}, got {remove_epoch}: remove the channels first"
            )


def require_narrow(checkpoint: dict[str, Any], network: nn.Module, removed: Manifest, *, owner: str) -> None:
    """Raise if a checkpoint of the wide network is to be loaded into the network that was narrowed since.

    Args:
        checkpoint: Of Lightning.
        network: The network.
        removed: Its sizes after the removal; none before.
        owner: Name of the module's class.

    Raises:
        ValueError: With what to load it into.
    """
    if WIDTHS_KEY not in checkpoint and removed and has_widths(network, removed):
        raise ValueError(
            "ckpt_path must be a checkpoint from after the removal of the channels, got one of the wide network: load"
            f" it into a new {owner}, whose layers are as wide as they were"
        )


def wrap_anew(strategy: Strategy) -> None:
    """Let DistributedDataParallel forget the wide parameters: its buckets are made for them."""
    if isinstance(strategy, DDPStrategy) and isinstance(strategy.model, nn.parallel.DistributedDataParallel):
        strategy.model = strategy.lightning_module
        strategy.configure_ddp()
