"""The Idempotency-Key of a request: RUN/LABEL/DIGEST.

The run's id makes the purchase this run's own, the label names the batch within the run, the digest its bytes. The last
two say what was asked whoever asked it, which is how a recording is searched.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass, replace

from shared.wire import codec

_DIGEST_DIGITS = 24
_ATTEMPT = re.compile(r"~[0-9]+$")


@dataclass(frozen=True)
class RequestKey:
    """The parts of a key; `label` may hold slashes, the other two do not."""

    run: str
    label: str
    digest: str

    @classmethod
    def of(cls, run: str, label: str, sha256: str) -> RequestKey:
        """The key of a request whose body has this SHA-256."""
        return cls(run, label, sha256[:_DIGEST_DIGITS])

    def attempt(self, number: int) -> RequestKey:
        """The key of another attempt, counted from 1, where each is a purchase of its own (see `local_ledger`)."""
        return self if number == 1 else replace(self, label=f"{self.label}~{number}")

    @property
    def first(self) -> RequestKey:
        """The key of the first attempt."""
        return replace(self, label=_ATTEMPT.sub("", self.label))

    def __str__(self) -> str:
        return f"{self.run}/{self.label}/{self.digest}"

    @classmethod
    def parse(cls, key: str) -> RequestKey:
        """The parts of a written key; a part that is not there is empty."""
        run, _, rest = key.partition("/")
        label, _, digest = rest.rpartition("/")
        return cls(run, label, digest)


def digest(encoded: codec.Encoded) -> str:
    """The first digits of the body's SHA-256, hexadecimal."""
    return whole_digest(encoded)[:_DIGEST_DIGITS]


def whole_digest(encoded: codec.Encoded) -> str:
    """The body's SHA-256, hexadecimal."""
    sha256 = hashlib.sha256()
    for chunk in encoded.chunks:
        sha256.update(chunk)
    return sha256.hexdigest()
