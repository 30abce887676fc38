"""When and how fast a target is approached: functions from progress in [0, 1] to the fraction of it reached."""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from types import MappingProxyType
from typing import Literal

Schedule = Callable[[float], float]
Unit = Literal["epoch", "step"]
_SAMPLES = 100


def _portions(name: str, values: Iterable[float]) -> tuple[float, ...]:
    """Return the numbers as a tuple if there are any, all in [0, 1] and none smaller than the one before."""
    portions = tuple(float(value) for value in values)
    if not portions or not all(a <= b for a, b in pairwise((0.0, *portions, 1.0))):
        raise ValueError(f"{name} must be numbers in [0, 1], none smaller than the one before, got {portions}")
    return portions


def _check_fraction(name: str, value: float) -> None:
    """Refuse what can only be an epoch or a step, and say how to write it."""
    if value > 1.0:
        raise ValueError(
            f"{name} must be fractions of the way from start to end, in [0, 1], got {value:g}: write an epoch or a step"
            f" as (time - start) / (end - start), for example {value:g} of a schedule from 0 to {2 * value:g} as 0.5"
        )


def _check_initial(initial: float) -> None:
    if not 0.0 <= initial < 1.0:
        raise ValueError(f"initial must lie in [0, 1), the fraction of the target at the start, got {initial}")


def _above(initial: float, portion: float) -> float:
    """Return where ``portion`` of the way from ``initial`` to 1 ends."""
    return initial + (1.0 - initial) * portion


@dataclass(frozen=True)
class OneShot:
    """The whole target at the first decision.

    >>> OneShot()(0.0)
    1.0
    """

    def __call__(self, progress: float) -> float:
        """Return 1 at any progress."""
        return 1.0


@dataclass(frozen=True)
class Linear:
    """Equal steps.

    Args:
        initial: Fraction of the target that the first decision brings, in [0, 1).

    Raises:
        ValueError: If ``initial`` is out of its range.

    >>> Linear()(0.25), Linear(initial=0.5)(0.25)
    (0.25, 0.625)
    """

    initial: float = 0.0

    def __post_init__(self) -> None:
        _check_initial(self.initial)

    def __call__(self, progress: float) -> float:
        """Return initial + (1 - initial) progress."""
        return _above(self.initial, progress)


@dataclass(frozen=True)
class Cubic:
    """Fast while weights are plenty, slow near the target.

    Zhu and Gupta 2017 (arXiv:1710.01878), equation 1. Their initial sparsity s_i is absolute; here it is a fraction of
    the target, as everything that a schedule says: ``Cubic(initial=s_i / s_f)``.

    Args:
        initial: Fraction of the target that the first decision brings, in [0, 1).

    Raises:
        ValueError: If ``initial`` is out of its range.

    >>> Cubic()(0.5)
    0.875
    """

    initial: float = 0.0

    def __post_init__(self) -> None:
        _check_initial(self.initial)

    def __call__(self, progress: float) -> float:
        """Return 1 - (1 - initial) (1 - progress)^3."""
        return _above(self.initial, 1.0 - (1.0 - progress) ** 3)


@dataclass(frozen=True)
class Exponential:
    """The distance to the target decays exponentially.

    Args:
        steepness: How many times smaller by a factor of e the distance gets, above 0; near 0 the schedule is linear.
        initial: Fraction of the target that the first decision brings, in [0, 1).

    Raises:
        ValueError: If ``steepness`` is not a positive, finite number, or ``initial`` is out of its range.

    >>> round(Exponential()(0.5), 3)
    0.924
    """

    steepness: float = 5.0
    initial: float = 0.0

    def __post_init__(self) -> None:
        _check_initial(self.initial)
        if not 0.0 < self.steepness < math.inf:
            raise ValueError(f"steepness must be a finite number above 0, got {self.steepness}")

    def __call__(self, progress: float) -> float:
        """Return initial + (1 - initial) (1 - exp(-steepness progress)) / (1 - exp(-steepness))."""
        return _above(self.initial, math.expm1(-self.steepness * progress) / math.expm1(-self.steepness))


