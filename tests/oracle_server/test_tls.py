"""https by two files, with a certificate made here."""

from __future__ import annotations

import datetime
import ipaddress
import socket
import ssl
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from oracle_support import Caller, digits, logits_of, process
from typer.testing import CliRunner

from oracle_server.cli import app
from oracle_server.ledger import Ledger
from oracle_server.settings import Settings
from oracle_server.tls import server_context

PASSWORD = b"a password"


@dataclass(frozen=True)
class Files:
    """A certificate for 127.0.0.1 that signs itself, its key plain and encrypted, and another key."""

    cert: Path
    key: Path
    encrypted: Path
    password: Path
    other: Path


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    at = tmp_path_factory.mktemp("tls")
    made = Files(*(at / name for name in ("cert.pem", "key.pem", "encrypted.pem", "password", "other.pem")))
    key, other = (ec.generate_private_key(ec.SECP256R1()) for _ in range(2))
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "oracle")])
    now = datetime.datetime.now(datetime.UTC)
    certificate = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(hours=1))
        .not_valid_after(now + datetime.timedelta(hours=1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), True)
        .sign(key, hashes.SHA256())
    )

    def pem(private: ec.EllipticCurvePrivateKey, encryption: serialization.KeySerializationEncryption) -> bytes:
        return private.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, encryption)

    made.cert.write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    made.key.write_bytes(pem(key, serialization.NoEncryption()))
    made.encrypted.write_bytes(pem(key, serialization.BestAvailableEncryption(PASSWORD)))
    made.password.write_bytes(PASSWORD + b"\n")
    made.other.write_bytes(pem(other, serialization.NoEncryption()))
    return made


@pytest.fixture(scope="module")
def server(files: Files, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path]]:
    """The URL and the ledger of a server that speaks TLS, with the encrypted key."""
    path = tmp_path_factory.mktemp("ledger") / "ledger.db"
    Ledger.open(str(path)).close()
    options = ("--tls-cert", files.cert, "--tls-key", files.encrypted, "--tls-key-password-file", files.password)
    with process(path, *map(str, options)) as (_, url):
        yield url, path


def test_queries_go_over_https(server: tuple[str, Path], files: Files) -> None:
    url, path = server
    assert url.startswith("https://")
    ledger = Ledger.open(str(path))
    client, key = ledger.add_client("a", 10)
    ledger.close()
    with httpx.Client(base_url=url, verify=ssl.create_default_context(cafile=str(files.cert))) as http:
        assert logits_of(Caller(client, key.reveal(), http).infer(digits(2))).shape == (2, 10)
    with pytest.raises(httpx.ConnectError, match="certificate verify failed"):
        httpx.get(url)  # nobody vouches for it here


def test_plain_http_to_the_same_port_is_not_answered(server: tuple[str, Path]) -> None:
    with pytest.raises(httpx.TransportError):
        httpx.get(server[0].replace("https://", "http://") + "/v2")


def test_tls_before_1_2_is_refused(server: tuple[str, Path], files: Files) -> None:
    host, port = server[0].removeprefix("https://").split(":")

    def negotiated(version: ssl.TLSVersion) -> str | None:
        context = ssl.create_default_context(cafile=str(files.cert))
        context.set_ciphers("ALL:@SECLEVEL=0")  # else this side would refuse the old versions first
        context.minimum_version = context.maximum_version = version
        with (
            socket.create_connection((host, int(port)), timeout=10) as plain,
            context.wrap_socket(plain, server_hostname=host) as wrapped,
        ):
            return wrapped.version()

    assert negotiated(ssl.TLSVersion.TLSv1_2) == "TLSv1.2"
    assert negotiated(ssl.TLSVersion.TLSv1_3) == "TLSv1.3"
    with pytest.raises((ssl.SSLError, ConnectionResetError)):
        negotiated(ssl.TLSVersion.TLSv1_1)


@pytest.mark.parametrize(
    ("cert", "key", "password", "message"),
    [
        ("cert", None, None, "both --tls-cert and --tls-key"),
        (None, "key", None, "both --tls-cert and --tls-key"),
        (None, None, "password", "both --tls-cert and --tls-key"),
        ("missing", "key", None, "No such file"),
        ("cert", "missing", None, "No such file"),
        ("cert", "encrypted", "missing", "No such file"),
        ("password", "key", None, "cannot be used"),
        ("cert", "password", None, "cannot be used"),
        ("cert", "other", None, "key values mismatch"),
        ("cert", "encrypted", None, "--tls-key-password-file"),
        ("cert", "encrypted", "other", "cannot be used"),
    ],
)
def test_wrong_files_are_one_line_and_exit_code_2(
    files: Files, tmp_path: Path, cert: str | None, key: str | None, password: str | None, message: str
) -> None:
    options = ["serve", "--port", "0", "--ledger", str(tmp_path / "ledger.db")]
    given = (("--tls-cert", cert), ("--tls-key", key), ("--tls-key-password-file", password))
    for option, name in given:
        if name is not None:
            options += [option, str(getattr(files, name, tmp_path / name))]
    result = CliRunner().invoke(app, options)
    assert result.exit_code == 2, result.output
    assert message in result.stderr
    assert len(result.stderr.splitlines()) == 1
    assert not (tmp_path / "ledger.db").exists()


def test_without_files_there_is_no_tls() -> None:
    assert server_context(Settings()) is None
