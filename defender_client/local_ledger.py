"""The client's own signed ledger, for an oracle that keeps none: `local-ledger.jsonl` in the run's directory.

The entries and their rules are those of our server's ledger (`shared.audit`): a request's rows are set aside
(`reserve`, on the disk before the request leaves) and then paid (`charge`) or set free (`release`). Rows are set aside
only where the budget has them left, so that it cannot be exceeded, by any number of threads, nor across a kill.

A foreign server has no Idempotency-Keys: whatever left and was not refused counts as spent, whether or not its answer
came. So each attempt at a request is an entry of its own, and one that a kill left open is paid when the ledger is next
opened.

The file only grows; each line is fsynced, and carries the chain's signed end (`shared.audit.export`). Whoever has the
private key, kept beside it, can write another ledger; whoever has not cannot change a line of this one.
"""

from __future__ import annotations

import itertools
import json
import os
import threading
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

from defender_client.appending import drop_torn_line
from defender_client.errors import ConfigError
from defender_client.ledger_file import read_ledger
from defender_client.pinning import Pin, pin, pinned
from defender_client.query_log import LOG_FILE, QueryLog
from defender_client.request_key import RequestKey
from shared.audit.accounts import CLIENT_NOTE, Account, Accounts
from shared.audit.chain import Entry, canonical_json, genesis, link
from shared.audit.charges import shown
from shared.audit.export import Examined, local_first_line, local_line
from shared.audit.key_file import KeyFileError, create_signer, load_signer, sync_directory
from shared.audit.signatures import Head, Signer
from shared.wire import protocol
from shared.wire.errors import BudgetExhausted

LEDGER_FILE = "local-ledger.jsonl"
KEY_FILE = "local-ledger.key"
_CLIENT = 1  # the only account of such a ledger


class LocalLedgerDamaged(ConfigError):
    """A line of the ledger is not one that was written, or the ledger is not the run's."""


@dataclass(frozen=True)
class Asked:
    """Who is asked, as far as it is the run's: `name` is shown; `identity` says how it is asked and what it answers,
    wherever it is."""

    name: str
    identity: str


