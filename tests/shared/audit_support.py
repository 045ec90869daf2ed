"""Ledgers written by hand, without the server: entries in a chain, signed, as lines of an export."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from shared.audit import export
from shared.audit.chain import Entry
from shared.audit.signatures import Head, Signer

BODY = "ab" * 32


def note(name: str, role: str = "client") -> str:
    return json.dumps({"name": name, "key_id": name, "key_hash": "00", "role": role, "created_at": "then"})


class Written:
    """A ledger that grows; its hashes are computed here a second time, from the definition alone."""

    def __init__(self, ledger: str = "0123456789abcdef", seed: int = 1) -> None:
        self.ledger = ledger
        self.signer = Signer(Ed25519PrivateKey.from_private_bytes(bytes([seed]) * 32))
        self.public_key = self.signer.public_key
        self.entries: list[Entry] = []
        self.hashes = [hashlib.sha256(b"\x02" + ledger.encode() + self.public_key).digest()]

    def add(self, kind: str, client_id: int = 1, **fields: Any) -> Entry:
        entry = Entry(len(self.entries) + 1, f"at {len(self.entries)}", client_id, kind, **fields)
        text = json.dumps(asdict(entry), sort_keys=True, separators=(",", ":")).encode()
        leaf = hashlib.sha256(b"\x00" + text).digest()
        self.hashes.append(hashlib.sha256(b"\x01" + self.hashes[-1] + leaf).digest())
        self.entries.append(entry)
        return entry

    def pay(self, rows: int, key: str | None, client_id: int = 1) -> Entry:
        paid = {"rows": rows, "idempotency_key": key, "body_sha256": BODY}
        reserved = self.add("reserve", client_id, note="server", **paid)
        return self.add("charge", client_id, refers_to=reserved.seq, **paid)

    @property
    def head(self) -> Head:
        return Head(self.ledger, len(self.entries), self.hashes[-1].hex(), "now")

    def lines(self, client: int | None = None) -> list[bytes]:
        """The export, of one client or of all."""
        lines = [export.first_line(self.ledger, self.public_key.hex(), client)]
        for entry, value in zip(self.entries, self.hashes[1:], strict=True):
            write = export.entry_line if client in (None, entry.client_id) else export.redacted_line
            lines.append(write(entry, value.hex()))
        lines.append(export.last_line(self.signer.sign_head(self.head)))
        return [line.encode() + b"\n" for line in lines]


def small(ledger: str = "0123456789abcdef", seed: int = 1) -> Written:
    """Two clients, every kind of entry that is still written, a reservation that is open."""
    written = Written(ledger, seed)
    for client_id, name in ((1, "ann"), (2, "bob")):
        written.add("client", client_id, note=note(name))
        written.add("budget", client_id, amount=20)
    written.pay(4, "k1")
    written.pay(3, None, 2)
    reserved = written.add("reserve", rows=2, idempotency_key="k2", body_sha256=BODY, note="server")
    written.add("release", rows=2, idempotency_key="k2", body_sha256=BODY, refers_to=reserved.seq, note="why")
    written.pay(2, "k2")
    written.add("budget", amount=30)
    written.add("revoke", 2)
    written.add("reserve", rows=5, idempotency_key="k3", body_sha256=BODY, note="server")
    return written
