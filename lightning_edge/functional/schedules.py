"""How fast a target is approached: functions from progress in [0, 1] to the fraction of the target reached."""

from collections.abc import Callable, Mapping
from types import MappingProxyType

Schedule = Callable[[float], float]


def one_shot(progress: float) -> float:
    """Return 1 at any progress: the whole target at the first decision.

    >>> one_shot(0.0)
    1.0
    """
    return 1.0


def linear(progress: float) -> float:
    """Return ``progress``: equal steps.

    >>> linear(0.25)
    0.25
    """
    return progress


def cubic(progress: float) -> float:
    """Return 1 - (1 - progress)^3: fast while weights are plenty, slow near the target.

    Zhu and Gupta 2017 (arXiv:1710.01878), equation 1 with an initial sparsity of zero.

    >>> cubic(0.5)
    0.875
    """
    return 1.0 - (1.0 - progress) ** 3


SCHEDULES: Mapping[str, Schedule] = MappingProxyType({"one_shot": one_shot, "linear": linear, "cubic": cubic})


def find_schedule(schedule: str | Schedule) -> Schedule:
    """Return the schedule of that name, or the callable itself.

    Raises:
        ValueError: If the name is unknown, or a callable does not end at 1.

    >>> find_schedule("cubic") is cubic
    True
    """
    if isinstance(schedule, str):
        if schedule not in SCHEDULES:
            raise ValueError(f"schedule must be one of {sorted(SCHEDULES)} or a callable, got {schedule!r}")
        return SCHEDULES[schedule]
    if schedule(1.0) != 1.0:
        raise ValueError(f"schedule must return 1.0 at progress 1.0, got {schedule(1.0)}: the target would be missed")
    return schedule


def progress_at(time: float, *, start: float, end: float) -> float:
    """Return how much of the way from ``start`` to ``end`` is behind ``time``, clamped to [0, 1].

    >>> progress_at(3, start=2, end=6)
    0.25
    """
    if time >= end:
        return 1.0
    return max(0.0, (time - start) / (end - start))
