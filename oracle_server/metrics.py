"""What Prometheus reads: queries from the ledger, so that they survive any crash; the rest from this process."""

from __future__ import annotations

import time
from collections.abc import Iterable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from oracle_server.ledger import Ledger
from oracle_server.refusals import refusal_of
from oracle_server.watch import Watch
from shared.wire.errors import Overloaded

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
_ROWS = tuple(float(2**i) for i in range(0, 14))


class QueryCollector(Collector):
    """Each client's account, read from the ledger at the moment of the scrape."""

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger

    def describe(self) -> Iterable[Metric]:
        return self._families()

    def collect(self) -> Iterable[Metric]:
        total, budget, held, remaining = families = self._families()
        for client in self._ledger.list_clients():
            total.add_metric([client.name], client.spent)
            budget.add_metric([client.name], client.budget)
            held.add_metric([client.name], client.held)
            remaining.add_metric([client.name], client.account.remaining)
        return families

    @staticmethod
    def _families() -> tuple[CounterMetricFamily, GaugeMetricFamily, GaugeMetricFamily, GaugeMetricFamily]:
        return (
            CounterMetricFamily("oracle_queries", "Queries charged in the ledger.", labels=["client"]),
            GaugeMetricFamily("oracle_query_budget", "Lifetime budget in queries.", labels=["client"]),
            GaugeMetricFamily("oracle_queries_held", "Queries set aside for requests in flight.", labels=["client"]),
            GaugeMetricFamily("oracle_queries_remaining", "Queries left of the budget.", labels=["client"]),
        )


class LedgerCollector(Collector):
    """How long the ledger is, and whether it was found whole."""

    def __init__(self, ledger: Ledger, watch: Watch) -> None:
        self._ledger, self._watch = ledger, watch

    def describe(self) -> Iterable[Metric]:
        return self._families()

    def collect(self) -> Iterable[Metric]:
        entries, followed, verified = families = self._families()
        entries.add_metric([], self._ledger.head().head.seq)
        verdict = self._watch.verdict
        followed.add_metric([], verdict.verified)
        if verdict.state == "broken" or verdict.checked_at is not None:  # before that, nothing can be said
            verified.add_metric([], 0 if verdict.state == "broken" else 1)
        return families

    @staticmethod
    def _families() -> tuple[GaugeMetricFamily, GaugeMetricFamily, GaugeMetricFamily]:
        return (
            GaugeMetricFamily("oracle_ledger_entries", "Entries of the ledger, by its signed head.", labels=[]),
            GaugeMetricFamily("oracle_ledger_verified_entries", "Entries this process has verified.", labels=[]),
            GaugeMetricFamily(
                "oracle_ledger_verified",
                "1 where the chain, its signed head and the accounts are whole, 0 where not; none until checked.",
                labels=[],
            ),
        )


class Metrics:
    """The metrics of one app, in a registry of its own."""

    def __init__(self, ledger: Ledger, watch: Watch) -> None:
        self._registry = registry = CollectorRegistry()
        registry.register(QueryCollector(ledger))
        registry.register(LedgerCollector(ledger, watch))
        self.refusals = Counter(
            "oracle_refusals",
            "Requests refused, by the client whose key they carried ('' where there was no valid one) and the reason.",
            ["client", "code"],
            registry=registry,
        )
        self.requests = Counter("oracle_requests", "HTTP requests answered.", ["status"], registry=registry)
        self.duration = Histogram(
            "oracle_request_duration_seconds",
            "Time from a request's head to the end of its answer.",
            buckets=_SECONDS,
            registry=registry,
        )
        self.batch_rows = Histogram(
            "oracle_batch_rows", "Rows of an answered inference request.", buckets=_ROWS, registry=registry
        )
        self.block_rows = Histogram(
            "oracle_block_rows", "Rows the engine computed at once, of all requests.", buckets=_ROWS, registry=registry
        )
        self.inference = Histogram(
            "oracle_inference_seconds", "Time the engine took for a block.", buckets=_SECONDS, registry=registry
        )
        self.queue_rows = Gauge(
            "oracle_queue_rows", "Rows of the requests let in and not answered yet.", registry=registry
        )
        self.queue_requests = Gauge("oracle_queue_requests", "Requests let in and not answered yet.", registry=registry)
        self.overload = Histogram(
            "oracle_overload_refusal_seconds",
            "Time from the end of a request that found the queue full to the start of its refusal.",
            buckets=_SECONDS,
            registry=registry,
        )
        self.queue_wait = Histogram(
            "oracle_queue_wait_seconds",
            "Time a request waited for the engine, until its first rows were taken.",
            buckets=_SECONDS,
            registry=registry,
        )
        self.received = Counter("oracle_received_bytes", "Bytes of request bodies received.", registry=registry)
        self.sent = Counter("oracle_sent_bytes", "Bytes of answers' bodies sent.", registry=registry)

    def computed(self, rows: int, seconds: float) -> None:
        """The engine has computed a block."""
        self.block_rows.observe(rows)
        self.inference.observe(seconds)

    def refusals_by_client(self) -> dict[str, dict[str, int]]:
        """How many requests were refused since this process started: by client ('' without a valid key) and code."""
        counts: dict[str, dict[str, int]] = {}
        for family in self.refusals.collect():
            for sample in family.samples:
                if sample.name == "oracle_refusals_total":
                    counts.setdefault(sample.labels["client"], {})[sample.labels["code"]] = int(sample.value)
        return counts

    def render(self, accept: str, client: str | None = None) -> tuple[bytes, str]:
        """The exposition and its content type, in the format that an Accept header prefers. Reads the ledger.

        Of everything, or of one client's own series only.
        """
        encode, content_type = choose_encoder(accept)
        return encode(self._registry if client is None else OwnSeries(self._registry, client)), content_type


class OwnSeries(Collector):
    """Of another collector's series those of one client: not even the others' names, nor what the process did."""

    def __init__(self, source: Collector, client: str) -> None:
        self._source = source
        self._client = client

    def collect(self) -> Iterable[Metric]:
        for family in self._source.collect():
            family.samples = [sample for sample in family.samples if sample.labels.get("client") == self._client]
            if family.samples:
                yield family


class MetricsMiddleware:
    """Counts requests and their bytes, and takes their time."""

    def __init__(self, app: ASGIApp, *, metrics: Metrics) -> None:
        self._app = app
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        metrics, start, status = self._metrics, time.perf_counter(), "500"
        arrived, refused_after = start, 0.0

        async def counting_receive() -> Message:
            nonlocal arrived
            message = await receive()
            arrived = time.perf_counter()
            metrics.received.inc(len(message.get("body", b"")))
            return message

        async def counting_send(message: Message) -> None:
            nonlocal status, refused_after
            if message["type"] == "http.response.start":
                status = str(message["status"])
                refused_after = time.perf_counter() - arrived
            metrics.sent.inc(len(message.get("body", b"")))
            await send(message)

        try:
            await self._app(scope, counting_receive, counting_send)
        finally:
            refusal = refusal_of(scope)
            if refusal is not None:
                metrics.refusals.labels(*refusal).inc()
                if refusal[1] == Overloaded.code:
                    metrics.overload.observe(refused_after)
            metrics.requests.labels(status).inc()
            metrics.duration.observe(time.perf_counter() - start)