@dataclass(frozen=True)
class Cosine:
    """Slow at both ends, fastest half way.

    Args:
        initial: Fraction of the target that the first decision brings, in [0, 1).

    Raises:
        ValueError: If ``initial`` is out of its range.

    >>> round(Cosine()(0.25), 3)
    0.146
    """

    initial: float = 0.0

    def __post_init__(self) -> None:
        _check_initial(self.initial)

    def __call__(self, progress: float) -> float:
        """Return initial + (1 - initial) (1 - cos(pi progress)) / 2."""
        return _above(self.initial, (1.0 - math.cos(math.pi * progress)) / 2.0)


@dataclass(frozen=True)
class MultiStep:
    """Stairs: each milestone brings a fraction of the target, and nothing happens in between.

    Args:
        milestones: Progress in [0, 1] from which on the fraction of the same index is reached, rising; epoch 12 of a
            schedule from epoch 2 to 22 is (12 - 2) / (22 - 2) = 0.5.
        fractions: Fractions of the target in [0, 1], never falling, the last one 1. Before the first milestone it is 0.

    Raises:
        ValueError: If the two differ in length, are empty, out of range or out of order, or the target is missed.

    >>> MultiStep(milestones=(0.0, 0.5), fractions=(0.5, 1.0))(0.49)
    0.5
    """

    milestones: tuple[float, ...] = (0.0, 1 / 3, 2 / 3, 1.0)
    fractions: tuple[float, ...] = (0.4, 0.7, 0.9, 1.0)

    def __post_init__(self) -> None:
        # Lists, as a YAML file gives them, would make the schedule unhashable.
        _check_fraction("milestones", max(self.milestones, default=0.0))
        object.__setattr__(self, "milestones", _portions("milestones", self.milestones))
        object.__setattr__(self, "fractions", _portions("fractions", self.fractions))
        if len(self.milestones) != len(self.fractions):
            raise ValueError(
                f"fractions must be as many as milestones ({len(self.milestones)}), got {len(self.fractions)}"
            )
        if len(set(self.milestones)) != len(self.milestones):
            raise ValueError(f"milestones must differ from each other, got {self.milestones}")
        if self.fractions[-1] != 1.0:
            raise ValueError(f"fractions must end at 1.0, got {self.fractions}: the target would be missed")

    def __call__(self, progress: float) -> float:
        """Return the fraction of the last milestone that ``progress`` has reached."""
        reached = 0.0
        for milestone, fraction in zip(self.milestones, self.fractions, strict=True):
            if progress >= milestone:
                reached = fraction
        return reached


@dataclass(frozen=True)
class Ramp:
    """A constant level first, then equal steps to the target.

    Args:
        hold: Progress in [0, 1) until which the level is held, as the milestones of :class:`MultiStep`.
        level: Fraction of the target in [0, 1] that is held.

    Raises:
        ValueError: If an argument is out of its range.

    >>> Ramp(hold=0.5, level=0.25)(0.75)
    0.625
    """

    hold: float = 0.5
    level: float = 0.0

    def __post_init__(self) -> None:
        _check_fraction("hold", self.hold)
        if not 0.0 <= self.hold < 1.0:
            raise ValueError(f"hold must lie in [0, 1), got {self.hold}: at 1 nothing is left of the ramp")
        if not 0.0 <= self.level <= 1.0:
            raise ValueError(f"level must lie in [0, 1], got {self.level}")

    def __call__(self, progress: float) -> float:
        """Return ``level`` until ``hold``, then the straight line to 1."""
        ramp = max(0.0, (progress - self.hold) / (1.0 - self.hold))
        return self.level + (1.0 - self.level) * ramp


SCHEDULES: Mapping[str, Schedule] = MappingProxyType(
    {
        "one_shot": OneShot(),
        "linear": Linear(),
        "cubic": Cubic(),
        "exponential": Exponential(),
        "cosine": Cosine(),
        "multi_step": MultiStep(),
        "ramp": Ramp(),
    }
)


