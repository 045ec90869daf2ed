"""The rules of the account, replayed from the entries alone: who may spend what, and that each request is paid once.

The server keeps its tables by the same rules; here they are written a second time, from the ledger's words only, so
that whoever holds an export can check them without the server and without its tables.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field

from shared.audit.chain import Entry

# What the note of a `client` entry says, as a JSON object.
CLIENT_NOTE = ("name", "key_id", "key_hash", "role", "created_at")


class RuleBroken(ValueError):
    """An entry that the rules do not allow; the message names it."""


@dataclass
class Account:
    """One client as the entries tell of it; numbers in queries. `held` is set aside for requests being computed."""

    id: int
    name: str | None = None
    key_id: str | None = None
    key_hash: str | None = field(default=None, repr=False)
    role: str = "client"
    budget: int = 0
    spent: int = 0
    held: int = 0
    created_at: str | None = None
    revoked_at: str | None = None

    @property
    def remaining(self) -> int:
        """Queries that a new request may still reserve."""
        return max(0, self.budget - self.spent - self.held)


@dataclass(frozen=True, slots=True)
class Request:
    """What an Idempotency-Key stands for, or a reservation without one; `charge` is None while it is open.

    `server` made the reservation; None for a charge of version 0.1, which had none.
    """

    seq: int
    client_id: int
    idempotency_key: str | None
    body_sha256: str | None
    rows: int
    server: str | None
    charge: int | None


class Accounts:
    """The state that the entries applied so far lead to.

    Attributes:
        clients: accounts by client id.
        open: reservations that are neither charged nor released, by their seq.
        standing: requests by (client id, Idempotency-Key); a release or refund frees the key.
        charges: the number of charges.
    """

    def __init__(self) -> None:
        self.clients: dict[int, Account] = {}
        self.open: dict[int, Request] = {}
        self.standing: dict[tuple[int, str], Request] = {}
        self.charges = 0
        self._names: set[str] = set()
        self._unreserved: dict[int, Entry] = {}  # charges of version 0.1, which can be refunded

    def apply(self, entry: Entry) -> None:
        """Take one more entry. Raises RuleBroken, and changes nothing, where the rules do not allow it."""
        rules = {
            "client": self._client,
            "budget": self._budget,
            "revoke": self._revoke,
            "reserve": self._reserve,
            "charge": self._charge,
            "release": self._release,
            "refund": self._refund,
        }
        if entry.kind not in rules:
            raise RuleBroken(f"entry {entry.seq}: no kind of entry is called '{entry.kind}'")
        rules[entry.kind](entry)

    def _client(self, entry: Entry) -> None:
        try:
            note = json.loads(entry.note or "")
            name, key_id, key_hash, role, created_at = (str(note[field]) for field in CLIENT_NOTE)
        except (ValueError, TypeError, KeyError):
            raise RuleBroken(f"entry {entry.seq}: does not say who client {entry.client_id} is") from None
        account = self.clients.get(entry.client_id) or Account(entry.client_id)
        _require(account.name is None, entry, f"client {entry.client_id} is there already")
        _require(name not in self._names, entry, f"there is already a client '{name}'")
        account.name, account.key_id, account.key_hash, account.role = name, key_id, key_hash, role
        account.created_at = created_at
        self._names.add(name)
        self.clients[entry.client_id] = account

    def _budget(self, entry: Entry) -> None:
        _require(entry.amount is not None and entry.amount >= 0, entry, "is not a budget")
        # A ledger of version 0.1 names its clients only after its old entries.
        self.clients.setdefault(entry.client_id, Account(entry.client_id)).budget = entry.amount or 0

    def _revoke(self, entry: Entry) -> None:
        account = self._account(entry)
        _require(account.revoked_at is None, entry, f"client {account.id} was revoked before")
        account.revoked_at = entry.at

    def _reserve(self, entry: Entry) -> None:
        account = self._account(entry)
        _require(account.name is not None, entry, f"nothing says who client {account.id} is")
        self._admit(account, entry)
        request = Request(entry.seq, account.id, entry.idempotency_key, entry.body_sha256, entry.rows, entry.note, None)
        if entry.idempotency_key is not None:
            self.standing[account.id, entry.idempotency_key] = request
        self.open[entry.seq] = request
        account.held += entry.rows

    def _charge(self, entry: Entry) -> None:
        account = self._account(entry)
        if entry.refers_to is None:
            _require(account.name is None, entry, "pays for what was not reserved")  # as version 0.1 did
            self._admit(account, entry)
            self._unreserved[entry.seq] = entry
            seq, server = entry.seq, None
        else:
            request = self._reserved(entry)
            del self.open[request.seq]
            account.held -= entry.rows
            seq, server = request.seq, request.server
        account.spent += entry.rows
        self.charges += 1
        if entry.idempotency_key is not None:
            self.standing[account.id, entry.idempotency_key] = Request(
                seq, account.id, entry.idempotency_key, entry.body_sha256, entry.rows, server, entry.seq
            )

    def _release(self, entry: Entry) -> None:
        account, request = self._account(entry), self._reserved(entry)
        del self.open[request.seq]
        account.held -= entry.rows
        if entry.idempotency_key is not None:
            self.standing.pop((account.id, entry.idempotency_key), None)

    def _refund(self, entry: Entry) -> None:
        account, charge = self._account(entry), self._unreserved.get(entry.refers_to or 0)
        _require(charge is not None, entry, f"refunds entry {entry.refers_to}, which is no charge to refund")
        assert charge is not None  # noqa: S101  (said to mypy; the line above raised)
        same = (charge.client_id, -charge.rows, charge.idempotency_key, charge.body_sha256)
        _require(
            same == (entry.client_id, entry.rows, entry.idempotency_key, entry.body_sha256),
            entry,
            f"is not what charge {charge.seq} was",
        )
        del self._unreserved[charge.seq]
        account.spent += entry.rows
        if entry.idempotency_key is not None:
            self.standing.pop((account.id, entry.idempotency_key), None)

    def _account(self, entry: Entry) -> Account:
        account = self.clients.get(entry.client_id)
        if account is None:
            raise RuleBroken(f"entry {entry.seq}: there is no client {entry.client_id} before it")
        return account

    def _admit(self, account: Account, entry: Entry) -> None:
        """The rule of the budget: a whole request or nothing, and a key stands for one request."""
        _require(entry.rows > 0, entry, "sets no query aside")
        _require(account.revoked_at is None, entry, f"client {account.id} was revoked before it")
        _require(
            entry.rows <= account.budget - account.spent - account.held,
            entry,
            f"takes {entry.rows} queries of client {account.id}, which had {account.remaining} left",
        )
        key = entry.idempotency_key
        _require(key is None or (account.id, key) not in self.standing, entry, f"pays for '{key}' a second time")

    def _reserved(self, entry: Entry) -> Request:
        request = self.open.get(entry.refers_to or 0)
        if request is None:
            raise RuleBroken(f"entry {entry.seq}: settles entry {entry.refers_to}, which is no open reservation")
        same = (request.client_id, request.rows, request.idempotency_key, request.body_sha256)
        _require(
            same == (entry.client_id, entry.rows, entry.idempotency_key, entry.body_sha256),
            entry,
            f"is not what reservation {request.seq} was",
        )
        return request


def _require(holds: bool, entry: Entry, what: str) -> None:
    if not holds:
        raise RuleBroken(f"entry {entry.seq}: {what}")
