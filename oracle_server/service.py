"""The parts of a running oracle, wired once and handed to the routes."""

from __future__ import annotations

from dataclasses import dataclass, field

from oracle_server.gate import Gate
from oracle_server.ledger import Ledger
from oracle_server.metrics import Metrics
from oracle_server.oracle import Oracle
from oracle_server.settings import Settings
from oracle_server.workers import Worker


@dataclass(frozen=True)
class Service:
    """Everything an answer needs. The ledger and the oracle are called only through their workers."""

    settings: Settings
    oracle: Oracle
    ledger: Ledger
    metrics: Metrics
    gate: Gate = field(default_factory=Gate)
    on_engine: Worker = field(default_factory=lambda: Worker("engine"))
    on_ledger: Worker = field(default_factory=lambda: Worker("ledger"))

    def close(self) -> None:
        """Finish what was begun, then close the ledger."""
        self.on_engine.close()
        self.on_ledger.close()
        self.ledger.close()
