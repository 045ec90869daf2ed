"""Who is asking: an API key -> the ledger's client."""

from __future__ import annotations

from oracle_server.keys import ApiKey
from oracle_server.ledger import Client, Ledger
from shared.wire.errors import ClientRevoked, Unauthorized

_HOW = "send 'Authorization: Bearer KEY' with a key of 'oracle-server clients add'"


def authenticate(header: str | None, ledger: Ledger) -> Client:
    """The client whose key stands in an Authorization header.

    Args:
        header: the header's value, `Bearer KEY`; None if there was none.
        ledger: where clients and the hashes of their keys are.

    Raises:
        Unauthorized: no key, not written as one, or not known. Which of the last two is not told.
        ClientRevoked: the key is right and was revoked. Told only to who knows the secret.
    """
    if header is None:
        raise Unauthorized(f"no API key: {_HOW}")
    scheme, _, text = header.partition(" ")
    if scheme.lower() != "bearer":
        raise Unauthorized(f"the Authorization header is not of the scheme Bearer: {_HOW}")
    key = ApiKey.parse(text.strip())
    if key is None:
        raise Unauthorized(f"this API key is not known: {_HOW}")
    client = ledger.find_client(key.key_id)
    if not key.matches(client.key_hash if client else None) or client is None:
        raise Unauthorized(f"this API key is not known: {_HOW}")
    if client.revoked:
        raise ClientRevoked(f"the key of client '{client.name}' was revoked: ask the operator for another")
    return client
