"""A ledger's private key, in a file that only its owner may read (PKCS 8, PEM)."""

from __future__ import annotations

import os
import secrets
from pathlib import Path

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)

from shared.audit.signatures import Signer


class KeyFileError(Exception):
    """The file cannot be read or written, or holds no Ed25519 private key."""


def load_signer(path: Path) -> Signer | None:
    """The key in a file; None if there is no such file.

    Raises:
        KeyFileError: the file is not an Ed25519 private key, or cannot be read.
    """
    try:
        key = load_pem_private_key(path.read_bytes(), password=None)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError, UnsupportedAlgorithm) as error:
        why = error.strerror if isinstance(error, OSError) else "it is not an unencrypted private key in PEM"
        raise KeyFileError(f"the signing key {path} cannot be read: {why}") from None
    if not isinstance(key, Ed25519PrivateKey):
        raise KeyFileError(f"the signing key {path} is not an Ed25519 key: make one with 'openssl genpkey'")
    return Signer(key)


def create_signer(path: Path) -> Signer:
    """A new key in a new file, mode 0600; if another process has just made the file, the key in it.

    The file is on the disk before the key is used: a ledger whose key was lost cannot be written any more.

    Raises:
        KeyFileError: the file cannot be written.
    """
    key = Ed25519PrivateKey.generate()
    pem = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    try:
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(pem)
                file.flush()
                os.fsync(file.fileno())
            os.link(temporary, path)  # unlike a rename, it never replaces another's key
        finally:
            temporary.unlink()
        sync_directory(path.parent)
    except FileExistsError:
        pass
    except OSError as error:
        raise KeyFileError(f"the signing key {path} cannot be written: {error.strerror}") from None
    signer = load_signer(path)
    if signer is None:
        raise KeyFileError(f"the signing key {path} was removed while it was made")
    return signer


def sync_directory(path: Path) -> None:
    """Put on the disk which files a directory holds."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
