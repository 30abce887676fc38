"""Train a network with fake-quantized numbers: the int8 network that comes of it has learned to live with them."""

from collections.abc import Sequence
from typing import Any, ClassVar

import lightning as L
import torch
from torch import nn
from torch.optim import Optimizer

from lightning_edge.callbacks.base import CompressionCallback, require_agreement, require_float32_weights
from lightning_edge.callbacks.inputs import NetworkInputs, check_has_forward, training_calls
from lightning_edge.surgery.calibration import calibrate_
from lightning_edge.surgery.capture import capture, keep_random_state
from lightning_edge.surgery.captured import WeightBits
from lightning_edge.surgery.learned_steps import LearnedSteps
from lightning_edge.surgery.quantization import CapturedNetwork, bits_of_weights, capture_, release_if_captured_
from lightning_edge.surgery.selection import find_network, select_layers, select_weights


class QuantizationAwareTraining(CompressionCallback):
    """Quantization-aware training (Jacob et al. 2018, arXiv:1712.05877) that starts late and keeps checkpoints plain.

    From ``start_epoch`` the network's ``forward`` runs through a graph with torchao's fake quantizers, which shares
    the network's own parameters and buffers. Before, nothing is captured and nothing costs anything. The plain network
    stays registered under its own names: checkpoints, optimizers, DDP, averaging, pruning and sharing work on it as
    ever. The ranges of the observers live in this callback's state. After the fit the network keeps computing with
    fake-quantized numbers, so that ``trainer.test`` measures the int8 network; ``surgery.quantization.release_`` puts
    the plain one back. The network must be called alike every time: the batch may vary, other sizes and which
    arguments are given may not.

    Args:
        start_epoch: Zero-based epoch from which ranges are observed, and numbers rounded.
        quantize_epoch: Epoch from which numbers are rounded, if later: until then observers watch the float network.
        freeze_observers_epoch: Epoch from which ranges and steps stay as they are, ``start_epoch`` at the earliest, if
            there is a calibration; the default is never. Scales are exact from then on, see
            ``surgery.exact_scales``: every runtime gives the integers of ``surgery.quantization.convert``.
        freeze_batch_norm_epoch: Epoch from which batch norms use, and keep, their running statistics; the default is
            never.
        weight_bits: 8, 4, or globs over names of layers to these, the first match counting:
            ``{"conv1": 8, "*": 4}``. Weights of 4 bits are kept in int8: see ``surgery.quantization.capture_``.
        learned_steps: Let the sizes of all steps be learned (LSQ, Esser et al. 2020, arXiv:1902.08153), until observers
            freeze; best with few bits.
        keep: Globs over names of layers, or names of their classes, that stay in float.
        calibration_batches: Training batches from which the first ranges are taken, as after training (the smallest
            squared error); 0: from the first training batch on, as its averages.
        seed: Of the order of these batches.
        network: Dotted path of the network inside the LightningModule; see ``surgery.selection.network_path``.

    Raises:
        ValueError: If an epoch or a number of bits is out of its range, a pattern matches no layer, or the network
            cannot be captured; at the end of the fit, if numbers were never rounded.

    >>> QuantizationAwareTraining(start_epoch=22, freeze_observers_epoch=26).fixes_at()
    26
    """

    technique: ClassVar[str] = "quantization"
    follows: ClassVar[tuple[str, ...]] = ("pruning", "channels", "sharing")

    def __init__(
        self,
        start_epoch: int,
        *,
        quantize_epoch: int | None = None,
        freeze_observers_epoch: int | None = None,
        freeze_batch_norm_epoch: int | None = None,
        weight_bits: WeightBits = 8,
        learned_steps: bool = False,
        keep: Sequence[str] = (),
        calibration_batches: int = 0,
        seed: int = 0,
        network: str | None = None,
    ) -> None:
        epochs = {
            "start_epoch": start_epoch,
            "quantize_epoch": quantize_epoch,
            "freeze_observers_epoch": freeze_observers_epoch,
            "freeze_batch_norm_epoch": freeze_batch_norm_epoch,
        }
        for name, epoch in epochs.items():
            if not isinstance(epoch, int) and (epoch is not None or name == "start_epoch"):
                raise ValueError(f"{name} must be a whole number, got {epoch!r}")
        if not isinstance(calibration_batches, int) or calibration_batches < 0:
            raise ValueError(f"calibration_batches must be a whole number >= 0, got {calibration_batches}")
        if start_epoch < 0:
            raise ValueError(f"start_epoch must be >= 0, got {start_epoch}")
        for name in ("quantize_epoch", "freeze_batch_norm_epoch"):
            epoch = epochs[name]
            if epoch is not None and epoch < start_epoch:
                raise ValueError(f"{name} must be at least start_epoch={start_epoch}, got {epoch}")
        first = start_epoch if calibration_batches else start_epoch + 1
        if freeze_observers_epoch is not None and freeze_observers_epoch < first:
            raise ValueError(
                f"freeze_observers_epoch must be at least {first} with start_epoch={start_epoch}, got"
                f" {freeze_observers_epoch}: observers have to see an epoch of data before they are frozen, or a"
                " calibration (calibration_batches=16)"
            )
        self.start_epoch, self.freeze_observers_epoch = start_epoch, freeze_observers_epoch
        self.quantize_epoch = start_epoch if quantize_epoch is None else quantize_epoch
        self.freeze_batch_norm_epoch = freeze_batch_norm_epoch
        self.weight_bits, self.learned_steps = weight_bits, learned_steps
        self.network = network
        self.keep = keep if isinstance(keep, str) else tuple(keep)  # a string is refused at setup
        self.calibration_batches, self.seed = calibration_batches, seed
        self.reset()

    @property
    def state_key(self) -> str:
        """Key of the state in a checkpoint."""
        return self._generate_state_key(network=self.network)

    @property
    def begins(self) -> str:
        """The argument that says from when the network has to stay as it is."""
        return "freeze_observers_epoch"

    def decisions(self) -> tuple[int, int]:
        """Return the epochs at which ranges are first observed, and numbers first rounded."""
        return self.start_epoch, self.quantize_epoch

    def fixes_at(self) -> float:
        """Return the epoch from which the ranges are frozen: nothing else may change the network after it."""
        return float("inf") if self.freeze_observers_epoch is None else self.freeze_observers_epoch

    def reset(self) -> None:
        """Forget the network of an earlier fit."""
        super().reset()
        self._captured: CapturedNetwork | None = None
        self._inputs = NetworkInputs()
        self._saved: dict[str, Any] = {}
        self._steps: LearnedSteps | None = None
        self._traced = False

    def check(self, network: nn.Module, *, max_epochs: float) -> None:
        """Raise unless every milestone lies within the fit, and every pattern matches a layer."""
        milestones = ("start_epoch", "quantize_epoch", "freeze_observers_epoch", "freeze_batch_norm_epoch")
        for name in milestones:
            epoch = getattr(self, name)
            if epoch is not None and epoch >= max_epochs:
                raise ValueError(f"{name} must be below max_epochs={max_epochs:g} (zero-based), got {epoch}")
        check_has_forward(network)
        bits_of_weights(network, self.weight_bits)
        select_layers(network, self.keep, argument="keep")
        select_weights(network, exclude=self.keep)

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Refuse what cannot work, before any training."""
        super().setup(trainer, pl_module, stage)
        if stage == "fit":
            require_float32_weights(trainer)

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Compute in float with a checkpoint that was saved before the start."""
        super().on_load_checkpoint(trainer, pl_module, checkpoint)
        if self.state_key not in checkpoint.get("callbacks", {}):
            self._captured, self._saved = None, {}
            release_if_captured_(find_network(pl_module, self.network))

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Go on from the observers of a resumed run; else see what the network's inputs look like."""
        super().on_fit_start(trainer, pl_module)
        network = find_network(pl_module, self.network)
        if trainer.current_epoch < self.start_epoch:
            release_if_captured_(network)  # by an earlier fit
        self._resume(pl_module)
        if self._captured is None:
            self._inputs.watch(network)
        if self.learned_steps:
            self.after_steps(trainer, self._learn)

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Bring the observers back when a checkpoint is validated; in a fit, agree on the ranges first."""
        self._resume(pl_module)
        self._synchronize(trainer)
        if self._captured is not None:
            self._captured.follow_codebooks()

    def on_test_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Bring the observers back when a checkpoint is tested."""
        self._resume(pl_module)

    def on_predict_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Bring the observers back when a checkpoint predicts."""
        self._resume(pl_module)

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Let the weights' quantizers look at shared values again, which training moves."""
        if self._captured is not None:
            self._captured.follow_codebooks()

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Capture the network before the first batch of ``start_epoch``, and keep to the milestones."""
        epoch = trainer.current_epoch
        if self._captured is None and epoch < self.start_epoch and not self._traced:
            self._trace(pl_module, batch)
        if self._captured is None and epoch >= self.start_epoch:
            self._inputs.take_from(pl_module, batch)  # if nothing has run yet: from the first batch on, no sanity check
            self._capture(pl_module)
            self._calibrate(trainer, pl_module)
        if self._captured is None:
            return
        self._captured.rounding = epoch >= self.quantize_epoch
        self._captured.norms_frozen = self.freeze_batch_norm_epoch is not None and epoch >= self.freeze_batch_norm_epoch
        if epoch >= self.fixes_at() and not self._captured.observers_frozen:
            self._captured.freeze_observers()

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Agree on the ranges over all ranks, and log the widest of an activation."""
        self._synchronize(trainer)
        if self._captured is not None:
            low, high = self._captured.ranges()
            pl_module.log("quantization/widest_range", (high - low).max(), on_epoch=True, sync_dist=True)

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Raise if the fit ended before numbers were rounded."""
        if (self._captured is None or not self._captured.rounding) and self.must_be_done(trainer):
            raise ValueError(
                f"QuantizationAwareTraining must round from epoch {self.quantize_epoch}, got a fit that ended at epoch"
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
            "rounding": self._captured.rounding,
            "steps": None if self._steps is None else self._steps.state_dict(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep the observers until the network is where it will run."""
        super().load_state_dict(state_dict)
        self._captured = None  # of an earlier run of the trainer, maybe of another network
        self._saved = dict(state_dict)
        self._inputs = NetworkInputs(state_dict.get("inputs", ()))

    def _resume(self, pl_module: L.LightningModule) -> None:
        if self._saved and self._captured is None:
            self._capture(pl_module)

    def _trace(self, pl_module: L.LightningModule, batch: Any) -> None:
        """Refuse a network that cannot be captured at the first batch, not after epochs of training."""
        self._inputs.take_from(pl_module, batch)
        with keep_random_state():
            capture(find_network(pl_module, self.network), self._inputs.example(pl_module.device))
        self._traced = True

    def _capture(self, pl_module: L.LightningModule) -> None:
        network, saved = find_network(pl_module, self.network), self._saved
        release_if_captured_(network)  # by an earlier run of the same module
        self._captured = capture_(
            network,
            self._inputs.example(pl_module.device),  # capturing reads shapes and types alone
            observers=saved.get("observers"),
            frozen=bool(saved.get("frozen")),
            keep=self.keep,
            weight_bits=self.weight_bits,
            learned_steps=self.learned_steps,
        )
        self._captured.rounding = bool(saved.get("rounding", True))
        if self.learned_steps:
            self._steps = LearnedSteps(self._captured)
            if saved.get("steps"):
                self._steps.load_state_dict(saved["steps"])
        self._saved = {}

    def _calibrate(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self.calibration_batches:
            assert self._captured is not None
            network = find_network(pl_module, self.network)
            calls = training_calls(trainer, pl_module, network, batches=self.calibration_batches, seed=self.seed)
            calibrate_(self._captured, calls, freeze=False)
            # The running statistics of batch norms, through which the ranks looked, are each rank's own.
            state = trainer.strategy.broadcast(self._captured.observer_state())
            self._captured.load_observer_state(state)

    def _learn(self, optimizer: Optimizer, *_: Any) -> None:
        """Step the steps after the weights, with the mean gradient of all ranks and the weights' schedule."""
        gradients = None if self._steps is None else self._steps.gradients()
        if self._steps is None or gradients is None:
            return
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(gradients)
            gradients /= torch.distributed.get_world_size()
        self._steps.update(gradients, factor=_schedule(optimizer))

    def _synchronize(self, trainer: L.Trainer) -> None:
        """Take the smallest minimum and the largest maximum of all ranks, which see different data."""
        if self._captured is None or trainer.world_size == 1 or self._captured.observers_frozen:
            return
        # A step relative to a range of each rank's own batch norms differs in its last bit.
        own = self._captured.observer_state()
        clips = {name: clip for name, clip in own.items() if name.endswith("log_clip")}
        self._captured.load_observer_state(own | trainer.strategy.broadcast(clips))
        low, high = self._captured.ranges()
        torch.distributed.all_reduce(low, op=torch.distributed.ReduceOp.MIN)
        torch.distributed.all_reduce(high, op=torch.distributed.ReduceOp.MAX)
        self._captured.set_ranges(low, high)
        require_agreement(trainer, self._captured.observer_state().values(), what="the ranges of the observers")


def _schedule(optimizer: Optimizer) -> float:
    """Return how far the learning rates have come down, in [0, 1]; schedules that begin low do not go above 1."""
    rates = [(float(group["lr"]), float(group.get("initial_lr", group["lr"]))) for group in optimizer.param_groups]
    rate, initial = max(rates, key=lambda pair: pair[1])
    return min(rate / initial, 1.0) if initial > 0 else 1.0
