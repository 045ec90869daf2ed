"""Prometheus scrapes a live oracle with the shipped configuration, and every expression of the board returns data."""

from __future__ import annotations

import contextlib
import json
import math
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
from oracle_support import Caller, digits, process

from oracle_server.ledger import Ledger
from shared.wire import protocol

ROOT = Path(__file__).parents[2]
CONFIG = ROOT / "monitoring" / "prometheus.yml"
BOARD = ROOT / "monitoring" / "grafana" / "dashboards" / "budgets.json"
TARGET = "oracle:8600"
BUDGET = 100_000
SECONDS = 60.0  # for anything that is waited for; on an idle machine it takes two

needs_promtool = pytest.mark.skipif(
    shutil.which("promtool") is None or shutil.which("prometheus") is None,
    reason="needs promtool and prometheus: apt-get install prometheus",
)


def expressions() -> dict[str, str]:
    """Every PromQL expression of the board, by the title of its panel and the letter of its query."""
    panels = json.loads(BOARD.read_text(encoding="utf-8"))["panels"]
    return {f"{panel['title']} {target['refId']}": target["expr"] for panel in panels for target in panel["targets"]}


def as_grafana_sends_it(expression: str, rate_interval: str = "10s") -> str:
    """The expression with the board's variables filled in."""
    filled = expression.replace("$__rate_interval", rate_interval).replace("$client", ".*")
    assert "$" not in filled, f"a variable that this test does not know: {expression}"
    return filled


@dataclass(frozen=True)
class LivePrometheus:
    """A Prometheus that scrapes the oracle each second."""

    http: httpx.Client

    def get(self, route: str, **params: str) -> Any:
        answer = self.http.get(f"/api/v1/{route}", params=params)
        assert answer.status_code == 200, answer.text
        return answer.json()["data"]

    def values(self, expression: str) -> list[float]:
        """What an instant query returns, without the labels."""
        return [float(sample["value"][1]) for sample in self.get("query", query=expression)["result"]]


@pytest.fixture(scope="module")
def caller(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Caller]:
    """A client of an oracle in a process of its own."""
    path = tmp_path_factory.mktemp("oracle") / "ledger.db"
    with contextlib.closing(Ledger.open(str(path))) as ledger:
        client, key = ledger.add_client("demo", BUDGET)
    with process(path) as (_, url), httpx.Client(base_url=url, timeout=30) as http:
        yield Caller(client, key.reveal(), http)


@pytest.fixture(scope="module")
def prometheus(caller: Caller, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LivePrometheus]:
    """The shipped configuration, but for the target and the interval."""
    here = tmp_path_factory.mktemp("prometheus")
    text = CONFIG.read_text(encoding="utf-8")
    assert text.count(TARGET) == text.count("scrape_interval: 5s") == 1
    config = here / "prometheus.yml"
    address = caller.http.base_url.netloc.decode()
    config.write_text(text.replace(TARGET, address).replace("scrape_interval: 5s", "scrape_interval: 1s"))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = ["prometheus", f"--config.file={config}", f"--storage.tsdb.path={here / 'data'}"]
    command += [f"--web.listen-address=127.0.0.1:{port}", "--log.level=warn"]
    with (
        (here / "log").open("w") as log,
        subprocess.Popen(command, stdout=log, stderr=log, cwd=here) as child,
        httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=10) as http,
    ):
        try:
            wait_for(lambda: answers(http), lambda: f"Prometheus: {(here / 'log').read_text()}")
            yield LivePrometheus(http)
        finally:
            child.kill()


def answers(http: httpx.Client) -> bool:
    with contextlib.suppress(httpx.TransportError):
        return http.get("/-/ready").status_code == 200
    return False


def wait_for(done: Callable[[], bool], what: Callable[[], str]) -> None:
    deadline = time.monotonic() + SECONDS
    while not done():
        assert time.monotonic() < deadline, what()
        time.sleep(0.2)


@needs_promtool
def test_the_configuration_is_valid() -> None:
    done = subprocess.run(["promtool", "check", "config", str(CONFIG)], capture_output=True, text=True, timeout=30)
    assert done.returncode == 0, done.stdout + done.stderr


@needs_promtool
def test_promtool_finds_nothing_to_say_about_the_metrics(caller: Caller) -> None:
    caller.infer(digits(3))
    metrics = caller.http.get(protocol.METRICS_ROUTE).text
    done = subprocess.run(["promtool", "check", "metrics"], input=metrics, capture_output=True, text=True, timeout=30)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@needs_promtool
def test_every_expression_of_the_board_returns_data(caller: Caller, prometheus: LivePrometheus) -> None:
    empty = expressions()

    def all_returned() -> bool:
        caller.infer(digits(5))
        caller.http.get(protocol.BUDGET_ROUTE)  # refused: no key
        for name in list(empty):
            values = prometheus.values(as_grafana_sends_it(empty[name]))
            if values and all(math.isfinite(value) for value in values):
                del empty[name]
        return not empty

    wait_for(all_returned, lambda: f"no data for {empty}")
    (target,) = prometheus.get("targets")["activeTargets"]
    assert (target["health"], target["labels"]["job"]) == ("up", "oracle")


@needs_promtool
def test_prometheus_reads_what_the_ledger_says(caller: Caller, prometheus: LivePrometheus) -> None:
    caller.infer(digits(7))
    account = caller.budget()
    wait_for(lambda: prometheus.values("oracle_queries_total") == [account["spent"]], lambda: str(account))
    assert prometheus.values("oracle_query_budget") == [account["budget"]] == [BUDGET]
    assert prometheus.values("oracle_queries_remaining") == [account["remaining"]]
    assert prometheus.values("oracle_queries_held") == [account["held"]] == [0]


@needs_promtool
def test_prometheus_reads_the_ledgers_length_and_its_verification(caller: Caller, prometheus: LivePrometheus) -> None:
    caller.infer(digits(2))
    head = caller.http.get(protocol.LEDGER_ROUTE, headers=caller.headers).json()["seq"]
    wait_for(lambda: prometheus.values("oracle_ledger_entries") == [head], lambda: str(head))
    wait_for(lambda: prometheus.values("oracle_ledger_verified_entries") == [head], lambda: str(head))
    assert prometheus.values("oracle_ledger_verified") == [1]


@needs_promtool
def test_prometheus_reads_refusals_by_client_and_reason(caller: Caller, prometheus: LivePrometheus) -> None:
    refusal = caller.infer(digits(1), Idempotency_Key="x" * 300)
    assert refusal.status_code == 400
    series = 'oracle_refusals_total{client="demo",code="malformed-request"}'
    wait_for(lambda: prometheus.values(series) == [1], lambda: series)


def test_the_board_names_every_metric_of_the_oracle() -> None:
    board = " ".join(expressions().values())
    for metric in (
        "oracle_queries_total",
        "oracle_query_budget",
        "oracle_queries_held",
        "oracle_queries_remaining",
        "oracle_refusals_total",
        "oracle_ledger_entries",
        "oracle_ledger_verified",
        "oracle_ledger_verified_entries",
        "oracle_requests_total",
        "oracle_request_duration_seconds",
        "oracle_batch_rows",
        "oracle_inference_seconds",
        "oracle_received_bytes_total",
        "oracle_sent_bytes_total",
    ):
        assert metric in board
