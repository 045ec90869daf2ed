"""The key that signs the server's ledger: its file, with the ledger's errors."""

from __future__ import annotations

from pathlib import Path

from oracle_server.database import LedgerError
from shared.audit import key_file
from shared.audit.signatures import Signer


def load_signer(path: Path) -> Signer | None:
    """The key in a file; None if there is no such file.

    Raises:
        LedgerError: the file is not an Ed25519 private key, or cannot be read.
    """
    try:
        return key_file.load_signer(path)
    except key_file.KeyFileError as error:
        raise LedgerError(str(error)) from None


def create_signer(path: Path) -> Signer:
    """A new key in a new file, mode 0600; if another process has just made the file, the key in it.

    The file is on the disk before the key is used: a ledger whose key was lost cannot be written any more.

    Raises:
        LedgerError: the file cannot be written.
    """
    try:
        return key_file.create_signer(path)
    except key_file.KeyFileError as error:
        raise LedgerError(str(error)) from None
