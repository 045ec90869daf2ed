"""The exported ledger: lines of JSON that a stranger can check with nothing but this file and the public key.

    {"client":...,"format":"zo-defense-ledger/1","ledger":...,"public_key":...}    the first line
    {"entry":{...},"hash":...}                                              one line an entry, in the order of `seq`
    {"hash":...,"leaf":...,"seq":...}                                       an entry of another client, left out
    {"head":{"at":...,"hash":...,"ledger":...,"seq":...},"signature":...}   the last line: the signed end

`client` is null where every entry is shown, else the id of the one client whose entries are. Each line has one spelling
(`chain.canonical_json`) and ends with a line feed, so that a change of any byte is a change. Cutting lines off the end
takes the signed end away; an older end that somebody kept fits an older ledger only, and `history` tells the two apart.

A ledger that its owner keeps as a file and only adds to has no last line, and a signed end in every line instead:

    {"client":null,"format":"zo-defense-local-ledger/1",...}    the first line
    {"entry":{...},"hash":...,"signature":...}                  an entry, and the end of the chain as of then, signed

Lines cut off its end leave an older signed end: what else a run has kept (receipts, answers) tells. A line without a
line feed at its very end was being written when the writer died, and is no part of it.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

from shared.audit.accounts import Accounts
from shared.audit.chain import DIGEST_BYTES, Entry, canonical_json, genesis, read_entry
from shared.audit.signatures import Head, SignatureInvalid, SignedHead, bytes_of
from shared.audit.verifier import Verifier

FORMAT = "zo-defense-ledger/1"
LOCAL_FORMAT = "zo-defense-local-ledger/1"


class NotALedger(ValueError):
    """The file is not an exported ledger at all; its first line says what one is."""


@dataclass(frozen=True)
class Examined:
    """What the check of an exported ledger found.

    Attributes:
        ledger: its id.
        client: the id of the only client whose entries are shown; None where all are.
        findings: one sentence each; empty where the file is as it was exported.
        entries: number of entries, those left out included.
        hidden: number of entries left out.
        hashes: the chain's hash at each entry, by its seq, those left out included; at 0 the chain's beginning.
        shown: the entries that are shown, by seq.
        accounts: what the entries that are shown amount to.
        head: the signed end; None where the file has none.
    """

    ledger: str
    client: int | None
    findings: tuple[str, ...]
    entries: int
    hidden: int
    hashes: dict[int, str]
    shown: dict[int, Entry]
    accounts: Accounts
    head: Head | None


def first_line(ledger: str, public_key: str, client: int | None = None) -> str:
    """The line that says which ledger it is, and whose entries are shown."""
    return _line({"format": FORMAT, "ledger": ledger, "public_key": public_key, "client": client})


def local_first_line(ledger: str, public_key: str) -> str:
    """The line that says which ledger a file is that only grows."""
    return _line({"format": LOCAL_FORMAT, "ledger": ledger, "public_key": public_key, "client": None})


def local_line(entry: Entry, signed: SignedHead) -> str:
    """An entry of such a file, with the end of the chain that it made; the head's `at` is the entry's."""
    return _line({"entry": entry.fields(), "hash": signed.head.hash, "signature": signed.signature})


def entry_line(entry: Entry, kept_hash: str) -> str:
    """An entry as it stands in the ledger."""
    return _line({"entry": entry.fields(), "hash": kept_hash})


def redacted_line(entry: Entry, kept_hash: str) -> str:
    """An entry that is not shown: its place in the chain, and nothing of what it says."""
    return _line({"seq": entry.seq, "leaf": entry.leaf().hex(), "hash": kept_hash})


def last_line(signed: SignedHead) -> str:
    """The signed end."""
    return _line({"head": asdict(signed.head), "signature": signed.signature})


def examine(lines: Iterable[bytes], public_key: bytes) -> Examined:
    """Check an exported ledger.

    Args:
        lines: of the file, with their ends, as a file opened for reading bytes gives them.
        public_key: the key to trust, 32 bytes: the one that the file names proves nothing.

    Raises:
        NotALedger: the first line is not that of an exported ledger.
    """
    numbered = enumerate(lines, start=1)
    _, first = next(numbered, (1, b""))
    examination = _Examination(first, public_key)
    for number, line in numbered:
        examination.take(number, line)
    return examination.finish()


class _Examination:
    def __init__(self, first: bytes, public_key: bytes) -> None:
        self._findings: list[str] = []
        try:
            fields = json.loads(first)
            if fields["format"] not in (FORMAT, LOCAL_FORMAT):
                raise ValueError
            self._local = fields["format"] == LOCAL_FORMAT
            self._ledger, self._client = fields["ledger"], fields["client"]
            self._verifier = Verifier(self._ledger, public_key)
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
            raise NotALedger(f"this is not an exported ledger: its first line does not say '{FORMAT}'") from None
        if not _spelled(fields, first) or len(fields) != 4 or type(self._client) not in (int, type(None)):
            self._findings.append("line 1 is not one that was exported")
        if fields.get("public_key") != public_key.hex():
            self._findings.append("the file names another public key than the one it is checked with")
        self._public_key = public_key
        self._entries = self._hidden = 0
        self._hashes = {0: genesis(self._ledger, public_key).hex()}
        self._shown: dict[int, Entry] = {}
        self._head: Head | None = None

    def take(self, number: int, line: bytes) -> None:
        if self._local and not line.endswith(b"\n"):
            return
        try:
            if self._head is not None and not self._local:
                raise ValueError("it stands after the signed end")
            fields = json.loads(line)
            if not isinstance(fields, dict) or not _spelled(fields, line):
                raise ValueError("it is spelled otherwise, or cut off")
            self._one(fields)
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            self._findings.append(f"line {number} is not one that was exported: {str(error)[:200]}")

    def finish(self) -> Examined:
        findings = [*self._verifier.findings, *self._findings]
        if self._head is None:
            findings.append("the signed end is missing: the file was cut off")
        return Examined(
            ledger=self._ledger,
            client=self._client,
            findings=tuple(findings),
            entries=self._entries,
            hidden=self._hidden,
            hashes=self._hashes,
            shown=self._shown,
            accounts=self._verifier.accounts,
            head=self._head,
        )

    def _one(self, fields: dict[str, Any]) -> None:
        match sorted(fields):
            case ["entry", "hash", "signature"] if self._local:
                entry, kept_hash = read_entry(fields["entry"]), _digest(fields, "hash")
                self._entry(entry, kept_hash)
                self._head = self._signed(entry, kept_hash, fields["signature"])
            case names if self._local:
                raise ValueError(f"no line has the names {', '.join(names)}")
            case ["entry", "hash"]:
                self._entry(read_entry(fields["entry"]), _digest(fields, "hash"))
            case ["hash", "leaf", "seq"]:
                self._redacted(fields["seq"], _digest(fields, "leaf"), _digest(fields, "hash"))
            case ["head", "signature"]:
                head = Head(**fields["head"])
                self._verifier.finish(SignedHead(head, fields["signature"]))
                self._head = head
            case names:
                raise ValueError(f"no line has the names {', '.join(names)}")

    def _entry(self, entry: Entry, kept_hash: str) -> None:
        if self._client not in (None, entry.client_id):
            self._findings.append(f"entry {entry.seq} is not of client {self._client}, whose alone should be shown")
        self._verifier.take(entry, kept_hash)
        self._count(entry.seq, kept_hash)
        self._shown[entry.seq] = entry

    def _signed(self, entry: Entry, kept_hash: str, signature: str) -> Head:
        head = Head(self._ledger, entry.seq, kept_hash, entry.at)
        try:
            SignedHead(head, signature).verify(self._public_key)
        except SignatureInvalid as invalid:
            self._findings.append(f"entry {entry.seq}: {invalid}")
        return head

    def _redacted(self, seq: object, leaf: str, kept_hash: str) -> None:
        if type(seq) is not int:
            raise ValueError("its seq is not a number")
        if self._client is None:
            self._findings.append(f"entry {seq} is left out of a file that should show every entry")
        self._verifier.take_redacted(seq, bytes.fromhex(leaf), kept_hash)
        self._count(seq, kept_hash)
        self._hidden += 1

    def _count(self, seq: int, kept_hash: str) -> None:
        self._entries += 1
        self._hashes[seq] = kept_hash


def _digest(fields: dict[str, Any], name: str) -> str:
    return bytes_of(fields[name], DIGEST_BYTES, name).hex()


def _spelled(fields: object, line: bytes) -> bool:
    """Whether a line is the one spelling of what it says."""
    try:
        return canonical_json(fields) + b"\n" == line
    except ValueError:  # Python reads a NaN, which JSON has not
        return False


def _line(fields: dict[str, Any]) -> str:
    return canonical_json(fields).decode("ascii")
