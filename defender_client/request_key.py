"""The Idempotency-Key of a request: RUN/LABEL/DIGEST.

The run's id makes the purchase this run's own, the label names the batch within the run, the digest its bytes. The last
two say what was asked whoever asked it, which is how a recording is searched.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

from shared.wire import codec

_DIGEST_DIGITS = 24


@dataclass(frozen=True)
class RequestKey:
    """The parts of a key; `label` may hold slashes, the other two do not."""

    run: str
    label: str
    digest: str

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
    sha256 = hashlib.sha256()
    for chunk in encoded.chunks:
        sha256.update(chunk)
    return sha256.hexdigest()[:_DIGEST_DIGITS]