class LocalLedger:
    """A run's own ledger, opened to be added to; several threads may use it, and one process at a time.

    Args:
        run: the run's directory, locked by this process.
        asked: the oracle that the queries are put to.
        budget: queries that the run may spend in all; None for what it was.
        key_file: of the private key; None for the one in the run's directory.

    Raises:
        ConfigError: no budget was ever given, or one below what is spent; the ledger is of another oracle; the run has
            queries that stand on no ledger here; the key cannot be used.
        LocalLedgerDamaged: the file is not as it was written.
        LedgerChanged: the run was charged on another ledger.
    """

    def __init__(self, run: Path, asked: Asked, budget: int | None, key_file: Path | None = None) -> None:
        self._path, self._lock = run / LEDGER_FILE, threading.Lock()
        self._entries: list[Entry] = []
        self._accounts = Accounts()
        self._hash = b""
        if not self._path.exists():
            _refuse_unaccounted(run)
            if budget is None:
                raise ConfigError(
                    f"{asked.name} keeps no account of its own: say by --budget N how many queries this run may spend"
                )
        self._signer = _signer(key_file or run / KEY_FILE, create=not self._path.exists())
        if not self._path.exists():
            self._begin(asked)
        self._load(run)
        self._file = os.open(self._path, os.O_WRONLY | os.O_APPEND)
        try:
            self._check_asked(asked)
            for request in list(self._accounts.open.values()):
                # It left, or was about to: a foreign server may have counted it.
                self._settle("charge", self._entry(request.seq), "no answer was read: the client was killed")
            self._set_budget(asked, budget)
        except BaseException:
            os.close(self._file)
            raise

    # --- reading ---

    def statement(self) -> protocol.BudgetStatement:
        """The account, in queries."""
        with self._lock:
            account = self._account
            return protocol.BudgetStatement(
                client=account.name or "",
                budget=account.budget,
                spent=account.spent,
                held=account.held,
                remaining=account.remaining,
            )

    def charges(self) -> Iterator[protocol.ChargeEntry]:
        """The entries that paid for something, oldest first."""
        with self._lock:
            entries = [entry for entry in self._entries if entry.kind == "charge"]
        return iter([shown(entry) for entry in entries])

    def paid(self) -> Iterator[tuple[Entry, str]]:
        """The entries that paid for something, each with its purpose, oldest first."""
        with self._lock:
            entries = list(self._entries)
        purposes = {entry.seq: entry.note or "" for entry in entries if entry.kind == "reserve"}
        return iter([(entry, purposes[entry.refers_to or 0]) for entry in entries if entry.kind == "charge"])

    # --- writing ---

    def reserve(self, key: RequestKey, purpose: str, rows: int, body_sha256: str) -> Entry:
        """Set a request's rows aside, on the disk when this returns; the entry has the key of the first attempt that
        does not stand for one yet.

        Raises:
            BudgetExhausted: fewer are left; nothing was set aside.
            OSError: the disk did not take it.
        """
        with self._lock:
            account = self._account
            if rows > account.remaining:
                held = f", {account.held:,} of them in flight" if account.held else ""
                raise BudgetExhausted(
                    f"this run may spend {account.budget:,} queries and has spent {account.spent + account.held:,}"
                    f"{held}: {rows:,} more were not sent; a larger --budget goes on from here",
                    remaining=account.remaining,
                    requested=rows,
                )
            keys = (str(key.attempt(number)) for number in itertools.count(1))
            free = next(each for each in keys if (_CLIENT, each) not in self._accounts.standing)
            return self._append("reserve", rows=rows, idempotency_key=free, body_sha256=body_sha256, note=purpose)

    def charge(self, reserved: Entry, note: str | None = None) -> str:
        """Pay for a request; returns the receipt, as the header Query-Receipt has it. `note`: what was wrong."""
        with self._lock:
            return self._settle("charge", reserved, note)

    def release(self, reserved: Entry, note: str) -> None:
        """Set free what a request had set aside: it was refused, or never left; `note` says which."""
        with self._lock:
            self._settle("release", reserved, note)

    def close(self) -> None:
        """Close the file; whatever is still under way then is paid when it is next opened."""
        with self._lock:
            if self._file >= 0:
                os.close(self._file)
                self._file = -1

    @property
    def _account(self) -> Account:
        return self._accounts.clients[_CLIENT]

    def _entry(self, seq: int) -> Entry:
        return self._entries[seq - 1]

    def _settle(self, kind: str, reserved: Entry, note: str | None) -> str:
        previous = self._hash
        entry = self._append(
            kind,
            rows=reserved.rows,
            idempotency_key=reserved.idempotency_key,
            body_sha256=reserved.body_sha256,
            refers_to=reserved.seq,
            note=note,
        )
        return self._signer.sign_receipt(self.id, previous, entry).text()

    def _append(self, kind: str, **fields: object) -> Entry:
        """One more entry, on the disk and then in the books. The lock is held, or nobody else has this object yet."""
        if self._file < 0:
            raise OSError(f"{self._path} is closed: nothing can be spent any more")
        entry = replace(Entry(len(self._entries) + 1, _now(), _CLIENT, kind), **fields)  # type: ignore[arg-type]
        hashed = link(self._hash, entry.leaf())
        self._write(_signed_line(self._signer, self.id, entry, hashed))
        self._accounts.apply(entry)
        self._entries.append(entry)
        self._hash = hashed
        return entry

    def _write(self, line: str) -> None:
        data = line.encode("ascii") + b"\n"
        try:
            if os.write(self._file, data) != len(data):
                raise OSError(f"{self._path}: the disk did not take a whole line")
            os.fsync(self._file)
        except OSError:
            # What is on the disk is not known now. Nothing more is written, so nothing more is sent; the next one to
            # open the file sees what is there.
            os.close(self._file)
            self._file = -1
            raise

    # --- opening ---

    def _begin(self, asked: Asked) -> None:
        """A new ledger with its one account; whole, or not there at all."""
        ledger = uuid.uuid4().hex
        note = dict(zip(CLIENT_NOTE, (asked.name, asked.identity, "", "client", _now()), strict=True))
        entry = Entry(1, _now(), _CLIENT, "client", note=canonical_json(note).decode("ascii"))
        public_key = self._signer.public_key
        hashed = link(genesis(ledger, public_key), entry.leaf())
        lines = (local_first_line(ledger, public_key.hex()), _signed_line(self._signer, ledger, entry, hashed))
        temporary = self._path.with_suffix(".tmp")
        with temporary.open("w", encoding="ascii") as file:
            file.writelines(f"{line}\n" for line in lines)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(self._path)
        sync_directory(self._path.parent)

    def _load(self, run: Path) -> None:
        drop_torn_line(self._path)  # which a kill left: nothing was sent after it
        examined = examined_ledger(run, self._signer.public_key)
        if examined.findings:
            raise LocalLedgerDamaged(f"{self._path}: {examined.findings[0]} (`defender-client audit {run}` says more)")
        self.id = examined.ledger
        self._entries = [examined.shown[seq] for seq in sorted(examined.shown)]
        self._accounts = examined.accounts
        self._hash = bytes.fromhex(examined.hashes[len(self._entries)])
        pin(run, Pin(ledger=self.id, public_key=self._signer.public_key.hex()))

    def _check_asked(self, asked: Asked) -> None:
        noted = json.loads(self._entries[0].note or "{}")
        if noted.get("key_id") != asked.identity:
            raise ConfigError(
                f"{self._path} is of {noted.get('name')}, asked in another way than {asked.name} now (model, tensors, "
                "shapes, normalisation or kind of scores): its answers and this one's do not belong to one run"
            )

    def _set_budget(self, asked: Asked, budget: int | None) -> None:
        account = self._account
        if budget is None:
            if not any(entry.kind == "budget" for entry in self._entries):
                raise ConfigError(f"no budget was ever given for {asked.name}: give it by --budget N")
            return
        spent = account.spent + account.held
        if budget < spent:
            raise ConfigError(f"--budget {budget:,} is less than this run has spent, {spent:,} queries")
        if budget != account.budget or not any(entry.kind == "budget" for entry in self._entries):
            self._append("budget", amount=budget, note=asked.name)


