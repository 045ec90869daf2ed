"""Progress of long work: a bar on a terminal, a line now and then elsewhere; rate, time and queries left."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress

_LINE_SECONDS = 15.0
_WAIT_SECONDS = 1.0  # shorter waits are not worth a word

console = Console(stderr=True, highlight=False, soft_wrap=True)
_meters: list[Meter] = []  # under way, the innermost last


class Meter:
    """Counts units of work done towards a total."""

    def __init__(self, description: str, total: int, unit: str, done: int, bar: RichProgress | None) -> None:
        self._description, self._total, self._unit = description, total, unit
        self._bar = bar
        self._task = bar.add_task(description, total=total, completed=done, note="") if bar is not None else None
        self._start, self._first, self._done = time.monotonic(), done, done
        self._last_line = time.monotonic()

    def advance(self, count: int = 1, note: str = "", *, spent: int | None = None, left: int | None = None) -> None:
        """`count` more units are done; `spent` and `left` are queries."""
        self._done += count
        now = time.monotonic()
        rate = (self._done - self._first) / max(now - self._start, 1e-9)
        parts = [f"{rate:,.1f} {self._unit}/s" if rate >= 1 else f"{1 / max(rate, 1e-9):,.1f} s/{self._unit}"]
        if spent is not None:
            parts.append(f"{spent:,} queries spent" + (f", {left:,} left" if left is not None else ""))
        if note:
            parts.append(note)
        line = " · ".join(parts)
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=self._done, note=line)
        elif now - self._last_line > _LINE_SECONDS or self._done >= self._total:
            self._last_line = now
            remaining = timedelta(seconds=round((self._total - self._done) / max(rate, 1e-9)))
            console.print(f"{self._description}: {self._done:,}/{self._total:,} · {line} · {remaining} left")

    def waiting(self, seconds: float, why: str) -> None:
        """Nothing will be done for so many seconds, and why."""
        text, now = f"waiting {seconds:.0f} s: {why}", time.monotonic()
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, note=text)
        elif now + seconds - self._last_line > _LINE_SECONDS:
            self._last_line = now
            console.print(f"{self._description}: {text}")


def waiting(seconds: float, why: str) -> None:
    """Say in the line of the work under way that it waits."""
    if seconds < _WAIT_SECONDS:
        return
    if _meters:
        _meters[-1].waiting(seconds, why)
    else:
        console.print(f"waiting {seconds:.0f} s: {why}")


@contextmanager
def meter(description: str, total: int, unit: str, done: int = 0) -> Iterator[Meter]:
    """A meter over `total` units of which `done` are done already."""
    with _bar() as bar:
        started = Meter(description, total, unit, done, bar)
        _meters.append(started)
        try:
            yield started
        finally:
            _meters.remove(started)


@contextmanager
def _bar() -> Iterator[RichProgress | None]:
    """A bar where there is a terminal to draw it on."""
    if not console.is_terminal:
        yield None
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    with RichProgress(*columns, console=console) as bar:
        yield bar
