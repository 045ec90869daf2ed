"""What a server says about when to come back: the Retry-After and RateLimit headers.

Sources: RFC 9110, section 10.2.3 (Retry-After); draft-ietf-httpapi-ratelimit-headers (RateLimit), whose members are
`"name";r=REMAINING;t=SECONDS`, r what is left of a quota and t the seconds until there is more.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime

_SECONDS = re.compile(r"[0-9]{1,9}(\.[0-9]{1,9})?")
# Of a structured-field list only strings, tokens and whole numbers matter here.
_STRING = r'"(?:[^"\\]|\\.)*"'
_MEMBER = re.compile(rf'\s*(?:{_STRING}|[A-Za-z*][^\s;,"=]*)(?P<parameters>(?:\s*;[^;,"]*(?:{_STRING})?)*)\s*(?:,|$)')
_PARAMETER = re.compile(r";\s*([a-z*][a-z0-9_.*-]*)=([0-9]{1,9})\s*(?=;|$)")


def retry_after(
    value: str, date: str | None = None, *, now: Callable[[], datetime] = lambda: datetime.now(UTC)
) -> float | None:
    """Seconds to wait by a Retry-After header; None where it cannot be read.

    Args:
        value: seconds, or an HTTP-date.
        date: the answer's Date header: the server's date is held against the server's clock where that is known.
        now: our clock, where it is not.
    """
    if _SECONDS.fullmatch(value):
        return float(value)
    at = _http_date(value)
    if at is None:
        return None
    return max(0.0, (at - (_http_date(date) or now())).total_seconds())


def _http_date(text: str | None) -> datetime | None:
    try:
        parsed = parsedate_to_datetime(text or "")
    except (TypeError, ValueError, OverflowError):
        return None
    return parsed if parsed.tzinfo is not None else parsed.replace(tzinfo=UTC)


def pause(header: str) -> float:
    """Seconds until no limit in a RateLimit header is used up; 0 where none is, or where the header cannot be read."""
    return max((float(seconds) for remaining, seconds in _limits(header) if remaining == 0), default=0.0)


def _limits(header: str) -> Iterator[tuple[int, int]]:
    """(remaining, seconds) of each member that says both."""
    position = 0
    while position < len(header):
        member = _MEMBER.match(header, position)
        if member is None:
            return
        said = dict(_PARAMETER.findall(member["parameters"]))
        if "r" in said and "t" in said:
            yield int(said["r"]), int(said["t"])
        position = member.end()
