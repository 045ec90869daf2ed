"""How a request to a foreign oracle is paid for: each attempt at it is set aside, made, and settled.

    set aside    on the ledger's disk, and in the query log, before anything leaves
    free         it never left, or was refused: released
    no answer    nobody knows whether it was counted: paid, so that the budget holds whatever the server did
    answered     paid once the answer is on record

A foreign server has no Idempotency-Keys, so that another attempt is another purchase, under a key of its own.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from defender_client.local_ledger import LocalLedger
from defender_client.query_log import QueryLog
from defender_client.request_key import RequestKey
from shared.audit.chain import Entry
from shared.wire.errors import OracleError

MOST_LOST = 3
"""Attempts at one request that got no answer, before it is given up."""


class AnswersLost(OracleError):
    """Several attempts at one request got no answer; each of them is paid."""

    code, title = "answers-lost", "No answer came, and each attempt may have been counted"


@dataclass
class Attempt:
    """What became of an attempt, as whoever makes it says; what nobody says anything of counts as spent.

    Attributes:
        free: why it costs nothing: it never left, or was refused.
        answered: whether an answer came.
        bytes_up, bytes_down: what travelled.
    """

    free: str | None = None
    answered: bool = False
    bytes_up: int = 0
    bytes_down: int = 0


class Paying:
    """The payment for one request.

    Args:
        ledger, log: the run's.
        key: of the request; attempts after the first have keys made of it.
        purpose: what its queries are for.
        rows: what each attempt costs, in queries.
        body_sha256: of what is asked, hexadecimal.
    """

    def __init__(
        self, ledger: LocalLedger, log: QueryLog, key: RequestKey, purpose: str, rows: int, body_sha256: str
    ) -> None:
        self._ledger, self._log, self._key = ledger, log, key
        self._purpose, self._rows, self._body_sha256 = purpose, rows, body_sha256
        self._lost = 0
        self._answered: tuple[Entry, Attempt] | None = None

    @contextmanager
    def attempt(self) -> Iterator[Attempt]:
        """The rows are set aside before the block begins, and settled when it ends, however it ends; those of an
        attempt that was answered when `settle` is called.

        Raises:
            BudgetExhausted: the budget does not cover the rows: nothing may leave.
            AnswersLost: so many attempts got no answer that this one is not made.
        """
        if self._lost >= MOST_LOST:
            raise AnswersLost(
                f"{self._lost} attempts at a request of {self._rows:,} rows got no answer, and "
                f"{self._lost * self._rows:,} queries are counted for them; see what ails the oracle, then give "
                "the same command again"
            )
        reserved = self._ledger.reserve(self._key, self._purpose, self._rows, self._body_sha256)
        key = _key_of(reserved)
        self._log.sending(key, self._purpose, self._rows)
        attempt = Attempt()
        try:
            yield attempt
        finally:
            if attempt.answered:
                self._answered = reserved, attempt
            elif attempt.free is not None:
                self._ledger.release(reserved, attempt.free)
                self._log.refused(key, attempt.free)
            else:
                self._lost += 1
                receipt = self._ledger.charge(reserved, "no answer came")
                self._log.lost(key, self._rows, receipt=receipt, bytes_up=attempt.bytes_up)

    def total_after(self) -> int:
        """What the run will have spent in all once the answered attempt is settled."""
        return self._log.total + (self._rows if self._answered is not None else 0)

    def settle(self, note: str | None = None) -> None:
        """Pay for the attempt that was answered, if there is one; `note` says what was wrong with the answer."""
        if self._answered is None:
            return
        reserved, attempt = self._answered
        self._answered = None
        receipt = self._ledger.charge(reserved, note)
        key, up = _key_of(reserved), attempt.bytes_up
        if note is None:
            self._log.answered(key, self._rows, receipt=receipt, bytes_up=up, bytes_down=attempt.bytes_down)
        else:
            self._log.lost(key, self._rows, receipt=receipt, bytes_up=up)


def settle_log(ledger: LocalLedger, log: QueryLog) -> None:
    """Note in a run's query log what its ledger charged and a kill kept out of it: the ledger is written first."""
    for entry, purpose in ledger.paid():
        key = _key_of(entry)
        known = log.requests.get(key)
        if known is None or known.charged is None:
            log.sending(key, purpose, entry.rows)
            log.lost(key, entry.rows, receipt=None, bytes_up=0)


def _key_of(entry: Entry) -> str:
    return entry.idempotency_key or ""
