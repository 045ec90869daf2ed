"""When nothing is answered: windows of time, which may come again and may overlap."""

from __future__ import annotations

from collections.abc import Sequence

from oracle_server.policy.spec import DowntimeSpec

# Windows that go on for ever in each other's place have no end to be told; after so many of them a part is told.
_MOST_WINDOWS = 1000


def remaining(windows: Sequence[DowntimeSpec], elapsed: float) -> float:
    """Seconds until service is back, through all windows that overlap or touch; 0 while it is there.

    Args:
        windows: of a file.
        elapsed: seconds since the start.
    """
    end = elapsed
    for _ in range(_MOST_WINDOWS):
        later = max((_end(window, end) for window in windows), default=end)
        if later <= end:
            break
        end = later
    return end - elapsed


def _end(window: DowntimeSpec, at: float) -> float:
    """When the window that `at` lies in ends; `at` itself where it lies in none."""
    since = at - window.after
    if since < 0:
        return at
    if window.every is not None:
        since %= window.every
    return at + max(0.0, window.seconds - since)
