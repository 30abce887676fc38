"""The clock of a schedule: epochs or optimizer steps, and which of its decisions are behind."""

from dataclasses import dataclass

import lightning as L

from lightning_edge.functional.schedules import Schedule, Timeline, find_schedule


@dataclass(frozen=True)
class Clock:
    """A timeline of decisions and the schedule that they follow.

    >>> Clock.of("linear", start_epoch=2, end_epoch=6).progress(3)
    0.25
    """

    timeline: Timeline
    schedule: Schedule

    @classmethod
    def of(
        cls,
        schedule: str | Schedule,
        *,
        start_epoch: int = 0,
        end_epoch: int | None = None,
        start_step: int | None = None,
        end_step: int | None = None,
        every: int = 1,
    ) -> "Clock":
        """Return the clock of a callback's arguments: epochs, or steps where ``start_step`` or ``end_step`` is given.

        Raises:
            ValueError: If epochs and steps are mixed, or a number is out of its range.
        """
        by_step = start_step is not None or end_step is not None
        if by_step and (end_epoch is not None or start_epoch != 0):
            raise ValueError(
                f"start_step and end_step must not be mixed with epochs, got start_epoch={start_epoch} and"
                f" end_epoch={end_epoch} too: give both ends in steps, or both in epochs"
            )
        start, end = (start_step or 0, end_step) if by_step else (start_epoch, end_epoch)
        unit = "step" if by_step else "epoch"
        end = start if end is None else end
        for name, value, least in ((f"start_{unit}", start, 0), (f"end_{unit}", end, start), ("every", every, 1)):
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(
                    f"{name} must be a whole number of at least {least}, got {value!r} (from {start} to {end})"
                )
        return cls(Timeline(start, end, every, "step" if by_step else "epoch"), find_schedule(schedule))

    @property
    def in_steps(self) -> bool:
        """Whether the clock counts optimizer steps."""
        return self.timeline.unit == "step"

    @property
    def count(self) -> int:
        """How many decisions there are."""
        return self.timeline.decision_number(self.timeline.end) + 1

    def now(self, trainer: L.Trainer) -> int:
        """Return the time: the epoch, or the number of optimizer steps so far."""
        return trainer.global_step if self.in_steps else trainer.current_epoch

    def taken_by(self, time: int) -> int:
        """Return how many decisions are taken when ``time`` is over.

        >>> Clock.of("linear", start_epoch=2, end_epoch=6, every=3).taken_by(5)
        2
        """
        return 0 if time < self.timeline.start else self.timeline.decision_number(time + 1)

    def progress(self, time: int) -> float:
        """Return the fraction of the target that is to be reached at ``time``; that of the last decision until then."""
        timeline = self.timeline
        if time < timeline.start:
            return 0.0
        last = timeline.end if time >= timeline.end else time - (time - timeline.start) % timeline.every
        reached = self.schedule(timeline.progress(last))
        if not 0.0 <= reached <= 1.0:
            raise ValueError(f"schedule must stay in [0, 1], got {reached} at {timeline.unit} {last}")
        return reached

    def epochs(self, steps_per_epoch: float) -> tuple[int, int]:
        """Return the epochs of the first and the last decision; 0 where the length of an epoch is not known yet."""
        ends = (self.timeline.start, self.timeline.end)
        first, last = (int(end // steps_per_epoch) for end in ends) if self.in_steps else ends
        return first, last

    def check_steps(self, steps: float) -> None:
        """Raise a ValueError if the last decision, in steps, is not within a fit of so many."""
        if self.in_steps and self.timeline.end >= steps:
            raise ValueError(
                f"end_step must be below the {steps:g} optimizer steps of the fit, got {self.timeline.end}"
            )

    def check_epochs(self, max_epochs: float) -> None:
        """Raise a ValueError if the last decision, in epochs, is not within the fit."""
        if not self.in_steps and self.timeline.end >= max_epochs:
            raise ValueError(f"end_epoch must be below max_epochs={max_epochs:g} (zero-based), got {self.timeline.end}")
