"""The ledger's time stamps."""

from __future__ import annotations

from datetime import UTC, datetime


def utc_now() -> str:
    """Now, ISO-8601 in UTC to the millisecond: `2026-01-31T12:00:00.000Z`. As text it sorts by time."""
    return datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
