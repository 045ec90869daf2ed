"""The ledger's tables as queries name them. `migrations` is what creates them.

`entries` is append-only and is the account (`shared.audit.chain.Entry` explains its kinds); `chain` holds the signed
end of its hash chain, one row. The others repeat what the entries amount to, in the same transaction, so that a charge
need not read them all:

    clients    who may query; `spent` and `held` are queries charged and queries set aside
    requests   what an Idempotency-Key stands for, and every open reservation (`charge` is NULL) with its server
    servers    the server processes that may hold reservations; see `liveness`
    decoders   that clients registered, where servers share them; no part of the account
"""

from __future__ import annotations

from sqlalchemy import BigInteger, Integer, LargeBinary, String, column, table

clients = table(
    "clients",
    column("id", BigInteger),
    column("name", String),
    column("key_id", String),
    column("key_hash", String),
    column("role", String),
    column("budget", BigInteger),
    column("spent", BigInteger),
    column("held", BigInteger),
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
    column("note", String),
    column("hash", String),
)
chain = table(
    "chain",
    column("id", Integer),
    column("ledger", String),
    column("public_key", String),
    column("seq", BigInteger),
    column("hash", String),
    column("at", String),
    column("signature", String),
)
requests = table(
    "requests",
    column("seq", BigInteger),
    column("client_id", BigInteger),
    column("idempotency_key", String),
    column("body_sha256", String),
    column("rows", BigInteger),
    column("server", String),
    column("charge", BigInteger),
)
servers = table(
    "servers",
    column("id", String),
    column("host", String),
    column("pid", BigInteger),
    column("started_at", String),
)
decoders = table(
    "decoders",
    column("client_id", BigInteger),
    column("id", String),
    column("content", LargeBinary),
    column("bytes", BigInteger),
    column("used", BigInteger),
)
