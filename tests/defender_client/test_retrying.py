"""How long a request is kept at, in time that passes only while it waits."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import httpx
import pytest
from defender_support import FakeTime
from rich.console import Console

from defender_client import progress
from defender_client.oracle_client.retrying import Retrier
from shared.wire import protocol
from shared.wire.errors import RateLimited, Unavailable

Step = httpx.Response | httpx.TransportError


def answer(status: int = 200, **headers: str) -> httpx.Response:
    return httpx.Response(status, headers={name.replace("_", "-"): value for name, value in headers.items()}, json={})


class Script:
    """Answers one after the other, the last again and again; `at` says when each was asked for."""

    def __init__(self, time: FakeTime, *steps: Step) -> None:
        self._time, self._steps = time, steps
        self.at: list[float] = []

    def __call__(self) -> httpx.Response:
        step = self._steps[min(len(self.at), len(self._steps) - 1)]
        self.at.append(self._time.now - 1000.0)
        if isinstance(step, httpx.TransportError):
            raise step
        return step


@pytest.fixture
def time() -> FakeTime:
    return FakeTime()


def unheard(seconds: float, why: str) -> None:
    pass


def retrier(time: FakeTime, on_wait: Callable[[float, str], None] = unheard, **limits: Any) -> Retrier:
    return Retrier(**({"retry_seconds": 120, "patience_seconds": 3600} | limits), clock=time.clock, on_wait=on_wait)


@pytest.mark.parametrize("status", [429, 503, 409])
def test_waits_the_server_asks_for_are_not_failures(time: FakeTime, status: int) -> None:
    script = Script(time, *[answer(status, Retry_After="60")] * 50, answer())
    assert retrier(time)(script).status_code == 200
    assert script.at == pytest.approx([60 * n for n in range(51)])  # 3,000 s, with 120 s for failures


def test_patience_has_an_end(time: FakeTime) -> None:
    script = Script(time, answer(429, Retry_After="1000"))
    with pytest.raises(RateLimited):
        retrier(time)(script)
    assert script.at == pytest.approx([0, 1000, 2000, 3000])  # a fourth wait would be beyond it, and is not begun


def test_failures_count_by_themselves_whatever_was_waited_between_them(time: FakeTime) -> None:
    lost, busy = httpx.ReadError("lost"), answer(503, Retry_After="500")
    steps: list[Step] = [lost, busy, lost, busy, lost, busy, answer()]
    script = Script(time, *steps)
    retrier(time, retry_seconds=5)(script)
    assert len(script.at) == 7
    assert script.at[-1] > 1500
    start = time.now
    with pytest.raises(httpx.ReadError):
        retrier(time, retry_seconds=5)(Script(time, busy, lost))
    assert 501 < time.now - start <= 505


def test_failures_without_a_word_end_after_the_retry_seconds(time: FakeTime) -> None:
    for step, error in ((answer(503), Unavailable), (httpx.ConnectError("nobody"), httpx.ConnectError)):
        script = Script(time, step)
        start = time.now
        with pytest.raises(error):
            retrier(time)(script)
        assert 100 < time.now - start <= 120


def test_come_back_at_once_still_backs_off(time: FakeTime) -> None:
    script = Script(time, answer(429, Retry_After="0"))
    with pytest.raises(RateLimited):
        retrier(time)(script)
    assert 0.1 <= time.slept[0] < 1
    assert 3500 < sum(time.slept) <= 3600
    assert len(script.at) < 400


def test_a_date_to_come_back_at(time: FakeTime) -> None:
    date = {"Date": "Wed, 02 Jan 2030 03:04:05 GMT", "Retry_After": "Wed, 02 Jan 2030 03:04:35 GMT"}
    script = Script(time, answer(503, **date), answer())
    retrier(time)(script)
    assert script.at == [0, 30]


# --- pacing -----------------------------------------------------------------------------------------------------------


def limit(remaining: int, seconds: int, status: int = 200, **headers: str) -> httpx.Response:
    return answer(status, **{protocol.RATELIMIT_HEADER: f'"default";r={remaining};t={seconds}'}, **headers)


def test_a_limit_that_is_used_up_is_waited_for_and_not_met(time: FakeTime) -> None:
    keep = retrier(time)
    script = Script(time, limit(1, 30), limit(0, 20), limit(5, 60), limit(4, 60))
    for _ in range(4):
        keep(script)
    assert script.at == [0, 0, 20, 20]


def test_time_that_passed_anyhow_is_not_waited_again(time: FakeTime) -> None:
    keep = retrier(time)
    script = Script(time, limit(0, 20), answer())
    keep(script)
    time.now += 15
    keep(script)
    assert time.slept == [5]


def test_a_refusal_and_its_limit_are_one_wait(time: FakeTime) -> None:
    script = Script(time, limit(0, 30, status=429, Retry_After="30"), answer())
    retrier(time)(script)
    assert script.at == [0, 30]


def test_a_limit_beyond_all_patience_is_asked_about(time: FakeTime) -> None:
    keep = retrier(time, patience_seconds=100)
    script = Script(time, limit(0, 101), answer())
    keep(script)
    keep(script)
    assert script.at == [0, 0]


# --- what is said -----------------------------------------------------------------------------------------------------


def test_every_wait_is_told_with_its_reason(time: FakeTime) -> None:
    told: list[tuple[int, str]] = []
    steps: list[Step] = [
        answer(429, Retry_After="30"),
        answer(503, Retry_After="20"),
        httpx.ReadError("lost"),
        limit(0, 10),
        answer(),
    ]
    keep = retrier(time, lambda seconds, why: told.append((round(seconds), why)))
    script = Script(time, *steps)
    keep(script)
    keep(script)
    assert [why for _, why in told] == ["rate limited", "unavailable", "no answer", "rate limited"]
    assert [seconds for seconds, _ in told][:2] == [30, 20]


def test_a_long_wait_is_beside_the_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = io.StringIO()
    monkeypatch.setattr(progress, "console", Console(file=screen, force_terminal=True, width=150))
    with progress.meter("train", 10, "samples"):
        progress.waiting(30.2, "rate limited")
    assert "waiting 30 s: rate limited" in screen.getvalue()


def test_a_long_wait_is_in_the_progress_line(capfd: pytest.CaptureFixture[str]) -> None:
    progress.waiting(30, "rate limited")
    with progress.meter("train", 10, "samples") as meter:
        progress.waiting(0.5, "no answer")
        progress.waiting(30.2, "rate limited")
        progress.waiting(2, "no answer")  # soon after the last line
        meter.advance(10)
    progress.waiting(45, "unavailable")
    lines = capfd.readouterr().err.splitlines()
    assert lines[0] == "waiting 30 s: rate limited"
    assert lines[1] == "train: waiting 30 s: rate limited"
    assert lines[2].startswith("train: 10/10")
    assert lines[3:] == ["waiting 45 s: unavailable"]
