"""The ledger's time stamps."""

from __future__ import annotations

from datetime import UTC, datetime


def utc_now() -> str:
    """Now, ISO-8601 in UTC to the millisecond: `2026-01-31T12:00:00.000Z`. As text it sorts by time."""
    return timestamp(datetime.now(UTC))


def timestamp(moment: datetime) -> str:
    """A moment as `utc_now` writes it, cut to the millisecond.

    Args:
        moment: with its zone.
    """
    return moment.astimezone(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
