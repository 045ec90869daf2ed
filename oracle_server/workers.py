"""Threads that keep the event loop free: some read bodies, one reads the ledger, one the dashboard's numbers.

Each kind of work has threads of its own, so that none waits behind another's: a refusal behind a large body, or a key's
look-up behind a page.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")


class Worker:
    """So many threads; calls wait their turn in order."""

    def __init__(self, name: str, threads: int = 1) -> None:
        self._executor = ThreadPoolExecutor(max_workers=threads, thread_name_prefix=name)

    async def __call__(self, function: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T:
        """Run `function` in a thread of them; a call that has begun is finished even if its caller is cancelled."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._executor, lambda: function(*args, **kwargs))

    def close(self) -> None:
        """Finish what is queued and end the threads."""
        self._executor.shutdown(wait=True)
