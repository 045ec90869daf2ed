from __future__ import annotations

from pathlib import Path

from oracle_support import Caller, Running, digits, refused, running
from prometheus_client.parser import text_string_to_metric_families

from oracle_server.settings import Settings
from shared.wire import protocol


def scrape(server: Running) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    """Every sample of /metrics by name and labels."""
    answer = server.http.get(protocol.METRICS_ROUTE)
    assert answer.headers["content-type"].startswith("text/plain; version=0.0.4")
    families = text_string_to_metric_families(answer.text)
    return {(s.name, frozenset(s.labels.items())): s.value for family in families for s in family.samples}


def test_the_query_series_are_the_ledgers(server: Running, caller: Caller) -> None:
    caller.infer(digits(3))
    caller.infer(digits(4))
    server.ledger.set_budget(caller.client.name, 50)
    account = server.ledger.account(caller.client.id)
    label = frozenset({("client", caller.client.name)})
    samples = scrape(server)
    assert samples["oracle_queries_total", label] == account.spent == 7
    assert samples["oracle_query_budget", label] == account.budget == 50
    assert samples["oracle_queries_remaining", label] == account.remaining == 43


def test_the_process_counts_what_it_did(server: Running, caller: Caller) -> None:
    before = scrape(server)
    sent = caller.infer(digits(3))
    caller.http.get("/nothing")
    after = scrape(server)

    def grown(name: str, **labels: str) -> float:
        key = (name, frozenset(labels.items()))
        return after[key] - before.get(key, 0.0)

    assert grown("oracle_requests_total", status="404") == 1
    assert grown("oracle_requests_total", status="200") == 2  # the query, and the scrape before it
    assert grown("oracle_batch_rows_sum") == 3
    assert grown("oracle_batch_rows_count") == grown("oracle_inference_seconds_count") == 1
    assert grown("oracle_request_duration_seconds_count") == 3
    assert grown("oracle_received_bytes_total") == int(sent.request.headers["content-length"])
    assert grown("oracle_sent_bytes_total") > len(sent.content)


def test_every_series_has_help_and_a_type(server: Running) -> None:
    lines = server.http.get(protocol.METRICS_ROUTE).text.splitlines()
    named = {line.split()[2] for line in lines if line.startswith("# HELP")}
    typed = {line.split()[2] for line in lines if line.startswith("# TYPE")}
    assert named == typed
    assert all(len(line.split()) > 3 for line in lines if line.startswith("# HELP"))


def test_a_scraper_may_ask_for_openmetrics(server: Running) -> None:
    answer = server.http.get(protocol.METRICS_ROUTE, headers={"Accept": "application/openmetrics-text; version=1.0.0"})
    assert answer.headers["content-type"].startswith("application/openmetrics-text")
    assert answer.text.endswith("# EOF\n")


def test_with_keys_each_sees_its_own_series_and_nothing_else(tmp_path: Path) -> None:
    with running(Settings(ledger=str(tmp_path / "ledger.db"), metrics_access="keyed")) as server:
        caller, other = server.caller(), server.caller()
        caller.infer(digits(3))
        other.infer(digits(4))
        refused(server.http.get(protocol.METRICS_ROUTE), 401, "unauthorized")
        text = server.http.get(protocol.METRICS_ROUTE, headers=caller.headers).text
        samples = [sample for family in text_string_to_metric_families(text) for sample in family.samples]
        values = {sample.name: sample.value for sample in samples}
        assert {"oracle_queries_total", "oracle_query_budget", "oracle_queries_remaining"} <= set(values)
        assert all(sample.labels == {"client": caller.client.name} for sample in samples)
        assert values["oracle_queries_total"] == 3
        assert other.client.name not in text
        server.ledger.revoke(caller.client.name)
        refused(server.http.get(protocol.METRICS_ROUTE, headers=caller.headers), 403, "client-revoked")
