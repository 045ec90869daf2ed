"""Every few seconds, reservations that nobody will settle are released: see `book` for the rule."""

from __future__ import annotations

import asyncio
import logging

from oracle_server.book import Sweep
from oracle_server.ledger import Ledger
from shared.wire.errors import Unavailable

log = logging.getLogger(__name__)
_PERIOD_S = 5.0


async def sweep(ledger: Ledger, period: float = _PERIOD_S) -> None:
    """Sweep until cancelled, `period` seconds apart. A database that fails is tried again."""
    while True:
        await asyncio.sleep(period)
        try:
            released = await asyncio.wrap_future(ledger.submit(Sweep()))
        except Unavailable:
            continue  # said in the log where it happened
        if released:
            log.warning("ledger: released %d reservations that nobody would have settled", released)
