"""TLS 1.2 and later, from PEM files."""

from __future__ import annotations

import ssl
from pathlib import Path

from oracle_server.settings import Settings


class TlsError(Exception):
    """The certificate or its key cannot be used."""


def server_context(settings: Settings) -> ssl.SSLContext | None:
    """What to serve https with; None where the settings ask for plain http.

    Raises:
        TlsError: a file is missing, is not PEM, or does not belong to the others.
    """
    cert, key, password_file = settings.tls_cert, settings.tls_key, settings.tls_key_password_file
    if cert is None and key is None and password_file is None:
        return None
    if cert is None or key is None:
        raise TlsError("TLS needs both --tls-cert and --tls-key")
    for option, file in (("--tls-cert", cert), ("--tls-key", key)):
        _read(option, file)
    password = "" if password_file is None else _read("--tls-key-password-file", password_file).rstrip(b"\r\n")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    try:
        # Always with a password, even none: without one OpenSSL would ask for it on the terminal.
        context.load_cert_chain(cert, key, password=lambda: password)
    except (ssl.SSLError, ValueError) as error:
        reason = (getattr(error, "reason", None) or str(error)).lower().replace("_", " ")
        raise TlsError(
            f"the certificate {cert} cannot be used with the key {key} ({reason}): both must be PEM "
            "and belong together, and an encrypted key needs its --tls-key-password-file"
        ) from None
    return context


def _read(option: str, file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise TlsError(f"{option} {file} cannot be read: {error.strerror}") from None
