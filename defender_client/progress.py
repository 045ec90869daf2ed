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

console = Console(stderr=True, highlight=False, soft_wrap=True)


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


@contextmanager
def meter(description: str, total: int, unit: str, done: int = 0) -> Iterator[Meter]:
    """A meter over `total` units of which `done` are done already."""
    if not console.is_terminal:
        yield Meter(description, total, unit, done, None)
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
        yield Meter(description, total, unit, done, bar)
