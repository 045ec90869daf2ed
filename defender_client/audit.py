"""What the client counted against what the server's ledger and metrics say: equal, or the difference.

Three accounts of the same spending meet: the run directories' query logs, the ledger's entries of this client, and the
`oracle_queries_total` series of the metrics. Requests are matched one by one by their Idempotency-Key, and the receipts
that came with the answers are held against all of it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from prometheus_client.parser import text_string_to_metric_families

from defender_client.config import ConfigError
from defender_client.matching import match, name_of, read_logs, shortened
from defender_client.oracle_client import RemoteOracle
from defender_client.pinning import pinned_by
from defender_client.signed import check_signed


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
        receipts: receipts in the logs that are good.
        key_from: where the key that they were checked with is from; None where there is none.
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
    receipts: int = 0
    key_from: str | None = None
    differences: tuple[str, ...] = field(default=())

    @property
    def equal(self) -> bool:
        """Whether the accounts agree to the query."""
        return not self.differences


def audit(runs: Sequence[Path], oracle: RemoteOracle, public_key: bytes | None = None) -> Audit:
    """Compare the logs of `runs`, all the runs made with this client's key, with the server's accounts.

    Args:
        runs: their directories.
        oracle: the server, asked with the client's key.
        public_key: the key to trust, 32 bytes; None for the one that the runs kept when they began, or, where they kept
            none, the one that the server names now.

    Raises:
        ConfigError: a directory without a query log, or a server without a ledger.
    """
    logged = read_logs(runs)
    statement = oracle.budget()
    if statement is None:
        raise ConfigError("this server keeps no ledger: there is nothing to audit against")
    entries = list(oracle.charges())
    charged: Counter[str] = Counter()
    for entry in entries:
        charged[name_of(entry.seq, entry.idempotency_key)] += entry.rows
    matched = match(logged, charged)
    signed = check_signed(oracle.ledger(), entries, logged.values(), pinned_by(runs), public_key)
    differences = [*matched.differences, *signed.differences]
    metrics = _queries_total(oracle.metrics(), statement.client)
    total = matched.total
    for name, value in (("ledger", charged.total()), ("budget statement", statement.spent), ("metrics", metrics)):
        if value is None:
            differences.append("the metrics do not show this client")
        elif value != total:
            differences.append(f"the client counted {total:,} queries, the server's {name} says {value:,}")
    return Audit(
        client=statement.client,
        logged=total,
        ledger=charged.total(),
        statement=statement.spent,
        metrics=metrics,
        budget=statement.budget,
        purposes=matched.purposes,
        requests=matched.requests,
        lost=matched.lost,
        receipts=signed.receipts,
        key_from=signed.key_from,
        differences=shortened(differences),
    )


def _queries_total(metrics: str, client: str) -> int | None:
    for family in text_string_to_metric_families(metrics):
        for sample in family.samples:
            if sample.name == "oracle_queries_total" and sample.labels.get("client") == client:
                return int(sample.value)
    return None
