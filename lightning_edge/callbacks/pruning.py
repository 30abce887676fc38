"""Prune weights on a schedule while a network is trained."""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import lightning as L
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_edge.callbacks.base import CompressionCallback, require_agreement, state_tensors
from lightning_edge.functional.pruning import pruned_count
from lightning_edge.functional.schedules import Schedule, find_schedule, progress_at
from lightning_edge.surgery.pruning import Scope, apply_masks_, check_scope, check_sparsity, prune_
from lightning_edge.surgery.selection import find_network, select_weights


class WeightPruning(CompressionCallback):
    """Set the smallest weights to zero, step by step, and keep them there.

    At the start of every epoch from ``start_epoch`` to ``end_epoch`` the schedule says how many weights are zero, and
    the weights of least magnitude become so. After every optimizer step the masks are applied again, so that neither
    momentum nor weight decay revives a weight. The zeros are in the weights themselves: checkpoints stay those of the
    plain network.

    Args:
        sparsity: Final fraction of zeros among the selected weights, in [0, 1); reached exactly, in count.
        start_epoch: Zero-based epoch of the first decision.
        end_epoch: Epoch at whose start the target is reached; the default is ``start_epoch``, one decision.
        schedule: ``"cubic"`` (Zhu and Gupta 2017), ``"linear"``, ``"one_shot"``, or a function from progress in [0, 1]
            to the reached fraction of ``sparsity``.
        scope: ``"global"`` compares all selected weights with each other, ``"layer"`` prunes each layer alike.
        include: Layers to prune, globs over qualified names or class names; default: every linear and convolution.
        exclude: Layers to leave alone.
        network: Dotted path of the network inside the LightningModule; see ``surgery.selection.network_path``.

    Raises:
        ValueError: If an argument is out of its range; at ``setup``, if a pattern matches nothing or ``end_epoch`` lies
            past ``max_epochs``; at the end of the fit, if the target was not reached.

    >>> WeightPruning(sparsity=0.9, start_epoch=0, end_epoch=12).sparsity_at(6)
    0.7875
    """

    technique: ClassVar[str] = "pruning"
    follows: ClassVar[tuple[str, ...]] = ()

    def __init__(
        self,
        sparsity: float,
        *,
        start_epoch: int = 0,
        end_epoch: int | None = None,
        schedule: str | Schedule = "cubic",
        scope: Scope = "global",
        include: Sequence[str] = ("*",),
        exclude: Sequence[str] = (),
        network: str | None = None,
    ) -> None:
        self.sparsity = check_sparsity(sparsity)
        if self.sparsity == 0.0:
            raise ValueError("sparsity must be above 0 for a callback that prunes, got 0: it would change nothing")
        self.start_epoch = start_epoch
        self.end_epoch = start_epoch if end_epoch is None else end_epoch
        if not 0 <= self.start_epoch <= self.end_epoch:
            raise ValueError(f"end_epoch must be at least start_epoch >= 0, got {start_epoch} and {end_epoch}")
        self.schedule = find_schedule(schedule)
        self.scope = check_scope(scope)
        self.include, self.exclude, self.network = tuple(include), tuple(exclude), network
        self.reset()

    @property
    def state_key(self) -> str:
        """Key of the state in a checkpoint: two callbacks for different layers keep apart."""
        return self._generate_state_key(include=self.include, exclude=self.exclude, network=self.network)

    def sparsity_at(self, epoch: int) -> float:
        """Return the fraction of zeros that the schedule asks for at the start of ``epoch``."""
        if epoch < self.start_epoch:
            return 0.0
        return self.sparsity * self.schedule(progress_at(epoch, start=self.start_epoch, end=self.end_epoch))

    def decisions(self) -> tuple[int, int]:
        """Return the first and the last epoch at whose start weights are pruned."""
        return self.start_epoch, self.end_epoch

    def reset(self) -> None:
        """Forget the masks of an earlier fit."""
        super().reset()
        self._masks: dict[str, Tensor] = {}

    def check(self, network: nn.Module, *, max_epochs: float) -> None:
        """Raise unless the patterns match and the schedule ends within the fit."""
        select_weights(network, include=self.include, exclude=self.exclude)
        if self.end_epoch >= max_epochs:
            raise ValueError(f"end_epoch must be below max_epochs={max_epochs:g} (zero-based), got {self.end_epoch}")

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Take the masks of a resumed run, and apply masks after every step of every optimizer."""
        super().on_fit_start(trainer, pl_module)
        if self._masks:
            self._masks = state_tensors("WeightPruning", self._masks, self._weights(pl_module))
        projection = _Projection(self._weights(pl_module))
        self._projection = projection
        projection.masks = self._masks
        for optimizer in trainer.optimizers:
            optimizer.register_step_post_hook(projection)

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Prune what the schedule asks for."""
        if self.start_epoch <= trainer.current_epoch <= self.end_epoch:
            report = prune_(
                find_network(pl_module, self.network),
                sparsity=self.sparsity_at(trainer.current_epoch),
                scope=self.scope,
                include=self.include,
                exclude=self.exclude,
            )
            self._masks = dict(report.masks)
            self._projection.masks = self._masks
            require_agreement(trainer, self._masks.values(), what="the pruning masks")
            for network in self.networks(trainer, pl_module):
                apply_masks_(dict(network.named_parameters()), self._masks)
        if self._masks:
            pl_module.log("pruning/sparsity", self._reached(), on_epoch=True, sync_dist=True)

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Optimizer) -> None:
        """Leave pruned weights out of the norm that gradient clipping takes."""
        if trainer.gradient_clip_val:
            self._projection.mask_gradients()

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Raise if the fit ended before the target."""
        weights = self._weights(pl_module)
        if self._masks:
            # The product of a negative weight and its mask is -0.0, a second zero to every coder.
            apply_masks_(weights, {name: mask.to(weights[name].device) for name, mask in self._masks.items()})
        if self._reached() != self._final() and self.must_be_done(trainer):
            raise ValueError(
                f"WeightPruning must reach sparsity {self.sparsity} at epoch {self.end_epoch}, got"
                f" {self._reached():.4f} when the fit ended at epoch {trainer.current_epoch}: train for more epochs or"
                " end the schedule earlier"
            )

    def state_dict(self) -> dict[str, Any]:
        """Return the masks."""
        return {"masks": {name: mask.clone() for name, mask in self._masks.items()}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take the masks over."""
        super().load_state_dict(state_dict)
        self._masks = dict(state_dict["masks"])

    def _weights(self, pl_module: L.LightningModule) -> dict[str, nn.Parameter]:
        return select_weights(find_network(pl_module, self.network), include=self.include, exclude=self.exclude)

    def _reached(self) -> float:
        size = sum(mask.numel() for mask in self._masks.values())
        return 1.0 - sum(int(mask.sum()) for mask in self._masks.values()) / size if size else 0.0

    def _final(self) -> float:
        sizes = [mask.numel() for mask in self._masks.values()]
        if not sizes:
            return self.sparsity
        zeros = pruned_count(sum(sizes), self.sparsity)
        if self.scope == "layer":
            zeros = sum(pruned_count(size, self.sparsity) for size in sizes)
        return 1.0 - (sum(sizes) - zeros) / sum(sizes)


class _Projection:
    """Sets pruned weights to zero after a step: one fused product over all of them."""

    def __init__(self, weights: Mapping[str, nn.Parameter]) -> None:
        self._weights = weights
        self._factors: list[Tensor] = []
        self._chosen: list[Tensor] = []

    def _set_masks(self, masks: Mapping[str, Tensor]) -> None:
        self._chosen = [self._weights[name] for name in masks]
        # Factors of the weights' own type: a product with them is four times as fast as one with booleans.
        self._factors = [mask.to(self._weights[name].dtype) for name, mask in masks.items()]

    masks = property(None, _set_masks)

    @torch.no_grad()
    def __call__(self, *_: Any) -> None:
        if self._factors:
            torch._foreach_mul_(self._chosen, self._factors)

    @torch.no_grad()
    def mask_gradients(self) -> None:
        pairs = [(w.grad, f) for w, f in zip(self._chosen, self._factors, strict=True) if w.grad is not None]
        if pairs:
            torch._foreach_mul_([grad for grad, _ in pairs], [factor for _, factor in pairs])
