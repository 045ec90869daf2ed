"""Latency, failures and downtime by themselves."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from oracle_server.policy.downtime import remaining
from oracle_server.policy.failures import Failures
from oracle_server.policy.latency import Latency
from oracle_server.policy.spec import DowntimeSpec, FailureSpec, LatencySpec


def delays(spec: LatencySpec, rows: int = 0) -> np.ndarray:
    latency = Latency(spec, np.random.default_rng(5))
    return np.array([latency.seconds(rows) for _ in range(2000)])


def test_a_latency_is_fixed_by_the_row_and_by_chance() -> None:
    assert set(delays(LatencySpec(), rows=9)) == {0.0}
    assert set(delays(LatencySpec(milliseconds=20, per_row_microseconds=50), rows=100)) == {0.025}
    uniform = delays(LatencySpec(milliseconds=20, jitter_milliseconds=10))
    assert stats.kstest((uniform - 0.02) / 0.01, "uniform").pvalue > 0.01
    half = delays(LatencySpec(milliseconds=20, jitter_milliseconds=10, distribution="half-normal"))
    assert stats.kstest((half - 0.02) / 0.01, "halfnorm").pvalue > 0.01
    assert (half >= 0.02).all()


@pytest.mark.parametrize("probability", [0.0, 0.1, 1.0])
def test_failures_come_as_often_as_they_should(probability: float) -> None:
    failures = Failures(FailureSpec(unavailable=probability), np.random.default_rng(5))
    count = sum(failures.unavailable() for _ in range(5000))
    assert stats.binomtest(count, 5000, probability).pvalue > 0.01
    assert not any(failures.internal() for _ in range(100))
    assert Failures(FailureSpec(internal=1.0), np.random.default_rng(5)).internal()


# Whole seconds, so that the test's own way, second by second, is exact.
window = st.builds(
    lambda after, seconds, pause: DowntimeSpec(
        after=float(after), seconds=float(seconds), every=None if pause is None else float(seconds + pause)
    ),
    st.integers(0, 50),
    st.integers(1, 20),
    st.none() | st.integers(1, 30),
)


def is_down(windows: list[DowntimeSpec], second: int) -> bool:
    """Whether the second that begins then lies in a window."""
    for w in windows:
        starts = [w.after] if w.every is None else np.arange(w.after, second + 1, w.every)
        if any(start <= second < start + w.seconds for start in starts):
            return True
    return False


@given(st.lists(window, max_size=3), st.integers(0, 120))
def test_a_downtime_lasts_as_long_as_any_window(windows: list[DowntimeSpec], now: int) -> None:
    end = now
    while is_down(windows, end) and end < now + 400:
        end += 1
    told = remaining(windows, float(now))
    assert told == end - now or (end == now + 400 and told >= 400)


def test_windows_that_never_leave_a_gap_have_an_answer_all_the_same() -> None:
    endless = [DowntimeSpec(after=0, seconds=6, every=10), DowntimeSpec(after=5, seconds=6, every=10)]
    assert 100 < remaining(endless, 3.0) < 1e6
