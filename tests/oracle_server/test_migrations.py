from __future__ import annotations

from pathlib import Path

import pytest
from sqlalchemy import Connection, create_engine, inspect, text

from oracle_server.database import LedgerError
from oracle_server.ledger import Ledger
from oracle_server.migrations import MIGRATIONS, Migration, migrate
from oracle_server.tables import clients, entries, standing_keys


def test_a_blank_database_gets_every_table_that_queries_name(tmp_path: Path) -> None:
    engine = create_engine(f"sqlite:///{tmp_path / 'ledger.db'}")
    with engine.begin() as connection:
        assert migrate(connection) == [step.number for step in MIGRATIONS]
        assert migrate(connection) == []
        for table in (clients, entries, standing_keys):
            found = {column["name"] for column in inspect(connection).get_columns(table.name)}
            assert found == set(table.c.keys())
    engine.dispose()


def test_the_oldest_schema_keeps_its_rows_and_gets_the_later_steps(tmp_path: Path) -> None:
    def add_a_column(connection: Connection) -> None:
        connection.execute(text("ALTER TABLE clients ADD COLUMN note VARCHAR"))

    later = (*MIGRATIONS, Migration(MIGRATIONS[-1].number + 1, "a note", add_a_column))
    ledger = Ledger.open(str(tmp_path / "ledger.db"))
    ledger.add_client("a", 10)
    with ledger._writing.begin() as connection:
        assert migrate(connection, later) == [later[-1].number]
        assert connection.execute(text("SELECT name, note FROM clients")).all() == [("a", None)]
    ledger.close()
    with pytest.raises(LedgerError, match="newer"):
        Ledger.open(str(tmp_path / "ledger.db"))


def test_steps_are_numbered_without_a_gap() -> None:
    assert [step.number for step in MIGRATIONS] == list(range(1, len(MIGRATIONS) + 1))
