"""The ledger's tables as queries name them. `migrations` is what creates them.

`entries` is append-only and is the account: `clients.budget` and `clients.spent` repeat what its rows add up to, in the
same transaction. Kinds of entries:

    charge   rows > 0   queries that were paid for
    refund   rows < 0   a charge taken back because its answer failed; `refers_to` is the charge's seq
    budget   rows = 0   `amount` is the client's new lifetime budget
    revoke   rows = 0   the key was revoked

`standing_keys` says which charge an Idempotency-Key stands for now; a refund frees the key.
"""

from __future__ import annotations

from sqlalchemy import BigInteger, String, column, table

clients = table(
    "clients",
    column("id", BigInteger),
    column("name", String),
    column("key_id", String),
    column("key_hash", String),
    column("budget", BigInteger),
    column("spent", BigInteger),
    column("created_at", String),
    column("revoked_at", String),
)
entries = table(
    "entries",
    column("seq", BigInteger),
    column("at", String),
    column("client_id", BigInteger),
    column("kind", String),
    column("rows", BigInteger),
    column("amount", BigInteger),
    column("idempotency_key", String),
    column("body_sha256", String),
    column("refers_to", BigInteger),
)
standing_keys = table(
    "standing_keys",
    column("client_id", BigInteger),
    column("idempotency_key", String),
    column("seq", BigInteger),
)
