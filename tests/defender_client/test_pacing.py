"""When to come back: Retry-After and RateLimit as servers write them, and as nobody should."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from email.utils import format_datetime

import pytest

from defender_client.oracle_client.pacing import pause, retry_after

NOW = datetime(2030, 1, 2, 3, 4, 5, tzinfo=UTC)


def at(seconds: float) -> str:
    return format_datetime(NOW + timedelta(seconds=seconds), usegmt=True)


@pytest.mark.parametrize(
    ("value", "seconds"),
    [("0", 0), ("30", 30), ("0.5", 0.5), (at(90), 90), (at(-90), 0), ("Wednesday, 02-Jan-30 03:04:06 GMT", 1)],
)
def test_retry_after_in_either_form(value: str, seconds: float) -> None:
    assert retry_after(value, now=lambda: NOW) == seconds


def test_a_date_is_held_against_the_servers_own_clock() -> None:
    assert retry_after(at(90), at(30), now=lambda: NOW + timedelta(hours=5)) == 60
    assert retry_after(at(90), "sometime", now=lambda: NOW) == 90


@pytest.mark.parametrize("value", ["", "-1", "1e3", "soon", "٣", "9" * 20, "inf", "Tue, 99 Nov 2030 00:00:00 GMT"])
def test_what_cannot_be_read_says_nothing(value: str) -> None:
    assert retry_after(value) is None


@pytest.mark.parametrize(
    ("header", "seconds"),
    [
        ('"default";r=50;t=30', 0),
        ('"default";r=0;t=30', 30),
        ('"default";t=30;r=0', 30),
        ('"default"; r=0 ; t=7', 7),
        ('"burst";r=3;t=1, "day";r=0;t=600', 600),
        ('"burst";r=0;t=1,"day";r=0;t=600', 600),
        ('"burst";r=0;t=9, "day";r=5;t=600', 9),
        ('"a, b;r=1;t=1 \\"";r=0;t=4', 4),
        ("default;r=0;t=5;pk=:cHNsZWVw:", 5),
        ('"keyed";r=0;pk="x;t=99";t=5', 5),
        ('"default";r=0', 0),
        ('"default";t=30', 0),
    ],
)
def test_a_pause_is_until_no_limit_is_used_up(header: str, seconds: float) -> None:
    assert pause(header) == seconds


@pytest.mark.parametrize("header", ["", ",", "nonsense", '"open;r=0;t=3', "limit=10, remaining=0, reset=5", ";r=0;t=1"])
def test_a_header_of_another_form_says_nothing(header: str) -> None:
    assert pause(header) == 0
