"""Watching the ledger while it is served: each new entry is verified, and the old ones again and again.

Two walks along the chain, in pieces, in a thread of their own. The first follows the ledger's growth, so that what is
new is verified within a second. The second goes over the whole ledger from its beginning, and then once more: it finds
what is changed behind the first. Neither remembers entries; their memory does not grow with the ledger.

What they cannot see, for it takes the state of every request, are the rules of the account: `oracle-server ledger
verify` and an audit check those too.
"""

from __future__ import annotations

import logging
import threading
import time
from dataclasses import dataclass
from itertools import islice
from typing import Literal

from sqlalchemy import Connection, select

from oracle_server import chain, tables
from oracle_server.clock import utc_now
from oracle_server.ledger import Ledger
from oracle_server.verification import kept_entries
from shared.audit.chain import Entry, NotAnEntry
from shared.audit.verifier import Verifier
from shared.wire.errors import Unavailable

log = logging.getLogger(__name__)
_PIECE = 1_000  # new entries that are verified at once: some 60 ms
_PATROL = 100  # old entries that are verified each second: about 0.6 % of a core, a million in 3 hours
_POLL_S = 1.0
_RETRY_S = 5.0  # where the database cannot be read
_REST = 9.0  # while behind: a pause of so many times what the last piece took
_MOST_FINDINGS = 20

State = Literal["checking", "verified", "broken", "unavailable"]


@dataclass(frozen=True)
class Finding:
    """What is wrong, in a sentence; `seq` is the entry it was found at, `client_id` the one whose account it is about.

    A finding with a `client_id` holds that client's numbers.
    """

    text: str
    seq: int | None = None
    client_id: int | None = None


@dataclass(frozen=True)
class Verdict:
    """What is known of the ledger.

    Attributes:
        state: `checking` until the signed head is reached for the first time; `unavailable` where the database cannot
            be read; a ledger that was found `broken` stays so until the server is started again.
        entries: the last entry's seq, as the head says it.
        verified: entries 1 to here were followed.
        checked_at: when the end of the ledger was last looked at; None before that.
        walks: how often the whole ledger was gone over again since the server was started.
        walked_at: when that last ended.
        findings: what is wrong; empty where all is as it was written.
    """

    state: State = "checking"
    entries: int = 0
    verified: int = 0
    checked_at: str | None = None
    walks: int = 0
    walked_at: str | None = None
    findings: tuple[Finding, ...] = ()


