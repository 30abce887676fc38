"""What every compression callback sees to: where the network is, legal orders, ranks that agree, honest resumes."""

import hashlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, ClassVar

import lightning as L
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint, WeightAveraging
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.swa_utils import AveragedModel
from torch.utils.hooks import RemovableHandle

from lightning_edge.callbacks.resume import ExactResume
from lightning_edge.functional.schedules import epochs_of_fit
from lightning_edge.surgery.selection import find_network

SHARDING = (FSDPStrategy, DeepSpeedStrategy, ModelParallelStrategy)


class CompressionCallback(L.Callback):
    """Base of the callbacks that change a network while it is trained.

    A subclass says in :meth:`check` what it needs of the network, in :meth:`decisions` at which epochs it changes it,
    and keeps what it needs to go on in its own ``state_dict``: the weights themselves stay those of the plain network.
    """

    technique: ClassVar[str]
    """What the callback does, one word."""
    follows: ClassVar[tuple[str, ...]] = ()
    """Techniques that may not change the network any more from :meth:`fixes_at` on."""
    network: str | None = None
    _resumed = _trained = False
    _steps_per_epoch = math.inf
    _fitted: nn.Module | None = None
    _step_hooks: tuple[RemovableHandle, ...] = ()

    def check(self, network: nn.Module, *, max_epochs: float) -> None:
        """Raise a ValueError if the callback cannot do its work on ``network`` within ``max_epochs``."""

    def reset(self) -> None:
        """Forget an earlier fit of this callback; a resumed one loads its state afterwards."""

    @property
    def begins(self) -> str:
        """The argument that says from when what it follows may not change the network, for messages."""
        return "start_epoch"

    @property
    def ends(self) -> str:
        """The argument that says when the last decision falls, for messages."""
        return "end_epoch"

    def selected(self, network: nn.Module) -> Iterable[str]:
        """Return the names of the weights that no other callback of the technique may change."""
        return ()

    def decisions(self) -> tuple[int, int]:
        """Return the first and the last epoch (zero-based) at whose start the callback changes the network."""
        raise TypeError(f"{type(self).__name__} must say at which epochs it changes the network")

    def knows_its_epochs(self) -> bool:
        """Return whether :meth:`decisions` is certain: of a schedule of steps it is when the fit has begun."""
        return True

    def decides_in_steps(self) -> bool:
        """Return whether the last decision falls inside of its epoch, after everything that falls at its start."""
        return False

    def fixes_at(self) -> float:
        """Return the epoch from which the techniques that this one follows may not change the network any more."""
        return self.decisions()[0]

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Refuse what cannot work, before any training."""
        if stage != "fit":
            return
        self._resumed = self._trained = False
        if isinstance(trainer.strategy, SHARDING):
            raise ValueError(
                f"strategy must keep whole parameters on every device, got {type(trainer.strategy).__name__}, which"
                f" shards them: {type(self).__name__} needs 'auto', 'ddp' or a single device"
            )
        if is_overridden("configure_model", pl_module):
            pl_module.configure_model()  # the layers do not exist before, and Lightning calls it only after setup
        network = find_network(pl_module, self.network)
        if network is not self._fitted or trainer.global_step == 0:
            self.reset()  # else the fit goes on where an earlier one of this trainer ended: its decisions stand
        # A trial run of one batch never reaches the schedule: its length is no mistake in the arguments.
        max_epochs = math.inf if is_trial(trainer) or trainer.max_epochs in (None, -1) else trainer.max_epochs
        assert max_epochs is not None
        self.check(network, max_epochs=max_epochs)
        self._fitted = network
        if self is compressing(trainer)[0]:
            check_order(compressing(trainer))
            check_overlap(compressing(trainer), pl_module)
            _warn_of_early_choices(trainer)

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Forget what a fit that goes on has kept: the checkpoint says where it goes on."""
        if trainer.state.fn == TrainerFn.FITTING:
            self.reset()

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Say when a resumed run will draw another data order than the run that it goes on from."""
        exact = any(isinstance(callback, ExactResume) for callback in callbacks_of(trainer))
        if self._resumed and not exact and self is compressing(trainer)[0]:
            rank_zero_warn(
                "This run is resumed without ExactResume(): Lightning restores no random states, so data order,"
                " augmentation and dropout differ from the uninterrupted run. Add ExactResume() to the callbacks."
            )

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Know a fit that trains from one whose trainer has already finished, and how many steps an epoch has."""
        self._trained = True
        if is_trial(trainer):
            return
        batches, each = trainer.num_training_batches, trainer.accumulate_grad_batches
        epochs = epochs_of_fit(trainer.max_epochs, trainer.max_steps, batches=batches, each=each)
        if trainer.max_steps != -1:  # else all is known, and was checked, at setup
            try:
                self.check(find_network(pl_module, self.network), max_epochs=epochs)
            except ValueError as error:
                reason = f"max_steps={trainer.max_steps} ends the fit within {epochs:g} epochs"
                raise ValueError(f"{error}: {reason}") from error
        if trainer.max_epochs in (None, -1):
            return
        assert trainer.max_epochs is not None
        steps = trainer.estimated_stepping_batches
        self._steps_per_epoch = steps / max(trainer.max_epochs, 1)
        self.check_steps(steps)
        if self is compressing(trainer)[-1]:
            check_order(compressing(trainer))  # schedules of steps know their epochs only now

    def check_steps(self, steps: float) -> None:
        """Raise a ValueError if the callback's schedule of optimizer steps does not end within ``steps``."""

    def after_steps(self, trainer: L.Trainer, hook: Callable[..., None]) -> None:
        """Call ``hook`` after every step of every optimizer, until the fit is over."""
        self._step_hooks = tuple(optimizer.register_step_post_hook(hook) for optimizer in trainer.optimizers)

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Leave the optimizers to whoever uses them next."""
        for handle in self._step_hooks:
            handle.remove()
        self._step_hooks = ()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Leave the optimizers alone after a fit that failed, too: Lightning calls no teardown then."""
        self.teardown(trainer, pl_module, "fit")

    def must_be_done(self, trainer: L.Trainer) -> bool:
        """Return whether this fit had to reach the targets: not a trial run, nor one that had nothing left to train."""
        return (self._trained or self._resumed) and not is_trial(trainer)

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs: tensors, numbers and strings only."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over what :meth:`state_dict` returned."""
        self._resumed = True

    def networks(self, trainer: L.Trainer, pl_module: L.LightningModule) -> Iterator[nn.Module]:
        """Yield the network, then its copy in every ``WeightAveraging`` callback of the trainer."""
        yield find_network(pl_module, self.network)
        for average in averages_of(trainer):
            yield find_network(average.module, self.network)


