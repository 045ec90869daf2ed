"""Two replicas behind Ray Serve's proxy over one PostgreSQL ledger, asked by a real defender; one is killed under load.

The command runs as a process of its own, so that nothing of Ray is left in this one. It takes a minute: that of
starting Ray, of which there is one for all that is looked at here.
"""

from __future__ import annotations

import contextlib
import importlib.util
import itertools
import os
import queue
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import httpx
import numpy as np
import pytest
import torch
from databases import POSTGRESQL, ledger_url
from oracle_support import Caller, digits, logits_of, refused
from sqlalchemy import select

from defender_client.audit import audit
from defender_client.oracle_client import RemoteOracle
from defender_client.query_log import LOG_FILE, QueryLog
from defender_client.run_directory import locked
from oracle_server import tables
from oracle_server.ledger import Ledger
from oracle_server.loading import load_model
from oracle_server.settings import Settings
from shared.models.decoder import DecoderSpec, write
from shared.models.layers import Activation, Linear, Unflatten
from shared.wire import codec, protocol

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="Ray is not installed: extra 'ray'"),
    pytest.mark.timeout(300),
]
THREADS, REQUESTS, ROWS = 6, 9, 150
SHAPE = (1, 8, 8)
MOST_BODY = 2**20


@dataclass(frozen=True)
class Cluster:
    """A running `oracle-server ray`, and its ledger as this process sees it."""

    url: str
    ledger: Ledger
    log: Path

    def caller(self, name: str, budget: int) -> Caller:
        """A client, whose every request is on a connection of its own."""
        client, key = self.ledger.add_client(name, budget)
        return Caller(
            client, key.reveal(), httpx.Client(base_url=self.url, headers={"Connection": "close"}, timeout=60)
        )

    def servers(self) -> dict[str, int]:
        """Process ids of the replicas that the ledger knows."""
        with self.ledger.reading() as connection:
            return {row.id: row.pid for row in connection.execute(select(tables.servers))}


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    folder = tmp_path_factory.mktemp("ray")
    url, key = ledger_url(folder, POSTGRESQL), folder / "signing.key"
    options = ["--replicas", "2", "--num-cpus", "0.5", "--engine", "eager", "--engine-block", "1", "--allow-decoders"]
    options += ["--ledger", url, "--signing-key", str(key), "--port", "0", "--max-body-bytes", str(MOST_BODY)]
    with (
        (folder / "log").open("w") as log,
        subprocess.Popen(
            [sys.executable, "-m", "oracle_server", "ray", *options],
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            start_new_session=True,
        ) as child,
    ):
        lines: queue.Queue[str] = queue.Queue()
        threading.Thread(
            target=lambda: [lines.put(line) for line in itertools.chain(child.stdout or (), [""])], daemon=True
        ).start()
        try:
            line = "\n"
            while line and not line.startswith(
                "listening on http://127.0.0.1:"
            ):  # Ray may have something to say before
                line = lines.get(timeout=240)
            assert line, (folder / "log").read_text()
            ledger = Ledger.open(url, signing_key=key)
            yield Cluster(line.removeprefix("listening on ").strip(), ledger, folder / "log")
            child.send_signal(signal.SIGINT)
            assert child.wait(60) == 0, (folder / "log").read_text()
            with ledger.reading() as connection:  # every replica that could take its leave did
                assert connection.execute(select(tables.servers)).all() == []
            ledger.close()
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)  # Ray's processes end with it


def test_a_request_and_its_answer_pass_the_proxy_as_they_are(cluster: Cluster) -> None:
    caller = cluster.caller("wire", 1000)
    images = digits(5)
    answer = caller.infer(images, Idempotency_Key="a")
    model = load_model(Settings())
    with torch.no_grad():
        expected = model.module(torch.from_numpy(images)).numpy()
    assert np.allclose(logits_of(answer), expected, atol=1e-5)
    assert answer.headers[protocol.QUERY_CHARGE_HEADER] == "5"
    again = [caller.infer(images, Idempotency_Key="a") for _ in range(6)]  # whichever replica it is
    assert {each.headers[protocol.QUERY_CHARGE_HEADER] for each in again} == {"0"}
    assert {each.headers[protocol.QUERY_RECEIPT_HEADER] for each in again} == {
        answer.headers[protocol.QUERY_RECEIPT_HEADER]
    }
    assert {each.content for each in again} == {answer.content}
    refused(caller.infer(digits(6), Idempotency_Key="a"), 422, "idempotency-conflict")
    refused(caller.infer(images, Authorization="Bearer zo_none"), 401, "unauthorized")
    refused(caller.infer(images + 1), 422, "unacceptable-values")
    # Refused early, and told all the same to a client that is still sending.
    refused(
        caller.http.post(protocol.INFER_ROUTE, content=b"x" * 4 * MOST_BODY, headers=caller.headers), 413, "too-large"
    )
    for _ in range(4):
        assert caller.budget()["spent"] == 5
        assert 'oracle_queries_total{client="wire"} 5.0' in caller.http.get(protocol.METRICS_ROUTE).text


def test_a_replica_takes_the_cores_that_it_was_given(cluster: Cluster) -> None:
    assert "engine eager" in cluster.log.read_text()
    assert " 1 thread(s), blocks of 1 rows" in cluster.log.read_text()  # of half a core, and not of the machine's


