"""Quantize a network when its fit is over: the ranges of activations come from a few training batches."""

from collections.abc import Callable, Sequence
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn

from lightning_edge.callbacks.base import SHARDING, callbacks_of, require_float32_weights
from lightning_edge.callbacks.export import ExportArtifacts
from lightning_edge.callbacks.inputs import NetworkInputs, check_has_forward, training_calls
from lightning_edge.callbacks.quantization import QuantizationAwareTraining
from lightning_edge.surgery.bias_correction import correct_bias_
from lightning_edge.surgery.calibration import BATCHES, calibrate_
from lightning_edge.surgery.captured import CapturedNetwork, captured_of
from lightning_edge.surgery.copying import copied
from lightning_edge.surgery.equalization import equalize_
from lightning_edge.surgery.observers import RangeObserver, observer_factory
from lightning_edge.surgery.quantization import capture_, release_if_captured_
from lightning_edge.surgery.selection import find_network, select_layers, select_weights


class PostTrainingQuantization(L.Callback):
    """Static int8 without training for it (Jacob et al. 2018, arXiv:1712.05877), at the end of the fit.

    In ``on_fit_end`` rank zero runs a few training batches through the network in evaluation mode, and every rank lets
    the network compute with the ranges found: ``trainer.test`` then measures the int8 network, and an
    ``ExportArtifacts`` behind this callback in the list writes it. A trained network needs no epoch more:
    ``Trainer(max_epochs=0)``. The ranges live in this callback's state; checkpoints stay plain.

    Args:
        batches: How many training batches are looked at; None for all.
        observer: ``"minmax"``, ``"moving_average"``, ``"percentile"``, ``"histogram"`` (smallest squared error), or a
            callable that makes an observer; see ``surgery.observers``.
        keep: Globs over names of layers, or names of their classes, that stay in float.
        equalize: First give the channels between two layers equal ranges; see ``surgery.equalization.equalize_``.
        correct_bias: Then shift biases until channels have the means of the float network; see
            ``surgery.bias_correction.correct_bias_``.
        seed: Of the data's order, whatever was drawn before.
        progress: Show a progress bar while the trainer shows its own.
        network: Dotted path of the network inside the LightningModule; see ``surgery.selection.network_path``.

    Raises:
        ValueError: If an argument is out of its range; at ``setup``, if ``keep`` matches no layer, the network is
            quantized while it is trained already, or ``ExportArtifacts`` comes first.

    >>> PostTrainingQuantization(batches=8, observer="percentile").batches
    8
    """

    def __init__(
        self,
        *,
        batches: int | None = BATCHES,
        observer: str | Callable[[], RangeObserver] = "histogram",
        keep: Sequence[str] = (),
        equalize: bool = False,
        correct_bias: bool = False,
        seed: int = 0,
        progress: bool = True,
        network: str | None = None,
    ) -> None:
        if batches is not None and (not isinstance(batches, int) or batches < 1):
            raise ValueError(f"batches must be a whole number, at least 1, or None for all, got {batches!r}")
        observer_factory(observer)
        self.batches, self.observer = batches, observer
        self.keep = keep if isinstance(keep, str) else tuple(keep)  # a string is refused at setup
        self.equalize, self.correct_bias, self.seed = equalize, correct_bias, seed
        self.progress, self.network = progress, network
        self._captured: CapturedNetwork | None = None
        self._inputs = NetworkInputs()
        self._observers: dict[str, Tensor] | None = None

    @property
    def state_key(self) -> str:
        """Key of the state in a checkpoint."""
        return self._generate_state_key(network=self.network)

    def check(self, network: nn.Module, *, max_epochs: float) -> None:
        """Raise a ValueError if there is nothing to quantize, or ``keep`` matches no layer."""
        check_has_forward(network)
        select_layers(network, self.keep, argument="keep")
        select_weights(network, exclude=self.keep)

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Refuse what cannot work, before any training."""
        if stage != "fit":
            return
        self._captured = None
        require_float32_weights(trainer)
        if isinstance(trainer.strategy, SHARDING):
            raise ValueError(
                f"strategy must keep whole parameters on every device, got {type(trainer.strategy).__name__}, which"
                " shards them: PostTrainingQuantization needs 'auto', 'ddp' or a single device"
            )
        self.check(find_network(pl_module, self.network), max_epochs=trainer.max_epochs or 0)
        others = callbacks_of(trainer)
        network = find_network(pl_module, self.network)
        twins = [other for other in others if isinstance(other, PostTrainingQuantization)]
        if sum(find_network(pl_module, other.network) is network for other in twins) > 1:
            raise ValueError(
                f"callbacks must quantize a network once, got {len(twins)} PostTrainingQuantization with network="
                f"{[other.network for other in twins]}: leave one of them out"
            )
        if any(isinstance(other, QuantizationAwareTraining) for other in others):
            raise ValueError(
                "callbacks must quantize once, got PostTrainingQuantization beside QuantizationAwareTraining, whose"
                " network is an int8 one already: leave one of them out"
            )
        if any(isinstance(other, ExportArtifacts) for other in others[: others.index(self)]):
            raise ValueError(
                "callbacks must hold PostTrainingQuantization before ExportArtifacts, got the other order: the files"
                " would be those of the float network"
            )

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Compute in float with a checkpoint that was saved before the network was quantized."""
        if self.state_key not in checkpoint.get("callbacks", {}):
            self._captured = self._observers = None
            release_if_captured_(find_network(pl_module, self.network))

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Bring the ranges back when a checkpoint is validated."""
        self._resume(pl_module)

    def on_test_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Bring the ranges back when a checkpoint is tested."""
        self._resume(pl_module)

    def on_predict_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Bring the ranges back when a checkpoint predicts."""
        self._resume(pl_module)

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Calibrate and quantize; a run that is resumed from a checkpoint that was quantized takes its ranges."""
        self._resume(pl_module)
        if self._captured is not None or getattr(trainer, "fast_dev_run", False):
            return
        found: list[Any] = [None]
        if trainer.is_global_zero:
            found = [self._quantize(trainer, pl_module)]
            rank_zero_info(f"quantized after training: {len(found[0]['observers']) // 4} ranges")
        if trainer.world_size > 1:
            # The strategy is torn down by now, its process group is not.
            torch.distributed.broadcast_object_list(found, src=0)
            if not trainer.is_global_zero:
                find_network(pl_module, self.network).load_state_dict(found[0]["weights"])
                self.load_state_dict(found[0])
                self._resume(pl_module)

    def state_dict(self) -> dict[str, Any]:
        """Return the ranges and the shapes of the inputs; nothing before the network is quantized."""
        if self._captured is None:
            return {}
        return {"observers": self._captured.observer_state(), "inputs": self._inputs.state()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep the ranges until the network is where it will run."""
        self._captured = None
        self._observers = state_dict.get("observers")
        self._inputs = NetworkInputs(state_dict.get("inputs", ()))

    def _quantize(self, trainer: L.Trainer, pl_module: L.LightningModule) -> dict[str, Any]:
        """Quantize on this rank; return what the others need: state and weights."""
        network = find_network(pl_module, self.network)
        shown = self.progress and trainer.progress_bar_callback is not None
        batches = training_calls(trainer, pl_module, network, batches=self.batches, seed=self.seed, progress=shown)
        self._inputs.remember(batches[0])
        example = self._inputs.example(next(network.parameters()).device)
        if self.equalize:
            equalize_(network, example)
        plain = copied(network)
        self._captured = capture_(network, example, keep=self.keep)
        calibrate_(self._captured, batches, observer=self.observer)
        if self.correct_bias:
            correct_bias_(network, plain, batches)
        weights = {name: value.cpu() for name, value in network.state_dict().items()}
        return {**self.state_dict(), "weights": weights}

    def _resume(self, pl_module: L.LightningModule) -> None:
        if self._observers is None or self._captured is not None:
            return
        network = find_network(pl_module, self.network)
        installed = captured_of(network)
        if installed is not None:  # a second run of the same module
            installed.load_observer_state(self._observers, frozen=True)
            self._captured = installed
        else:
            inputs = self._inputs.example(pl_module.device)  # capturing reads shapes and types alone
            self._captured = capture_(network, inputs, observers=self._observers, frozen=True, keep=self.keep)
        self._observers = None
