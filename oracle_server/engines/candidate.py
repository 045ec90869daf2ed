"""What may stand in an engine's place, and why it may not."""

from __future__ import annotations


class NotACandidate(Exception):
    """This engine cannot compute this classifier here: the message says why."""


def first_line(error: Exception) -> str:
    """What went wrong, in one line."""
    return (str(error) or type(error).__name__).splitlines()[0]