def test_a_decoder_is_known_to_whichever_replica_is_asked(cluster: Cluster) -> None:
    caller = cluster.caller("decoders", 1000)
    layers = (Linear(features_in=4, features_out=64), Activation(kind="sigmoid"), Unflatten(shape=SHAPE))
    spec = DecoderSpec(latent=4, image_shape=SHAPE, layers=layers)
    file = write(spec, {name: torch.ones(shape) for name, shape in spec.tensors().items()})
    answer = caller.http.post(protocol.DECODERS_ROUTE, content=file, headers=caller.headers)
    assert answer.status_code == 201, answer.text
    asked = codec.encode_request(
        {"latents": np.zeros((2, 4), np.float32)}, parameters={"decoder": answer.json()["decoder"]}
    )
    assert {caller.post(asked).status_code for _ in range(10)} == {200}  # never 404: one of 1,024 by chance


def test_a_request_whose_client_hangs_up_is_finished_and_paid(cluster: Cluster) -> None:
    """Ray cancels it, and must not reach it: half of it may be done."""
    rows = 2000
    caller = cluster.caller("hangs-up", rows)
    encoded = codec.encode_request({"images": digits(rows)})
    head = {**caller.headers, "Host": "oracle", "Content-Length": str(encoded.size), "Idempotency-Key": "h"}
    head[protocol.JSON_LENGTH_HEADER] = str(encoded.json_length)
    lines = "".join(f"{name}: {value}\r\n" for name, value in head.items())
    host, port = cluster.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as connection:
        connection.sendall(f"POST {protocol.INFER_ROUTE} HTTP/1.1\r\n{lines}\r\n".encode() + bytes(encoded.body()))
        until(lambda: cluster.ledger.account(caller.client.id).held == rows)
    until(lambda: cluster.ledger.account(caller.client.id).held == 0)
    assert cluster.ledger.account(caller.client.id).spent == rows
    again = caller.post(encoded, Idempotency_Key="h")
    assert (again.status_code, again.headers[protocol.QUERY_CHARGE_HEADER]) == (200, "0")


def test_a_replica_that_is_killed_under_load_loses_and_doubles_no_charge(cluster: Cluster, tmp_path: Path) -> None:
    """The budget is what the requests cost to the query: one charge too many, and the last is refused."""
    caller = cluster.caller("load", THREADS * REQUESTS * ROWS)
    before = cluster.servers()
    assert len(before) == 2
    with locked(tmp_path / "run") as run_id:
        log = QueryLog(tmp_path / "run" / LOG_FILE)
        with (
            RemoteOracle(cluster.url, caller.key, log=log, run_id=run_id) as oracle,
            ThreadPoolExecutor(THREADS) as pool,
        ):

            def ask(thread: int) -> list[np.ndarray]:
                return [
                    oracle.query(digits(ROWS, thread * REQUESTS + n), purpose="train", label=f"{thread}/{n}")
                    for n in range(REQUESTS)
                ]

            asking = [pool.submit(ask, thread) for thread in range(THREADS)]
            victim = kill_one_that_computes(cluster, before)
            answers = list(itertools.chain.from_iterable(each.result() for each in asking))
            assert oracle.remaining == 0
    model = load_model(Settings())
    for number, logits in enumerate(answers):
        with torch.no_grad():
            assert np.allclose(logits, model.module(torch.from_numpy(digits(ROWS, number))).numpy(), atol=1e-4)
    account = cluster.ledger.account(caller.client.id)
    assert (account.spent, account.held, account.remaining) == (THREADS * REQUESTS * ROWS, 0, 0)
    entries = cluster.ledger.entries(caller.client.id, limit=10_000)
    charges = [entry for entry in entries if entry.kind == "charge"]
    assert len({entry.idempotency_key for entry in charges}) == len(charges) == THREADS * REQUESTS
    assert {entry.idempotency_key for entry in charges} == set(log.requests)
    # What it had begun was set free, and paid under the same key by the other.
    left = [entry for entry in entries if entry.kind == "release" and victim in (entry.note or "")]
    assert left
    assert {entry.idempotency_key for entry in left} <= {entry.idempotency_key for entry in charges}
    with RemoteOracle(cluster.url, caller.key) as oracle:
        found = audit([tmp_path / "run"], oracle)
        assert found.equal, found.differences
        assert found.logged == found.ledger == found.statement == found.metrics == account.spent
        refused(caller.infer(digits(1)), 403, "budget-exhausted")
    verified = cluster.ledger.verify()
    assert verified.intact, verified.findings
    until(lambda: len(cluster.servers().keys() - {victim}) == 2)  # Ray has put another in its place


def kill_one_that_computes(cluster: Cluster, servers: dict[str, int]) -> str:
    """Kill -9 a replica while it has a reservation open; its id. Stopped first, so that it cannot settle meanwhile."""
    open_ones = select(tables.requests.c.server).where(tables.requests.c.charge.is_(None))
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        with cluster.ledger.reading() as connection:
            found = connection.execute(open_ones.limit(1)).scalar_one_or_none()
        if found is None:
            continue
        os.kill(servers[found], signal.SIGSTOP)
        with cluster.ledger.reading() as connection:
            if found in set(connection.scalars(open_ones)):
                os.kill(servers[found], signal.SIGKILL)
                return str(found)
        os.kill(servers[found], signal.SIGCONT)
        time.sleep(0.01)
    raise AssertionError("no replica was ever found computing")


def until(condition: Callable[[], bool], seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)
