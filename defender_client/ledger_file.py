"""An exported ledger as a file, and the public key that it is checked with."""

from __future__ import annotations

from pathlib import Path

from defender_client.config import ConfigError
from shared.audit.export import Examined, NotALedger, examine
from shared.audit.signatures import SignatureInvalid, read_public_key


def read_ledger(path: Path, public_key: bytes) -> Examined:
    """Check a file that `oracle-server ledger export` wrote; what is wrong with it is in `findings`.

    Raises:
        ConfigError: it cannot be read, or is no exported ledger at all.
    """
    try:
        with path.open("rb") as file:
            return examine(file, public_key)
    except NotALedger as error:
        raise ConfigError(f"{path}: {error}") from None
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from None


def read_key(text: str) -> bytes:
    """A public key, 32 bytes, from 64 hexadecimal digits or a file that holds them. Raises ConfigError otherwise."""
    try:
        return read_public_key(Path(text).read_text(encoding="ascii") if Path(text).is_file() else text)
    except (SignatureInvalid, UnicodeDecodeError, OSError):
        raise ConfigError(
            f"--public-key {text}: neither 64 hexadecimal digits nor a file of them; 'oracle-server ledger public-key' "
            "prints them"
        ) from None