def check_order(callbacks: Iterable[CompressionCallback]) -> None:
    """Refuse orders in which one technique undoes another.

    * Pruning, of weights and of channels, ends before sharing begins: a weight that is pruned later would leave its
      cluster, and come back with it.
    * Observers freeze after the last change of the network: they would keep the ranges of another network.

    At the start of one and the same epoch the order of the list decides; a schedule of steps ends after it.

    Raises:
        ValueError: With the legal order.
    """
    ordered = list(enumerate(callbacks))
    for place, callback in ordered:
        for other_place, other in ordered:
            end, begin = other.decisions()[1], callback.fixes_at()
            in_steps = other.decides_in_steps()
            turn = math.inf if in_steps else other_place
            if other.technique in callback.follows and (end, turn) > (begin, place):
                when = "a step after the start" if in_steps else f"the start, place {other_place} in the list,"
                raise ValueError(
                    f"{type(other).__name__} must end before {type(callback).__name__} fixes what it changes, got"
                    f" {other.ends} at {when} of epoch {end}, and {callback.begins} at the start, place {place} in the"
                    f" list, of epoch {begin:g}: legal is pruning, then sharing, then frozen observers; at the start of"
                    " an epoch the list of callbacks is the order, and steps come after it"
                )


def check_overlap(callbacks: Sequence[CompressionCallback], pl_module: L.LightningModule) -> None:
    """Refuse two callbacks of one technique that select a weight both: the later one would have no say.

    Raises:
        ValueError: With the names.
    """
    owners: dict[tuple[str, int], CompressionCallback] = {}
    for callback in callbacks:
        network = find_network(pl_module, callback.network)
        for name in callback.selected(network):
            key = callback.technique, id(network.get_parameter(name))
            if key in owners and owners[key] is not callback:
                raise ValueError(
                    f"include must select a weight in one {type(callback).__name__} alone, got {name!r} in two: add"
                    " exclude= to one of them"
                )
            owners[key] = callback


