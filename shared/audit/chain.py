"""The ledger's entries and the hash chain that binds each to all before it.

    leaf_i = SHA-256(0x00 || entry_i)                    entry_i as canonical JSON, see `Entry.canonical`
    hash_i = SHA-256(0x01 || hash_{i-1} || leaf_i)
    hash_0 = SHA-256(0x02 || ledger id || public key)

The first bytes keep the three apart, as RFC 9162, section 2.1.1, does for the leaves and nodes of its tree. An entry
stands in the chain by its leaf alone, so that it can be left out of an export without breaking the proof of the others.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

DIGEST_BYTES = 32
_TEXT, _NUMBER, _NOTHING = str, int, type(None)
# Exactly these: True is an int too, and JSON spells it otherwise.
_TYPES: dict[str, tuple[type, ...]] = {
    "seq": (_NUMBER,),
    "at": (_TEXT,),
    "client_id": (_NUMBER,),
    "kind": (_TEXT,),
    "rows": (_NUMBER,),
    "amount": (_NUMBER, _NOTHING),
    "idempotency_key": (_TEXT, _NOTHING),
    "body_sha256": (_TEXT, _NOTHING),
    "refers_to": (_NUMBER, _NOTHING),
    "note": (_TEXT, _NOTHING),
}


class NotAnEntry(ValueError):
    """Fields that no entry of a ledger has; the message says which."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One line of the ledger. `seq` counts from 1; `at` is the clock's word for it, and `seq` alone is the order.

    Kinds, and which fields they use:

        client    `note`: `accounts.CLIENT_NOTE` as JSON              a client, or an administrator, was added
        budget    `amount`: the client's new lifetime budget, in queries
        revoke                                                        the client's key was revoked
        reserve   `rows`, key, body; `note`: the server's id          queries set aside while they are computed
        charge    `rows`, key, body, `refers_to` the reservation      queries paid for, before their answer was sent
        release   `rows`, key, body, `refers_to` the reservation      set free, nothing paid; `note` says why
        refund    `rows` < 0, key, body, `refers_to` the charge       written by version 0.1 only, whose charges stand
                                                                      without a reservation
    """

    seq: int
    at: str
    client_id: int
    kind: str
    rows: int = 0
    amount: int | None = None
    idempotency_key: str | None = None
    body_sha256: str | None = None
    refers_to: int | None = None
    note: str | None = None

    def fields(self) -> dict[str, Any]:
        """The entry's fields by their names."""
        return {name: getattr(self, name) for name in self.__slots__}  # dataclasses.asdict would copy deeply

    def canonical(self) -> bytes:
        """The entry's one spelling in bytes: JSON, names in order, no spaces, ASCII."""
        return canonical_json(self.fields())

    def leaf(self) -> bytes:
        """SHA-256 of the entry, 32 bytes."""
        return hashlib.sha256(b"\x00" + self.canonical()).digest()


def read_entry(fields: Mapping[str, Any]) -> Entry:
    """The entry with these fields, all of them. Raises NotAnEntry where a name or a type is not an entry's."""
    if not isinstance(fields, Mapping) or fields.keys() != _TYPES.keys():
        raise NotAnEntry("it has not the fields of an entry")
    for name, types in _TYPES.items():
        if type(fields[name]) not in types:
            raise NotAnEntry(f"entry {fields['seq']}: its {name} is of type {type(fields[name]).__name__}")
    return Entry(**fields)


def canonical_json(value: object) -> bytes:
    """A JSON value's one spelling in bytes."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False).encode("ascii")


def genesis(ledger_id: str, public_key: bytes) -> bytes:
    """hash_0: it binds the chain to one ledger and to the key that signs it."""
    return hashlib.sha256(b"\x02" + ledger_id.encode("ascii") + public_key).digest()


def link(previous: bytes, leaf: bytes) -> bytes:
    """hash_i from hash_{i-1} and leaf_i, 32 bytes each."""
    return hashlib.sha256(b"\x01" + previous + leaf).digest()
