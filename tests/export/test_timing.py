import itertools
import math
import time

import numpy as np
import pytest

from lightning_edge.export import timing
from lightning_edge.export.timing import Latency, ratio, time_sessions


class FakeClock:
    """Time that passes only when a session says so."""

    def __init__(self, monkeypatch):
        self.ns = 0
        monkeypatch.setattr(timing.time, "perf_counter_ns", lambda: self.ns)
        monkeypatch.setattr(timing.time, "perf_counter", lambda: self.ns / 1e9)


class FakeSession:
    threads, runtime = 2, "fake"

    def __init__(self, clock, milliseconds, log=None, name=""):
        self.clock, self.milliseconds, self.log, self.name = clock, itertools.cycle(milliseconds), log, name

    def __call__(self, *arrays):
        self.clock.ns += int(next(self.milliseconds) * 1e6)
        if self.log is not None:
            self.log.append((self.name, arrays))


@pytest.fixture
def clock(monkeypatch):
    return FakeClock(monkeypatch)


def test_percentiles_are_those_of_all_counted_calls(clock):
    session = FakeSession(clock, [1, 2, 3, 4, 5])
    found = time_sessions({"a": session}, (), warmup=5, blocks=4, calls_per_block=5)["a"]
    assert (found.p50_ms, found.calls, found.threads, found.runtime) == (3.0, 20, 2, "fake")
    assert found.p95_ms == pytest.approx(np.percentile([1, 2, 3, 4, 5] * 4, 95))
    assert found.block_ms == (3.0,) * 4


def test_sessions_take_turns_and_every_second_block_is_reversed(clock):
    log = []
    sessions = {name: FakeSession(clock, [1], log, name) for name in "ab"}
    array = np.zeros(3)
    time_sessions(sessions, (array,), warmup=1, blocks=3, calls_per_block=2)
    assert "".join(name for name, _ in log) == "ab" + "aabb" + "bbaa" + "aabb"
    assert all(arrays[0] is array for _, arrays in log)


def test_drift_cancels_in_the_ratio(clock):
    class Drifting(FakeSession):
        def __call__(self, *arrays):
            slowness = 1 + self.clock.ns / 1e9
            self.clock.ns += int(next(self.milliseconds) * slowness * 1e6)

    sessions = {"slow": Drifting(clock, [2]), "fast": Drifting(clock, [1])}
    found = time_sessions(sessions, (), blocks=20, calls_per_block=10)
    assert found["fast"].block_ms[-1] > 1.5 * found["fast"].block_ms[0]
    compared = ratio(found["fast"], found["slow"])
    assert compared.median == pytest.approx(2.0, rel=0.02)
    assert compared.low <= 2.0 <= compared.high


def test_fewer_calls_are_made_when_the_time_would_not_suffice(clock):
    found = time_sessions({"a": FakeSession(clock, [10])}, (), warmup=1, blocks=10, calls_per_block=100, seconds=1.0)
    assert 0.5 < clock.ns / 1e9 <= 1.1
    assert found["a"].calls == 90


def test_a_session_slower_than_the_time_allowed_is_still_timed(clock):
    found = time_sessions({"a": FakeSession(clock, [5000]), "b": FakeSession(clock, [1])}, (), seconds=1.0)
    assert (found["a"].calls, found["a"].p50_ms) == (1, 5000.0)
    assert found["b"].calls == 1


def test_real_time_is_measured_in_milliseconds():
    class Sleeping:
        threads, runtime = 1, "sleep"

        def __call__(self, *arrays):
            time.sleep(0.005)

    found = time_sessions({"a": Sleeping()}, (), warmup=1, blocks=3, calls_per_block=3)["a"]
    assert 5.0 <= found.p50_ms < 100.0


def latency(*block_ms):
    return Latency(1.0, 1.0, len(block_ms), 1, "any", block_ms)


@pytest.mark.parametrize("n", [1, 2, 5, 6, 8, 9, 20, 51])
def test_the_interval_is_the_narrowest_of_order_statistics_that_holds_the_median(n):
    compared = ratio(latency(*[1.0] * n), latency(*range(1, n + 1)))
    assert compared.median == (n + 1) / 2

    def coverage(skipped):
        return 1 - 2 * sum(math.comb(n, k) for k in range(skipped + 1)) / 2**n

    skipped = int(compared.low) - 1
    assert compared.high == n - skipped
    assert skipped == max([k for k in range(n // 2) if coverage(k) >= 0.95], default=0)


def test_latencies_that_were_not_timed_together_are_not_compared():
    with pytest.raises(ValueError, match="other must have 2 blocks like reference, got 1"):
        ratio(latency(1.0, 2.0), latency(1.0))


@pytest.mark.parametrize("options", [{"warmup": 0}, {"blocks": 0}, {"calls_per_block": 0}, {"seconds": 0.0}])
def test_a_bad_option_is_refused(options, clock):
    with pytest.raises(ValueError, match=f"{next(iter(options))} must be"):
        time_sessions({"a": FakeSession(clock, [1])}, (), **options)
