"""One seed for a whole policy, and generators derived from it that have nothing to do with each other."""

from __future__ import annotations

import hashlib
import secrets
from dataclasses import dataclass, field
from typing import TypeAlias

import numpy as np

Bytes: TypeAlias = bytes | memoryview


@dataclass(frozen=True)
class Randomness:
    """The secret key of 32 bytes; it stays out of `repr`, and so out of logs."""

    key: bytes = field(repr=False)

    @staticmethod
    def of(seed: int | None) -> Randomness:
        """The same for the same seed, at every start; without one, fresh from the system."""
        if seed is None:
            return Randomness(secrets.token_bytes(32))
        return Randomness(hashlib.blake2b(str(seed).encode(), digest_size=32, person=b"policy seed").digest())

    def generator(self, purpose: bytes, data: Bytes = b"") -> np.random.Generator:
        """A generator that is a function of the key, the purpose (at most 16 bytes) and the data.

        Philox is counter-based (Salmon et al., SC 2011): it starts at its key, without a state to be warmed up.
        """
        digest = hashlib.blake2b(data, digest_size=16, key=self.key, person=purpose).digest()
        return np.random.Generator(np.random.Philox(key=int.from_bytes(digest, "little")))
