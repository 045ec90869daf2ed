"""A key is shown once, to who made it, and stands nowhere else: no log, no answer, no file."""

from __future__ import annotations

import contextlib
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import safetensors.torch
import torch
from oracle_support import Caller, digits
from typer.testing import CliRunner, Result

from oracle_server.cli import app
from oracle_server.keys import ApiKey
from oracle_server.ledger import Ledger
from oracle_server.loading import SHIPPED
from shared.wire import protocol


def broken_weights(path: Path) -> Path:
    """Weights whose logits are not finite, so that an answer in JSON fails within the server."""
    tensors = safetensors.torch.load_file(SHIPPED["digits-cnn"])
    with safetensors.safe_open(SHIPPED["digits-cnn"], "pt") as file:
        metadata = file.metadata()
    safetensors.torch.save_file(
        {n: t * torch.nan if t.is_floating_point() else t for n, t in tensors.items()}, path, metadata
    )
    return path


def cli(*arguments: str) -> Result:
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    return result


@contextlib.contextmanager
def talking(out: Path, err: Path, *options: str) -> Iterator[str]:
    """A server that logs all it can; what it says goes to files, where no reader can make it wait. Yields its URL."""
    command = [sys.executable, "-m", "oracle_server", "serve", "--port", "0", "--log-level", "debug", *options]
    with (
        out.open("w") as stdout,
        err.open("w") as stderr,
        subprocess.Popen(command, stdout=stdout, stderr=stderr) as child,
    ):
        try:
            deadline = time.monotonic() + 60
            while not (said := out.read_text()).endswith("\n"):
                assert time.monotonic() < deadline, err.read_text()
                time.sleep(0.05)
            yield said.removeprefix("listening on ").strip()
            child.send_signal(signal.SIGTERM)
            assert child.wait(60) == 0
        finally:
            child.kill()


def test_a_key_stands_nowhere(tmp_path: Path) -> None:
    path, key_file = tmp_path / "ledger.db", tmp_path / "key"
    at = ("--ledger", str(path))
    added = cli("clients", "add", "a", "--budget", "1000", *at)
    keys = [added.stdout.strip()]
    said = [added.stderr]
    in_file = cli("clients", "add", "b", "--budget", "1000", "--key-file", str(key_file), *at)
    keys.append(key_file.read_text().strip())
    said += [in_file.stdout, in_file.stderr]
    parsed = [ApiKey.parse(key) for key in keys]
    secrets = [key.secret for key in parsed if key is not None]
    assert len(secrets) == 2
    for command in (("clients", "list"), ("clients", "list", "--json"), ("ledger", "verify"), ("ledger", "export")):
        done = cli(*command, *at)
        said += [done.stdout, done.stderr]

    weights = broken_weights(tmp_path / "nan.safetensors")
    out, err = tmp_path / "stdout", tmp_path / "stderr"
    with talking(out, err, *at, "--weights", str(weights)) as url, httpx.Client(base_url=url, timeout=30) as http:
        ledger = Ledger.open(str(path))
        answers = []
        for key, name in zip(keys, ("a", "b"), strict=True):
            caller = Caller(ledger.get_client(name), key, http)
            wrong = Caller(caller.client, key[:-4] + "AAAA", http)
            secrets.append(wrong.key.split("_", 2)[2])
            answers += [
                caller.infer(digits(1), Idempotency_Key="k"),
                caller.infer(digits(1), binary=False),  # fails within the server
                caller.infer(digits(2), Idempotency_Key="k"),
                caller.http.get(protocol.BUDGET_ROUTE, headers=caller.headers),
                caller.http.get(protocol.CHARGES_ROUTE, headers=caller.headers),
                caller.http.get(f"{protocol.CHARGES_ROUTE}?after={key}", headers=caller.headers),
                caller.http.post(protocol.INFER_ROUTE, content=b"{", headers=caller.headers),
                wrong.infer(digits(1)),
                http.get(f"{protocol.BUDGET_ROUTE}?api_key={key}"),
                http.get(f"/nothing?api_key={key}", headers=caller.headers),
                http.get(protocol.BUDGET_ROUTE, headers={"Authorization": key}),
                http.get(protocol.BUDGET_ROUTE, headers={"Authorization": f"Basic {key}"}),
                http.get(protocol.BUDGET_ROUTE, headers={"Authorization": f"Bearer {key}x"}),
                http.get(protocol.BUDGET_ROUTE, headers=[("Authorization", f"Bearer {key}")] * 2),
                http.get(protocol.METRICS_ROUTE, headers=caller.headers),
                http.put(protocol.INFER_ROUTE, headers=caller.headers),
            ]
            host, port = url.removeprefix("http://").split(":")
            for head in (
                f"GET /v2 HTTP/1.1\r\nAuthorization: Bearer {key}\r\nbroken header\r\n\r\n",
                f"GET /{key} HTTP/7.1\r\n\r\n",
                f"{key} /v2 HTTP/1.1\r\n\r\n",
                f"GET /v2 HTTP/1.1\r\nAuthorization: Bearer {key}\r\nX: {'x' * 70_000}\r\n\r\n",
            ):
                with socket.create_connection((host, int(port)), timeout=10) as connection:
                    connection.sendall(head.encode())
                    said.append(connection.recv(65536).decode())
            ledger.revoke(name)
            answers.append(caller.infer(digits(1)))
        ledger.close()
        assert {200, 400, 401, 403, 404, 405, 422, 500} <= {answer.status_code for answer in answers}
        said += [answer.text + str(answer.headers) for answer in answers]
    said += [out.read_text(), err.read_text()]
    assert len(re.findall(" sqlalchemy.engine", said[-1])) > 20  # it did talk

    for secret in secrets:
        assert not any(secret in text for text in said)
        for file in tmp_path.rglob("*"):
            if file.is_file() and file != key_file:
                assert secret.encode() not in file.read_bytes(), file