class Watch:
    """The watch over one ledger. `verdict` may be read from any thread."""

    def __init__(self, ledger: Ledger) -> None:
        self.verdict = Verdict()
        self._ledger = ledger
        self._findings: dict[Finding, None] = {}  # in the order they were found, each once
        self._front, self._sums = self._verifier(), _Sums()
        self._patrol = self._verifier()
        self._entries, self._walks = 0, 0
        self._checked_at: str | None = None
        self._walked_at: str | None = None
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)

    def start(self) -> None:
        """Begin to watch."""
        self._thread.start()

    def close(self) -> None:
        """End the watch."""
        self._ended.set()
        if self._thread.is_alive():
            self._thread.join()

    def step(self) -> float:
        """Verify one piece at the end of the ledger and, where that is all, one behind it; returns seconds to rest."""
        begun = time.perf_counter()
        try:
            with self._ledger.reading() as connection:
                behind = self._follow(connection)
            if not behind:
                with self._ledger.reading() as connection:
                    self._go_over(connection)
        except Unavailable:
            self._publish(available=False)
            return _RETRY_S
        self._publish(available=True)
        return _REST * (time.perf_counter() - begun) if behind else _POLL_S

    def _run(self) -> None:
        pause = 0.0
        while not self._ended.wait(pause):
            try:
                pause = self.step()
            except Exception as error:  # a ledger that cannot be read as one is a finding, not the end of the watch
                log.exception("watch: the ledger could not be verified")
                self._add(Finding(f"the ledger could not be read as one: {type(error).__name__}"))
                self._publish(available=True)
                pause = _POLL_S

    def _follow(self, connection: Connection) -> bool:
        """Verify what is new, at most a piece; returns whether there is more."""
        if not self._is_this_ledger(connection):
            return False
        taken = self._take(connection, self._front, _PIECE, self._sums)
        head = chain.signed_head(connection)
        self._entries = head.head.seq
        if taken == _PIECE:
            return True
        if not self._findings:
            self._front.finish(head)
            self._collect(self._front)
        if not self._findings:
            self._compare_accounts(connection)
        self._checked_at = utc_now()
        return False

    def _go_over(self, connection: Connection) -> None:
        """Verify one more piece of the whole ledger, and begin again where it ends."""
        if not self._is_this_ledger(connection):
            return
        if self._take(connection, self._patrol, _PATROL) < _PATROL:
            if not self._findings:
                self._patrol.finish(chain.signed_head(connection))
                self._collect(self._patrol)
            self._patrol = self._verifier()
            self._walks += 1
            self._walked_at = utc_now()

    def _take(self, connection: Connection, verifier: Verifier, most: int, sums: _Sums | None = None) -> int:
        """Verify at most `most` entries that follow; returns how many there were."""
        taken, after = 0, verifier.seq or None
        try:
            for entry, kept_hash in islice(kept_entries(connection, after, page_size=most), most):
                taken += 1
                # Only the leaf: the verifier then keeps no state of requests, which would grow with the ledger.
                verifier.take_redacted(entry.seq, entry.leaf(), kept_hash)
                self._collect(verifier, entry.seq)
                if sums is not None and not self._findings:  # what follows from a broken entry says nothing more
                    sums.add(entry)
        except NotAnEntry as error:
            self._add(Finding(str(error), verifier.seq + 1))
        return taken

    def _is_this_ledger(self, connection: Connection) -> bool:
        if chain.identify(connection) == self._ledger.identity:
            return True
        self._add(Finding("the ledger's chain is gone, or another ledger was put in its place"))
        return False

    def _compare_accounts(self, connection: Connection) -> None:
        clients = tables.clients
        for client in connection.execute(select(clients)):
            explained = self._sums.of(client.id)
            for what in ("budget", "spent", "held"):
                kept, told = getattr(client, what), getattr(explained, what)
                if kept != told:
                    self._add(
                        Finding(f"client '{client.name}': {what} is {kept} and its entries say {told}", None, client.id)
                    )
        known = set(connection.scalars(select(clients.c.id)))
        for client_id in self._sums.clients - known:
            self._add(
                Finding(f"client {client_id} has entries and is missing in the table of clients", None, client_id)
            )

    def _verifier(self) -> Verifier:
        identity = self._ledger.identity
        return Verifier(identity.ledger, bytes.fromhex(identity.public_key))

    def _collect(self, verifier: Verifier, seq: int | None = None) -> None:
        for text in verifier.findings:
            self._add(Finding(text, seq))
        verifier.findings.clear()

    def _add(self, finding: Finding) -> None:
        if finding not in self._findings and len(self._findings) < _MOST_FINDINGS:
            self._findings[finding] = None
            log.error("watch: the ledger was tampered with: %s", finding.text)

    def _publish(self, *, available: bool) -> None:
        state: State = "verified" if self._checked_at else "checking"
        if self._findings:
            state = "broken"
        elif not available:
            state = "unavailable"
        self.verdict = Verdict(
            state,
            self._entries,
            self._front.seq,
            self._checked_at,
            self._walks,
            self._walked_at,
            tuple(self._findings),
        )


@dataclass
class _Sum:
    budget: int = 0
    spent: int = 0
    held: int = 0


class _Sums:
    """What the entries amount to, client by client, as far as it can be told without the state of each request."""

    def __init__(self) -> None:
        self._sums: dict[int, _Sum] = {}

    @property
    def clients(self) -> set[int]:
        return set(self._sums)

    def of(self, client_id: int) -> _Sum:
        return self._sums.get(client_id, _Sum())

    def add(self, entry: Entry) -> None:
        account = self._sums.setdefault(entry.client_id, _Sum())
        match entry.kind:
            case "budget":
                account.budget = entry.amount or 0
            case "reserve":
                account.held += entry.rows
            case "release":
                account.held -= entry.rows
            case "refund":
                account.spent += entry.rows
            case "charge":
                account.spent += entry.rows
                if entry.refers_to is not None:  # version 0.1 charged without a reservation
                    account.held -= entry.rows
