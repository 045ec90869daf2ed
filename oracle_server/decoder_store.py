"""Registered decoders in the ledger's database, where every server of the ledger finds them.

Behind one address a client's next request may reach another server than its registration did. What is kept is the file
as it was sent: each server reads and checks it by itself. The table is no part of the account.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager

from sqlalchemy import ColumnElement, Connection, and_, delete, insert, select, update
from sqlalchemy.exc import IntegrityError, SQLAlchemyError

from oracle_server.database import connect, parse_url
from oracle_server.settings import Settings
from oracle_server.tables import decoders
from shared.wire.errors import Unavailable

log = logging.getLogger(__name__)
_RETRY_AFTER_S = 5.0
_RECENT_FIRST = decoders.c.used.desc()


class DecoderStore:
    """The decoders of all clients, within the limits that the settings set; used from any thread.

    Every method raises `Unavailable` where the database fails.

    Args:
        settings: which ledger, opened before so that its tables are there, and the limits.
    """

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._engine = connect(parse_url(settings.ledger), create=False, timeout=settings.ledger_timeout)

    def keep(self, client_id: int, name: str, content: bytes, size: int) -> None:
        """Keep a client's decoder, as the one used last; those used least recently go where there are too many.

        Args:
            client_id: whose it is.
            name: its id.
            content: the file.
            size: bytes of its weights.
        """
        row = {"client_id": client_id, "id": name, "content": content, "bytes": size, "used": time.time_ns()}
        with self._changing() as connection:
            if not self._touch(connection, client_id, name):
                try:
                    with connection.begin_nested():
                        connection.execute(insert(decoders), [row])
                except IntegrityError:
                    return  # another server kept it at this moment
            self._evict(connection, client_id)

    def find(self, client_id: int, name: str) -> bytes | None:
        """A client's decoder by its id, the one used last from now on; None if there is none."""
        with self._changing() as connection:
            if not self._touch(connection, client_id, name):
                return None
            return bytes(connection.execute(select(decoders.c.content).where(_is(client_id, name))).scalar_one())

    def names(self, client_id: int) -> list[str]:
        """Ids of a client's decoders, the least recently used first."""
        with self._changing() as connection:
            found = select(decoders.c.id).where(decoders.c.client_id == client_id).order_by(decoders.c.used)
            return list(connection.scalars(found))

    def forget(self, client_id: int, name: str) -> bool:
        """Let go of a client's decoder; whether it was there."""
        with self._changing() as connection:
            return bool(connection.execute(delete(decoders).where(_is(client_id, name))).rowcount)

    def close(self) -> None:
        """Close the database's connections."""
        self._engine.dispose()

    def _touch(self, connection: Connection, client_id: int, name: str) -> bool:
        changed = connection.execute(update(decoders).where(_is(client_id, name)).values(used=time.time_ns()))
        return bool(changed.rowcount)

    def _evict(self, connection: Connection, client_id: int) -> None:
        """The first of each list stays: it is the decoder that was just kept."""
        limits = self._settings
        all_of_them = select(decoders.c.client_id, decoders.c.id, decoders.c.bytes).order_by(_RECENT_FIRST)
        own = connection.execute(all_of_them.where(decoders.c.client_id == client_id)).all()
        gone = {(row.client_id, row.id) for row in own[limits.max_client_decoders :]}
        kept = total = 0
        for row in connection.execute(all_of_them):
            if (row.client_id, row.id) in gone:
                continue
            total += row.bytes
            if kept and (kept >= limits.max_decoders or total > limits.max_decoders_bytes):
                gone.add((row.client_id, row.id))
            kept += 1
        for owner, name in gone:
            connection.execute(delete(decoders).where(_is(owner, name)))

    @contextmanager
    def _changing(self) -> Iterator[Connection]:
        try:
            with self._engine.begin() as connection:
                yield connection
        except SQLAlchemyError as error:
            log.error("decoders: %s", error)
            raise Unavailable(
                "the database of the decoders cannot be read or written now: try again later",
                retry_after=_RETRY_AFTER_S,
            ) from error


def _is(client_id: int, name: str) -> ColumnElement[bool]:
    return and_(decoders.c.client_id == client_id, decoders.c.id == name)
