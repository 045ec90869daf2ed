"""What the client counted against what the server's ledger and metrics say: equal, or the difference.

Three accounts of the same spending meet: the run directories' query logs, the ledger's entries of this client, and the
`oracle_queries_total` series of the metrics. Requests are matched one by one by their Idempotency-Key.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from prometheus_client.parser import text_string_to_metric_families

from defender_client.config import ConfigError
from defender_client.oracle_client import RemoteOracle
from defender_client.query_log import LOG_FILE, LoggedRequest, QueryLog

_EXAMPLES = 5


@dataclass(frozen=True)
class Audit:
    """The three accounts and where they differ, in queries.

    Attributes:
        client: the client's name on the server.
        logged: what the logs say was charged, requests whose answer was lost included as the ledger settles them.
        ledger: the sum of the ledger's entries of this client.
        statement: `spent` of `GET /v1/budget`.
        metrics: `oracle_queries_total` of this client; None where the metrics do not show it.
        budget: the client's budget.
        purposes: queries by purpose, from the logs.
        requests: requests in the logs that were charged.
        lost: requests whose answer never came and which the ledger shows as charged.
        differences: one sentence each; empty when all agree.
    """

    client: str
    logged: int
    ledger: int
    statement: int
    metrics: int | None
    budget: int
    purposes: dict[str, int]
    requests: int
    lost: int
    differences: tuple[str, ...] = field(default=())

    @property
    def equal(self) -> bool:
        """Whether the accounts agree to the query."""
        return not self.differences


def audit(runs: Sequence[Path], oracle: RemoteOracle) -> Audit:
    """Compare the logs of `runs`, all the runs made with this client's key, with the server's accounts.

    Raises:
        ConfigError: a directory without a query log.
    """
    logged = _read_logs(runs)
    statement = oracle.budget()
    if statement is None:
        raise ConfigError("this server keeps no ledger: there is nothing to audit against")
    entries: Counter[str] = Counter()
    ledger = 0
    for entry in oracle.charges():
        ledger += entry.rows
        if entry.rows:
            entries[entry.idempotency_key or f"entry {entry.seq}, without a key"] += entry.rows
    differences: list[str] = []
    purposes: Counter[str] = Counter()
    lost = 0
    for key, request in logged.items():
        on_ledger = entries.pop(key, 0)
        if request.charged is None and not request.refused and on_ledger:
            lost += 1
        counted = on_ledger if request.charged is None else request.charged
        purposes[request.purpose] += counted
        if request.charged is None and on_ledger not in (0, request.rows):
            differences.append(f"{key}: {request.rows} rows were sent, the ledger charged {on_ledger}")
        elif request.refused and request.charged is None and on_ledger:
            differences.append(f"{key}: refused ({request.refused}), but the ledger charged {on_ledger}")
        elif request.charged is not None and request.charged != on_ledger:
            differences.append(f"{key}: the client counted {request.charged}, the ledger {on_ledger}")
    for key, rows in entries.items():
        if rows:
            differences.append(f"{key}: the ledger charged {rows}, and no log here knows of it")
    total = purposes.total()
    metrics = _queries_total(oracle.metrics(), statement.client)
    for name, value in (("ledger", ledger), ("budget statement", statement.spent), ("metrics", metrics)):
        if value is None:
            differences.append("the metrics do not show this client")
        elif value != total:
            differences.append(f"the client counted {total:,} queries, the server's {name} says {value:,}")
    return Audit(
        client=statement.client,
        logged=total,
        ledger=ledger,
        statement=statement.spent,
        metrics=metrics,
        budget=statement.budget,
        purposes=dict(purposes),
        requests=sum(1 for request in logged.values() if request.charged),
        lost=lost,
        differences=_shortened(differences),
    )


def _read_logs(runs: Sequence[Path]) -> dict[str, LoggedRequest]:
    logged: dict[str, LoggedRequest] = {}
    for run in runs:
        if not (run / LOG_FILE).exists():
            raise ConfigError(f"{run} has no {LOG_FILE}: name the directories of runs made with this key")
        logged |= QueryLog.read(run / LOG_FILE).requests
    return logged


def _shortened(differences: list[str]) -> tuple[str, ...]:
    """The totals' differences, which stand last, and a few examples of single requests."""
    if len(differences) <= 2 * _EXAMPLES:
        return tuple(differences)
    return (*differences[:_EXAMPLES], f"... {len(differences) - 2 * _EXAMPLES} more ...", *differences[-_EXAMPLES:])


def _queries_total(metrics: str, client: str) -> int | None:
    for family in text_string_to_metric_families(metrics):
        for sample in family.samples:
            if sample.name == "oracle_queries_total" and sample.labels.get("client") == client:
                return int(sample.value)
    return None
