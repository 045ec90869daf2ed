"""API keys, `zo_<key id>_<secret>`: the id finds the client, the secret proves it.

The secret has 256 random bits, so a plain SHA-256 of it is as hard to turn back as the secret is to guess; a slow hash
would protect only secrets that people choose.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
from dataclasses import dataclass, field

_KEY = re.compile(r"zo_([0-9a-f]{16})_([A-Za-z0-9_-]{43})")
# Compared against when the key id is unknown, so that the time of an answer does not tell which ids exist.
_NO_HASH = "0" * 64


@dataclass(frozen=True)
class ApiKey:
    """A key's two parts; the secret stays out of `repr`, and so out of logs and tracebacks."""

    key_id: str
    secret: str = field(repr=False)

    @staticmethod
    def new() -> ApiKey:
        """A fresh random key."""
        return ApiKey(secrets.token_hex(8), secrets.token_urlsafe(32))

    @staticmethod
    def parse(text: str) -> ApiKey | None:
        """The key written as `text`; None if it is not written like one."""
        match = _KEY.fullmatch(text)
        return ApiKey(match[1], match[2]) if match else None

    def reveal(self) -> str:
        """The key as its owner writes it. Shown once, never stored."""
        return f"zo_{self.key_id}_{self.secret}"

    def hash(self) -> str:
        """SHA-256 of the secret, hexadecimal: what the ledger stores."""
        return hashlib.sha256(self.secret.encode()).hexdigest()

    def matches(self, key_hash: str | None) -> bool:
        """Whether the secret has this hash, in constant time; False, as slowly, for None."""
        return hmac.compare_digest(self.hash(), key_hash or _NO_HASH) and key_hash is not None