def is_trial(trainer: L.Trainer) -> bool:
    """Return whether this is a ``fast_dev_run``, which never reaches a schedule."""
    return bool(getattr(trainer, "fast_dev_run", False))


def state_tensors(owner: str, saved: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the saved tensors on the devices of the weights that they belong to.

    Raises:
        ValueError: If names or shapes differ: the checkpoint is of another network or another selection.
    """
    wanted = {name: tuple(weight.shape) for name, weight in weights.items()}
    found = {name: tuple(tensor.shape) for name, tensor in saved.items()}
    if wanted != found:
        names = sorted(name for name in wanted.keys() | found.keys() if wanted.get(name) != found.get(name))
        raise ValueError(
            f"{owner} must select the layers that the checkpoint was made with, got a difference at {names[:4]}:"
            " resume with the same include, exclude and network"
        )
    return {name: saved[name].to(weight.device) for name, weight in weights.items()}


def require_float32_weights(trainer: L.Trainer) -> None:
    """Raise before the fit if its weights have another type, which quantizers and runtimes do not take.

    Raises:
        ValueError: With the precisions that fit.
    """
    if str(trainer.precision).endswith("-true") and trainer.precision != "32-true":
        raise ValueError(
            f"precision must keep weights in float32 for quantization, got {trainer.precision!r}: take '32-true',"
            " 'bf16-mixed' or '16-mixed'"
        )


def require_agreement(trainer: L.Trainer, tensors: Iterable[Tensor], *, what: str) -> None:
    """Raise on every rank unless all ranks hold the same bits.

    Raises:
        RuntimeError: If the ranks' SHA-256 sums differ.
    """
    if trainer.world_size == 1:
        return
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    mine = torch.tensor(list(digest.digest()), dtype=torch.uint8, device=trainer.strategy.root_device)
    everyone = trainer.strategy.all_gather(mine)
    if not bool((everyone == mine).all()):
        raise RuntimeError(
            f"{what} must be the same on every rank, got {len(torch.unique(everyone, dim=0))} different ones at epoch"
            f" {trainer.current_epoch}: the ranks' weights have diverged; is every parameter in the strategy's care?"
        )


def stepped(weights: Mapping[str, nn.Parameter], optimizer: Optimizer) -> dict[str, nn.Parameter]:
    """Return the weights with a gradient that an optimizer is about to change."""
    own = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    return {name: weight for name, weight in weights.items() if id(weight) in own and weight.grad is not None}


def callbacks_of(trainer: L.Trainer) -> list[L.Callback]:
    """Return all callbacks of a trainer, in their order; Lightning sets the attribute without declaring it."""
    return list(trainer.callbacks)  # type: ignore[attr-defined]


def averages_of(trainer: L.Trainer) -> list[AveragedModel]:
    """Return the averages that ``WeightAveraging`` callbacks of a trainer keep."""
    averaging = [callback for callback in callbacks_of(trainer) if isinstance(callback, WeightAveraging)]
    return [callback._average_model for callback in averaging if callback._average_model is not None]


def compressing(trainer: L.Trainer) -> list[CompressionCallback]:
    """Return the compression callbacks of a trainer, in their order."""
    return [callback for callback in callbacks_of(trainer) if isinstance(callback, CompressionCallback)]


def _warn_of_early_choices(trainer: L.Trainer) -> None:
    last = max(callback.decisions()[1] for callback in compressing(trainer))
    for callback in callbacks_of(trainer):
        if isinstance(callback, EarlyStopping):
            rank_zero_warn(
                f"EarlyStopping may end the fit before epoch {last}, the last at which the network is compressed."
            )
        if isinstance(callback, ModelCheckpoint) and callback.monitor is not None:
            rank_zero_warn(
                f"ModelCheckpoint(monitor={callback.monitor!r}) may choose an epoch before {last}, the last at which"
                " the network is compressed: its best checkpoint can be a dense one."
            )
