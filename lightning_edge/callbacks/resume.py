"""Random states in the checkpoint, so that a resumed run sees what the uninterrupted one would have seen."""

import random
from typing import Any

import lightning as L
import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch.utils.data import DataLoader


class ExactResume(L.Callback):
    """Save the random states of Python, NumPy and torch with every checkpoint, per rank, and put them back on resume.

    Lightning saves no random state: a resumed run shuffles, augments and drops out differently. With this callback, a
    run that is resumed from a checkpoint of an epoch's end goes on bit by bit like the run that was never stopped (same
    seeds, devices and kernels). It warns of what it cannot restore: ``ReduceLROnPlateau``, loaders with workers that
    outlive an epoch or a generator of their own. (Of a checkpoint from inside an epoch with a loader that keeps no
    state, Lightning warns itself.)

    >>> sorted(ExactResume().state_dict()["ranks"][0])
    ['cuda', 'numpy', 'python', 'torch']
    """

    def __init__(self) -> None:
        self._ranks: list[Any] | None = None

    def state_dict(self) -> dict[str, Any]:
        """Return the random states of every rank; collective under DDP, as every checkpoint of Lightning is."""
        ranks: list[Any] = [_random_states()]
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            ranks = [None] * torch.distributed.get_world_size()
            torch.distributed.all_gather_object(ranks, _random_states())
        return {"ranks": ranks}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep the states until the fit starts: what comes in between draws random numbers too."""
        self._ranks = state_dict["ranks"]

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Put the states of this rank back; later is too late, the first iterator draws its seed before training.

        Raises:
            ValueError: If the checkpoint was written by another number of processes.
        """
        if self._ranks is None:
            return
        if len(self._ranks) != trainer.world_size:
            raise ValueError(
                f"devices must equal that of the checkpoint to resume it exactly, got {trainer.world_size} processes"
                f" for the random states of {len(self._ranks)}: use as many, or leave ExactResume out"
            )
        _restore(self._ranks[trainer.global_rank])
        if any(config.reduce_on_plateau for config in trainer.lr_scheduler_configs):
            rank_zero_warn("ReduceLROnPlateau loses a step on resume: Lightning saves the checkpoint before it steps.")

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Warn of loaders whose randomness lives where a checkpoint does not reach."""
        resumed, self._ranks = self._ranks is not None, None
        loaders = trainer.train_dataloader
        for loader in loaders if isinstance(loaders, list | tuple) else [loaders]:
            if not resumed or not isinstance(loader, DataLoader):
                continue
            if loader.persistent_workers:
                rank_zero_warn("Workers that outlive an epoch start anew on resume: set persistent_workers=False.")
            if loader.generator is not None:
                rank_zero_warn("A DataLoader with a generator of its own starts it anew on resume: leave it out.")


def _random_states() -> dict[str, Any]:
    version, internal, gauss = random.getstate()
    legacy: Any = np.random.get_state(legacy=False)  # noqa: NPY002 - the global state is what has to be saved
    return {
        "python": [version, torch.tensor(internal, dtype=torch.int64), gauss],
        "numpy": [
            legacy["bit_generator"],
            torch.from_numpy(legacy["state"]["key"].astype(np.int64)),
            int(legacy["state"]["pos"]),
            int(legacy["has_gauss"]),
            float(legacy["gauss"]),
        ],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def _restore(states: dict[str, Any]) -> None:
    version, internal, gauss = states["python"]
    random.setstate((version, tuple(internal.tolist()), gauss))
    name, key, position, has_gauss, cached = states["numpy"]
    np.random.set_state((name, key.numpy().astype(np.uint32), position, has_gauss, cached))  # noqa: NPY002 - as above
    torch.set_rng_state(states["torch"])
    if states["cuda"]:
        torch.cuda.set_rng_state_all(states["cuda"])
