"""The parts of a running oracle, wired once and handed to the routes."""

from __future__ import annotations

from dataclasses import dataclass, field

from oracle_server.clock import utc_now
from oracle_server.cost_cache import CostCache
from oracle_server.dashboard import Spending
from oracle_server.decoders import Decoders
from oracle_server.gate import Gate
from oracle_server.ledger import Ledger
from oracle_server.metrics import Metrics
from oracle_server.oracle import Oracle
from oracle_server.policy.policy import Policy
from oracle_server.room import BodyRoom
from oracle_server.settings import Settings
from oracle_server.watch import Watch
from oracle_server.workers import Worker


@dataclass(frozen=True)
class Service:
    """Everything an answer needs. The ledger and the oracle are called only through their workers."""

    settings: Settings
    oracle: Oracle
    ledger: Ledger
    metrics: Metrics
    policy: Policy
    watch: Watch
    room: BodyRoom
    decoders: Decoders
    gate: Gate = field(default_factory=Gate)
    on_engine: Worker = field(default_factory=lambda: Worker("engine"))
    on_ledger: Worker = field(default_factory=lambda: Worker("ledger"))
    on_dashboard: Worker = field(default_factory=lambda: Worker("dashboard"))
    on_decoders: Worker = field(default_factory=lambda: Worker("decoders"))  # reads and builds them
    spending: CostCache[Spending] = field(default_factory=CostCache)  # touched on `on_dashboard` only
    started_at: str = field(default_factory=utc_now)

    def close(self) -> None:
        """Finish what was begun, then close the ledger."""
        self.watch.close()
        self.on_dashboard.close()
        self.on_decoders.close()
        self.on_engine.close()
        self.on_ledger.close()
        self.ledger.close()