def find_schedule(schedule: str | Schedule) -> Schedule:
    """Return the schedule of that name, or the callable itself.

    Raises:
        ValueError: If the name is unknown, or a callable leaves [0, 1] or does not end at 1; it is tried at 101 points.

    >>> find_schedule("cubic")
    Cubic(initial=0.0)
    """
    if isinstance(schedule, str) and schedule in SCHEDULES:
        return SCHEDULES[schedule]
    if isinstance(schedule, str) or not callable(schedule):
        raise ValueError(f"schedule must be one of {sorted(SCHEDULES)} or a callable, got {schedule!r}")
    if isinstance(schedule, type):
        raise ValueError(f"schedule must be an object, got the class: write {schedule.__name__}()")
    for step in range(_SAMPLES + 1):
        value = schedule(step / _SAMPLES)
        if not 0.0 <= value <= 1.0:
            raise ValueError(f"schedule must stay in [0, 1], got {value} at progress {step / _SAMPLES}")
    if schedule(1.0) != 1.0:
        raise ValueError(f"schedule must return 1.0 at progress 1.0, got {schedule(1.0)}: the target would be missed")
    return schedule


def epochs_of_fit(max_epochs: int | None, max_steps: int, *, batches: float, each: int) -> float:
    """Return how many epochs a fit will have: ``max_epochs``, or fewer where ``max_steps`` ends it.

    Args:
        max_epochs: None and -1 stand for no limit.
        max_steps: -1 stands for no limit.
        batches: Of an epoch; infinite where that is not known.
        each: So many batches make a step.

    >>> epochs_of_fit(9, 17, batches=8, each=1)
    3
    """
    by_epochs = math.inf if max_epochs in (None, -1) else float(max_epochs or 0)
    if max_steps == -1 or batches == math.inf:
        return by_epochs
    return min(by_epochs, math.ceil(max_steps / math.ceil(batches / each)))


def progress_at(time: float, *, start: float, end: float) -> float:
    """Return how much of the way from ``start`` to ``end`` is behind ``time``, clamped to [0, 1].

    >>> progress_at(3, start=2, end=6)
    0.25
    """
    if time >= end:
        return 1.0
    return (time - start) / (end - start) if time > start else 0.0


@dataclass(frozen=True)
class Timeline:
    """When decisions are taken: at ``start``, every ``every`` units after it, and in any case at ``end``.

    Args:
        start: Zero-based epoch or optimizer step of the first decision.
        end: That of the last decision, where the target is reached.
        every: Distance between two decisions, at least 1.
        unit: What the numbers count, ``"epoch"`` or ``"step"`` (optimizer steps).

    Raises:
        ValueError: Unless 0 <= start <= end and every >= 1, whole numbers, and the unit is known.

    >>> [time for time in range(9) if Timeline(start=2, end=7, every=2).due(time)]
    [2, 4, 6, 7]
    """

    start: int
    end: int
    every: int = 1
    unit: Unit = "epoch"

    def __post_init__(self) -> None:
        for name, value, least in (("start", self.start, 0), ("end", self.end, self.start), ("every", self.every, 1)):
            if not isinstance(value, int) or value < least:
                raise ValueError(f"{name} must be a whole number of at least {least}, got {value!r}, in {self}")
        if self.unit not in ("epoch", "step"):
            raise ValueError(f"unit must be 'epoch' or 'step', got {self.unit!r}")

    def due(self, time: int) -> bool:
        """Return whether a decision is taken at ``time``."""
        return time == self.end or (self.start <= time < self.end and (time - self.start) % self.every == 0)

    def progress(self, time: int) -> float:
        """Return how much of the way is behind ``time``, in [0, 1]."""
        return progress_at(time, start=self.start, end=self.end)

    def decision_number(self, time: int) -> int:
        """Return how many decisions lie before ``time``: the number of the decision at ``time``, counted from 0.

        It depends on the time alone, so a generator seeded with it draws the same numbers in a resumed run.
        """
        if time > self.end:
            return self.decision_number(self.end) + 1
        return max(0, math.ceil((time - self.start) / self.every))
