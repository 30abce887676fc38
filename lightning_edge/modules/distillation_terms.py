"""One thing that a student learns from its teacher: which loss, on which layers, how much, and when."""

import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

from torch import Tensor

from lightning_edge.functional.distillation import (
    attention_loss,
    contrastive_loss,
    cosine_loss,
    decoupled_loss,
    hint_loss,
    relational_loss,
    similarity_loss,
    soft_target_loss,
    squared_loss,
)
from lightning_edge.functional.schedules import Schedule, find_schedule, progress_at

Loss = Callable[..., Tensor]

LOSSES: dict[str, Loss] = {
    "soft_targets": soft_target_loss,
    "decoupled": decoupled_loss,
    "hint": hint_loss,
    "attention": attention_loss,
    "similarity": similarity_loss,
    "relational": relational_loss,
    "contrastive": contrastive_loss,
    "squared": squared_loss,
    "cosine": cosine_loss,
}
TASK = "task"
"""How the student's own loss is called beside the terms."""

_NUMBERS = {"weight": False, "end_weight": True, "temperature": True, "start_epoch": False, "end_epoch": True}
"""Whether each may be None."""

_SAME_SHAPE = (hint_loss, squared_loss, cosine_loss)
_PROJECTED = (contrastive_loss,)


@dataclass(frozen=True)
class DistillationTerm:
    """A term of a student's loss: its weight times a loss between what the student gives and what its teacher gives.

    Args:
        loss: A name of :data:`LOSSES`, or a callable ``(student, teacher)`` of tensors that returns a scalar; one
            with a parameter ``labels`` gets these too.
        weight: Factor of the loss, >= 0.
        layers: Layers of the student to layers of the teacher, names or globs, see ``match_layers``; the loss is the
            mean over the pairs. Default: the outputs of the networks.
        temperature: Of the losses that have one; default: the loss's own.
        end_weight: Weight from ``end_epoch`` on; default: it stays.
        start_epoch: Zero-based epoch up to which the weight is ``weight``.
        end_epoch: Epoch from which it is ``end_weight``; default: the last of the fit.
        schedule: The way between them, see ``functional.schedules``.

    Raises:
        ValueError: If an argument is out of its range.

    >>> DistillationTerm("hint", weight=0.0, end_weight=3.0, layers={"layer3": "layer3"}).weight_at(5, last_epoch=10)
    1.5
    """

    loss: str | Loss = "soft_targets"
    weight: float = 1.0
    layers: Mapping[str, str] | None = None
    temperature: float | None = None
    end_weight: float | None = None
    start_epoch: float = 0.0
    end_epoch: float | None = None
    schedule: str | Schedule = "linear"

    def __post_init__(self) -> None:
        if not callable(self.loss) and self.loss not in LOSSES:
            raise ValueError(f"loss must be one of {sorted(LOSSES)} or a callable, got {self.loss!r}")
        self._check_numbers()
        if not self.weight and not self.end_weight:
            raise ValueError(f"weight must be positive, got {self.weight}: without end_weight the term does nothing")
        if self.temperature is not None and "temperature" not in self._parameters:
            raise ValueError(
                f"temperature must be left out for the loss {self.loss!r}, which has none, got {self.temperature}"
            )
        if self.layers is not None and not isinstance(self.layers, Mapping):
            raise ValueError(
                f"layers must be layers of the student to layers of the teacher, got {self.layers!r}: write"
                ' {"layer3": "layer3"}'
            )
        if self.layers is not None and not self.layers:
            raise ValueError("layers must name at least one pair of layers, got none: leave it out for the outputs")
        object.__setattr__(self, "schedule", find_schedule(self.schedule))  # looked up, and tried, once

    def _check_numbers(self) -> None:
        for name, may_be_none in _NUMBERS.items():
            value = getattr(self, name)
            is_number = isinstance(value, int | float) and 0 <= value < math.inf
            if not is_number and not (value is None and may_be_none):
                raise ValueError(f"{name} must be a finite number >= 0, got {value!r}")
        if self.temperature == 0:
            raise ValueError(f"temperature must be positive, got {self.temperature}")
        if self.end_weight is None and (self.start_epoch or self.end_epoch is not None):
            raise ValueError(
                f"end_weight must be given with start_epoch={self.start_epoch} or end_epoch={self.end_epoch}, got None:"
                " the weight has nowhere to go"
            )
        if self.end_epoch is not None and self.end_epoch <= self.start_epoch:
            raise ValueError(f"end_epoch must be above start_epoch={self.start_epoch}, got {self.end_epoch}")

    @property
    def function(self) -> Loss:
        """The loss with its temperature."""
        function = LOSSES[self.loss] if isinstance(self.loss, str) else self.loss
        return function if self.temperature is None else partial(function, temperature=self.temperature)

    @property
    def needs_labels(self) -> bool:
        """Whether the loss takes the labels of the batch."""
        return "labels" in self._parameters

    @property
    def needs_same_shape(self) -> bool:
        """Whether features of different sizes need an adapter."""
        return self._bare in _SAME_SHAPE

    @property
    def needs_projections(self) -> bool:
        """Whether both sides are projected to one embedding."""
        return self._bare in _PROJECTED

    def check(self, *, epochs: float) -> None:
        """Raise a ValueError if the weight does not reach ``end_weight`` within a fit of so many epochs."""
        if self.end_weight is None:
            return
        if self.end_epoch is None and epochs == math.inf:
            raise ValueError("end_epoch must be given for an end_weight in a fit without max_epochs and max_steps")
        for name, epoch in (("start_epoch", self.start_epoch), ("end_epoch", self.end_epoch)):
            if epoch is not None and epoch >= epochs:
                raise ValueError(f"{name} must be below the {epochs:g} epochs of the fit (zero-based), got {epoch}")
        if self.end_epoch is None and self.start_epoch >= epochs - 1:
            raise ValueError(
                f"start_epoch must leave an epoch for end_weight={self.end_weight}, got {self.start_epoch} in a fit of"
                f" {epochs:g} epochs (zero-based)"
            )

    def weight_at(self, epoch: float, *, last_epoch: float) -> float:
        """Return the weight at an epoch (zero-based).

        Args:
            epoch: May lie between two whole epochs.
            last_epoch: The last one of the fit: where ``end_weight`` is reached without an ``end_epoch``.
        """
        if self.end_weight is None:
            return self.weight
        if epoch <= self.start_epoch:
            return self.weight
        done = progress_at(epoch, start=self.start_epoch, end=last_epoch if self.end_epoch is None else self.end_epoch)
        assert callable(self.schedule)
        return self.weight + (self.end_weight - self.weight) * self.schedule(done)

    @property
    def _bare(self) -> object:
        function = self.function
        while isinstance(function, partial):
            function = function.func
        return function

    @property
    def _parameters(self) -> Mapping[str, inspect.Parameter]:
        function = LOSSES[self.loss] if isinstance(self.loss, str) else self.loss
        return inspect.signature(function).parameters


def checked_terms(losses: Mapping[str, DistillationTerm]) -> dict[str, DistillationTerm]:
    """Return the terms of a student's loss by their names.

    Raises:
        ValueError: If they are no terms by name, there is none, or a name is taken or cannot be logged.

    >>> list(checked_terms({"soft": DistillationTerm()}))
    ['soft']
    """
    example = '{"soft": DistillationTerm("soft_targets")}'
    if not isinstance(losses, Mapping):
        raise ValueError(f"losses must be terms by name, got a {type(losses).__name__}: write {example}")
    if not losses:
        raise ValueError("losses must hold at least one term, got none: leave it out for soft targets")
    for name, term in losses.items():
        if not isinstance(term, DistillationTerm):
            raise ValueError(f"losses[{name!r}] must be a DistillationTerm, got {term!r}: write {example}")
        if not isinstance(name, str) or name == TASK or not name or "." in name:
            raise ValueError(
                f"losses must have names without dots, other than {TASK!r}, the student's own loss, got {name!r}"
            )
    return dict(losses)
