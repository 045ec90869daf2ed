"""The ledger as lines of JSON, for whoever is to audit it without the server."""

from __future__ import annotations

from collections.abc import Iterator

from oracle_server import chain
from oracle_server.database import LedgerError
from oracle_server.ledger import Ledger
from oracle_server.verification import kept_entries
from shared.audit import export
from shared.audit.chain import NotAnEntry


def export_lines(ledger: Ledger, client: str | None = None) -> Iterator[str]:
    """The exported ledger line by line, as it stands at one moment (`shared.audit.export` says what the lines are).

    Args:
        client: show this client's entries only, and the leaves of the others.

    Raises:
        UnknownClient: no client has this name.
        LedgerError: a row of the ledger is no entry at all.
    """
    shown = None if client is None else ledger.get_client(client).id
    yield export.first_line(ledger.identity.ledger, ledger.identity.public_key, shown)
    with ledger.reading() as connection:
        try:
            for entry, kept_hash in kept_entries(connection):
                write = export.entry_line if shown in (None, entry.client_id) else export.redacted_line
                yield write(entry, kept_hash or "")
        except NotAnEntry as error:
            raise LedgerError(f"the ledger was changed by other hands, and cannot be exported: {error}") from None
        yield export.last_line(chain.signed_head(connection))
