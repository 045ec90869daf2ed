"""The requests of query logs held against a ledger's charges, one by one, by their Idempotency-Key."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from defender_client.config import ConfigError
from defender_client.query_log import LOG_FILE, LoggedRequest, QueryLog

_EXAMPLES = 5


@dataclass(frozen=True)
class Matched:
    """What the logs say, settled by the ledger where an answer was lost; in queries.

    Attributes:
        purposes: queries by purpose.
        requests: requests that were answered and charged.
        lost: requests whose answer never came and which the ledger shows as charged.
        differences: one sentence for each request of which the two do not say the same.
    """

    purposes: dict[str, int]
    requests: int
    lost: int
    differences: tuple[str, ...]

    @property
    def total(self) -> int:
        """Queries in all."""
        return sum(self.purposes.values())


def read_logs(runs: Sequence[Path]) -> dict[str, LoggedRequest]:
    """The requests in the query logs of run directories, by key.

    Raises:
        ConfigError: a directory without a query log.
        LogDamaged: a log that somebody changed.
    """
    logged: dict[str, LoggedRequest] = {}
    for run in runs:
        try:
            logged |= QueryLog.of_run(run).requests
        except FileNotFoundError:
            raise ConfigError(f"{run} has no {LOG_FILE}: name the directories of runs made with this key") from None
    return logged


def match(logged: Mapping[str, LoggedRequest], charged: Mapping[str, int]) -> Matched:
    """Hold the logs against the ledger.

    Args:
        logged: requests by key.
        charged: queries that the ledger charged, refunds deducted, by key.
    """
    left = dict(charged)
    purposes: Counter[str] = Counter()
    differences: list[str] = []
    lost = 0
    for key, request in logged.items():
        on_ledger = left.pop(key, 0)
        if request.lost or (request.charged is None and not request.refused and on_ledger):
            lost += 1
        purposes[request.purpose] += on_ledger if request.charged is None else request.charged
        if request.charged is None and on_ledger not in (0, request.rows):
            differences.append(f"{key}: {request.rows} rows were sent, the ledger charged {on_ledger}")
        elif request.refused and request.charged is None and on_ledger:
            differences.append(f"{key}: refused ({request.refused}), but the ledger charged {on_ledger}")
        elif request.charged is not None and request.charged != on_ledger:
            differences.append(f"{key}: the client counted {request.charged}, the ledger {on_ledger}")
    differences += [
        f"{key}: the ledger charged {rows}, and no log here knows of it" for key, rows in left.items() if rows
    ]
    requests = sum(1 for request in logged.values() if request.charged)
    return Matched(dict(purposes), requests, lost, tuple(differences))


def name_of(seq: int, idempotency_key: str | None) -> str:
    """What a charge is matched by: its key, or where it stands."""
    return idempotency_key or f"entry {seq}, without a key"


def shortened(differences: Sequence[str]) -> tuple[str, ...]:
    """A few from the beginning, single requests, and the end, the totals; and how many stand between them."""
    if len(differences) <= 2 * _EXAMPLES:
        return tuple(differences)
    return (*differences[:_EXAMPLES], f"... {len(differences) - 2 * _EXAMPLES} more ...", *differences[-_EXAMPLES:])