def examined_ledger(run: Path, public_key: bytes) -> Examined:
    """What the check of a run's local ledger finds. Raises ConfigError where it cannot be read at all."""
    return read_ledger(run / LEDGER_FILE, public_key)


def local_statement(run: Path) -> protocol.BudgetStatement | None:
    """What a run's local ledger says of the account, without opening it to be added to; None where there is none.

    What is still held counts as spent, as it will when the run goes on.
    """
    kept = pinned(run)
    if kept is None or not (run / LEDGER_FILE).exists():
        return None
    account = examined_ledger(run, bytes.fromhex(kept.public_key)).accounts.clients.get(_CLIENT)
    if account is None:
        return None
    spent = account.spent + account.held
    return protocol.BudgetStatement(
        client=account.name or "", budget=account.budget, spent=spent, remaining=max(0, account.budget - spent)
    )


def _signer(path: Path, *, create: bool) -> Signer:
    try:
        found = load_signer(path)
        if found is None and create:
            found = create_signer(path)
    except KeyFileError as error:
        raise ConfigError(str(error)) from None
    if found is None:
        raise ConfigError(f"{path}, the key that signs this run's ledger, is missing: without it nothing can be spent")
    return found


def _refuse_unaccounted(run: Path) -> None:
    """A ledger that was removed is not begun anew: that would set the budget back."""
    unaccounted = (run / LOG_FILE).exists() and QueryLog.read(run / LOG_FILE).requests
    if unaccounted or pinned(run) is not None:
        raise ConfigError(
            f"{run} has queries that stand on no local ledger: they were put to an oracle of ours, or {LEDGER_FILE} "
            "was removed; choose another directory"
        )


def _signed_line(signer: Signer, ledger: str, entry: Entry, hashed: bytes) -> str:
    return local_line(entry, signer.sign_head(Head(ledger, entry.seq, hashed.hex(), entry.at)))


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")
