"""The parts of a running oracle, wired once and handed to the routes."""

from __future__ import annotations

from dataclasses import dataclass, field

from oracle_server.admission import Admission
from oracle_server.batching import Batcher
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
from oracle_server.shedding import Shedder
from oracle_server.watch import Watch
from oracle_server.workers import Worker


@dataclass(frozen=True)
class Service:
    """Everything an answer needs. The ledger is called only by its worker, the engine only by the batcher."""

    settings: Settings
    oracle: Oracle
    ledger: Ledger
    metrics: Metrics
    policy: Policy
    watch: Watch
    room: BodyRoom
    decoders: Decoders
    gate: Gate
    batcher: Batcher
    admission: Admission
    shedder: Shedder
    # Two: one large body does not hold all the others up, and more would only take cores from the engine.
    on_bodies: Worker = field(default_factory=lambda: Worker("bodies", threads=2))
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
        self.on_bodies.close()
        self.batcher.close()
        self.on_ledger.close()
        self.decoders.close()
        self.ledger.close()
