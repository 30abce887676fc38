"""Latency of several sessions, measured side by side."""

import math
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle, islice
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray


class Session(Protocol):
    """What is timed: arrays in, array or tuple out."""

    @property
    def threads(self) -> int:
        """How many threads the runtime uses."""

    @property
    def runtime(self) -> str:
        """Name of the runtime."""

    def __call__(self, *arrays: NDArray[Any]) -> Any:
        """Run one inference."""


@dataclass(frozen=True)
class Latency:
    """Milliseconds of one call, over ``calls`` calls; ``block_ms`` holds the median of every block of calls."""

    p50_ms: float
    p95_ms: float
    calls: int
    threads: int
    runtime: str
    block_ms: tuple[float, ...]


@dataclass(frozen=True)
class LatencyRatio:
    """How many times as long one session takes as another, with a 95 % interval."""

    median: float
    low: float
    high: float


def time_sessions(
    sessions: Mapping[str, Session],
    example_inputs: Sequence[NDArray[Any]],
    *,
    warmup: int = 10,
    blocks: int = 20,
    calls_per_block: int = 50,
    seconds: float = 20.0,
) -> dict[str, Latency]:
    """Time every session on the same inputs, in blocks of calls that take turns.

    A machine's clock and load drift; sessions timed one after the other would be compared under different conditions.
    Here each block times all of them, every second one in reverse order, and :func:`ratio` compares within a block.

    Args:
        sessions: Name to session.
        example_inputs: The arrays of one call.
        warmup: Calls of each session that are not counted, at least 1.
        blocks: How often the sessions take turns, at least 1.
        calls_per_block: Calls of a session in its turn, at least 1; fewer when ``seconds`` would not suffice.
        seconds: About how long it all may take. Each session gets at least one block of one call.

    Raises:
        ValueError: If there is no session or a number is out of its range.

    >>> time_sessions({}, ())
    Traceback (most recent call last):
    ValueError: sessions must hold at least one session, got none
    """
    if not sessions:
        raise ValueError("sessions must hold at least one session, got none")
    for name, number in (("warmup", warmup), ("blocks", blocks), ("calls_per_block", calls_per_block)):
        if number < 1:
            raise ValueError(f"{name} must be at least 1, got {number}")
    if seconds <= 0:
        raise ValueError(f"seconds must be above 0, got {seconds}")
    deadline = time.perf_counter() + seconds
    # One round of calls, by the fastest warm call: the first ones also allocate and compile.
    round_ms = sum(min(_call_ms(session, example_inputs, warmup, deadline)) for session in sessions.values())
    affordable = int((deadline - time.perf_counter()) * 1e3 / (blocks * max(round_ms, 1e-6)))
    calls = max(1, min(calls_per_block, affordable))
    taken: dict[str, list[list[float]]] = {name: [] for name in sessions}
    for order in islice(cycle((list(sessions), list(sessions)[::-1])), blocks):
        for name in order:
            taken[name].append(_call_ms(sessions[name], example_inputs, calls, math.inf))
        if time.perf_counter() > deadline:
            break
    return {name: _latency(session, taken[name]) for name, session in sessions.items()}


def ratio(reference: Latency, other: Latency) -> LatencyRatio:
    """Return how many times as long ``other`` takes as ``reference``: the median over the blocks that both ran in.

    The interval is that of order statistics: it needs no assumption on the distribution. With fewer than six blocks no
    95 % interval exists, and it is the whole range.

    Args:
        reference: From the same call of :func:`time_sessions`.
        other: From the same call of :func:`time_sessions`.

    Raises:
        ValueError: If the two were not timed together.

    >>> one = Latency(1.0, 1.0, 2, 1, "a", (1.0, 1.0))
    >>> ratio(one, Latency(2.0, 2.0, 2, 1, "b", (2.0, 3.0)))
    LatencyRatio(median=2.5, low=2.0, high=3.0)
    """
    n = len(reference.block_ms)
    if n != len(other.block_ms):
        raise ValueError(f"other must have {n} blocks like reference, got {len(other.block_ms)}: time them together")
    ratios = sorted(b / a for a, b in zip(reference.block_ms, other.block_ms, strict=True))
    skipped = _median_interval_rank(n)
    return LatencyRatio(statistics.median(ratios), ratios[skipped], ratios[n - 1 - skipped])


def _median_interval_rank(n: int) -> int:
    """Return how many of ``n`` sorted values to leave out at each end for a 95 % interval of their median."""
    tail, rank = 0.0, 0
    for k in range(n // 2):
        tail += math.comb(n, k) / 2**n
        if tail > 0.025:
            break
        rank = k
    return rank


def _call_ms(session: Session, inputs: Sequence[NDArray[Any]], calls: int, deadline: float) -> list[float]:
    taken = []
    for _ in range(calls):
        start = time.perf_counter_ns()
        session(*inputs)
        taken.append((time.perf_counter_ns() - start) / 1e6)
        if time.perf_counter() > deadline:
            break
    return taken


def _latency(session: Session, blocks: Sequence[Sequence[float]]) -> Latency:
    every = np.concatenate([np.asarray(block) for block in blocks])
    p50, p95 = np.percentile(every, [50, 95])
    medians = tuple(statistics.median(block) for block in blocks)
    return Latency(float(p50), float(p95), len(every), session.threads, session.runtime, medians)
