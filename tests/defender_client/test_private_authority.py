"""https oracles whose certificate an authority of one's own signed: trusted when it is named, and only then."""

from __future__ import annotations

import ipaddress
import ssl
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from defender_support import write_tiny
from typer.testing import CliRunner

from defender_client.cli import app
from defender_client.config import ConfigError
from defender_client.oracle_client import OracleUnreachable, RemoteOracle
from shared.wire import protocol

STATEMENT = protocol.BudgetStatement(client="a", budget=10, spent=3, remaining=7)


@dataclass(frozen=True)
class Authority:
    """A certificate authority with one certificate, for 127.0.0.1."""

    ca: Path
    chain: Path


def authority(folder: Path) -> Authority:
    folder.mkdir()
    now, keys = datetime.now(UTC), [ec.generate_private_key(ec.SECP256R1()) for _ in range(2)]
    names = [x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)]) for name in ("our authority", "oracle")]
    certificates = []
    for subject, key, is_ca in ((names[0], keys[0], True), (names[1], keys[1], False)):
        made = (
            x509.CertificateBuilder(names[0], subject, key.public_key(), x509.random_serial_number())
            .not_valid_before(now - timedelta(hours=1))
            .not_valid_after(now + timedelta(hours=1))
            .add_extension(x509.BasicConstraints(is_ca, None), critical=True)
        )
        if not is_ca:
            address = x509.IPAddress(ipaddress.ip_address("127.0.0.1"))
            made = made.add_extension(x509.SubjectAlternativeName([address]), critical=False)
        certificates.append(made.sign(keys[0], hashes.SHA256()).public_bytes(serialization.Encoding.PEM))
    private = keys[1].private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    (folder / "ca.pem").write_bytes(certificates[0])
    (folder / "chain.pem").write_bytes(certificates[1] + private)
    return Authority(folder / "ca.pem", folder / "chain.pem")


class Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        body = STATEMENT.model_dump_json().encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture(scope="module")
def ours(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return authority(tmp_path_factory.mktemp("tls") / "ours")


@pytest.fixture(scope="module")
def url(ours: Authority) -> Iterator[str]:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(ours.chain)
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.handle_error = lambda *_: None  # type: ignore[method-assign]  # a client that does not trust it hangs up
        server.socket = context.wrap_socket(server.socket, server_side=True)
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        yield f"https://127.0.0.1:{server.server_address[1]}"
        server.shutdown()
        thread.join(10)


def test_the_authority_that_is_named_is_trusted(url: str, ours: Authority) -> None:
    with closing(RemoteOracle(url, "key", ca=ours.ca)) as oracle:
        assert oracle.budget() == STATEMENT


def test_no_other_is_and_that_is_told_at_once(url: str, tmp_path: Path) -> None:
    for ca in (None, authority(tmp_path / "theirs").ca):
        start = time.monotonic()
        with (
            closing(RemoteOracle(url, "key", ca=ca)) as oracle,
            pytest.raises(OracleUnreachable, match=r"not trusted.*--ca"),
        ):
            oracle.budget()
        assert time.monotonic() - start < 20  # of 120 s for failures that may pass


def test_a_file_that_holds_no_certificate_is_told(tmp_path: Path) -> None:
    text = tmp_path / "text.pem"
    text.write_text("nonsense")
    (tmp_path / "empty.pem").touch()
    for path, why in (
        (text, "no certificate"),
        (tmp_path / "empty.pem", "no certificate"),
        (tmp_path / "missing.pem", "No such file"),
        (tmp_path, "cannot be read|no certificate"),
    ):
        with pytest.raises(ConfigError, match=why) as told:
            RemoteOracle("https://127.0.0.1:9", "key", ca=path)
        assert "\n" not in str(told.value)


def test_the_commands_take_it(url: str, ours: Authority, tmp_path: Path) -> None:
    preset = write_tiny(tmp_path)
    for arguments, environment in (
        (["--ca", str(tmp_path / "missing.pem")], {}),
        ([], {"ORACLE_CA_FILE": str(tmp_path / "missing.pem")}),
    ):
        for command in (
            ["plan", str(preset), "--oracle", url],
            ["train", str(preset), "--oracle", url, "--out", str(tmp_path / "run")],
            ["audit", str(tmp_path), "--oracle", url],
            ["demo", "--oracle", url, "--out", str(tmp_path / "demo")],
        ):
            result = CliRunner().invoke(app, [*command, *arguments], env={"ORACLE_API_KEY": "k", **environment})
            assert result.exit_code == 2, (command, result.output)
            assert result.stderr.splitlines() == [
                f"error: --ca {tmp_path / 'missing.pem'} cannot be read: No such file or directory"
            ]
    # Trusted, it is asked, and found to be no classifier.
    result = CliRunner().invoke(app, ["plan", str(preset), "--oracle", url, "--ca", str(ours.ca)])
    assert result.exit_code == 4
    assert "did not answer as expected" in result.stderr
