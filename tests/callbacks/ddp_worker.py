"""Run by test_ddp.py, once more by Lightning for the second process: fit under DDP, write what each rank holds."""

import hashlib
import sys
from pathlib import Path

import torch
from lightning.pytorch.callbacks import Callback

import lightning_edge.callbacks.export as export_module
from conftest import DigitsTask, fit_digits
from lightning_edge import (
    ChannelPruning,
    DistillationModule,
    DistillationTerm,
    ExactResume,
    ExportArtifacts,
    QuantizationAwareTraining,
    WeightPruning,
    WeightSharing,
)
from lightning_edge.modules import MovingAverage

QUANTIZATION = {
    "steps": {"weight_bits": 4, "learned_steps": True},
    "calibration": {"calibration_batches": 2, "freeze_observers_epoch": 2},
}


class Diverge(Callback):
    """Another weight on rank 1, or a file on rank 0 that computes something else."""

    def __init__(self, when):
        self.when = when

    def on_train_epoch_start(self, trainer, pl_module):
        if self.when == "masks" and trainer.global_rank == 1 and trainer.current_epoch == 1:
            with torch.no_grad():
                pl_module.model[7].weight[:2].mul_(100)

    def on_fit_end(self, trainer, pl_module):
        if self.when == "export" and trainer.global_rank == 0:
            load = export_module.load_artifact
            export_module.load_artifact = lambda path: lambda images: -load(path)(images)


def digest(tensors):
    return hashlib.sha256(b"".join(t.detach().contiguous().numpy().tobytes() for t in tensors)).hexdigest()


def student():
    terms = {"soft": DistillationTerm(), "contrast": DistillationTerm("contrastive", layers={"4": "4"})}
    return DistillationModule(DigitsTask(), [DigitsTask(), MovingAverage(0.9)], terms)


def main(folder, when, seed):
    rank_of = []

    class Seen(Callback):
        """What this rank's data was, to know that the ranks saw different data."""

        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            rank_of.append(batch[0])

    pruning, sharing, qat = (
        # The masks of one run by magnitude, those of another by gradients that the ranks have to agree on.
        WeightPruning(0.8, end_epoch=1)
        if when != "channels"
        else WeightPruning(0.8, start_step=5, end_step=7, score="movement"),
        WeightSharing(6, at_epochs=[2], init="random")
        if when != "codes"
        else WeightSharing(16, at_epochs=[2], reassign_every=1, channel_scale=True, rate=0.02),
        QuantizationAwareTraining(2, **QUANTIZATION.get(when, {"freeze_observers_epoch": 3})),
    )
    export = ExportArtifacts(folder / "out", formats=["edge"])
    # Removed in the middle of the fit: the strategy has to wrap the narrow network anew.
    channels = [ChannelPruning(sparsity=0.5, start_step=2, score="taylor", round_to=2, remove_epoch=1)]
    callbacks = [Diverge(when), *(channels if when == "channels" else []), pruning, sharing, qat, Seen(), export]
    task, trainer = fit_digits(
        folder / "checkpoints",
        [ExactResume(), *callbacks],
        task=student() if when == "distillation" else DigitsTask(),
        seed=seed,
        devices=2,
        strategy="ddp",
        # A validation would give all ranks the batch norms of the first.
        limit_val_batches=0 if when == "calibration" else 1.0,
    )
    parts = {
        "masks": pruning.state_dict()["masks"].values(),
        "codes": sharing.state_dict()["codes"].values(),
        "hidden": sharing.state_dict()["hidden"].values(),
        "observers": qat.state_dict()["observers"].values(),
        "weights": task.parameters(),
        "data": rank_of,
    }
    lines = [f"{name} {digest(tensors)}" for name, tensors in parts.items()]
    (folder / f"rank{trainer.global_rank}.txt").write_text("\n".join(lines))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]))
