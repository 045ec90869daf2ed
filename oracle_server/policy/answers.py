"""What is told of the logits. The order is the one in which a service would do it:

z      logits + noise
p      softmax(z / T), or z / T where logits are told, or the label alone
top-k  of the others nothing
round  to so many decimals
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from oracle_server.policy import noise
from oracle_server.policy.randomness import Randomness
from oracle_server.policy.spec import AnswerSpec
from oracle_server.rows import Float32, Rows

Float64 = NDArray[np.float64]

# How far below the smallest logit that is told the others are put. Minus infinity would say it more plainly, but JSON
# cannot write it; after a softmax this is it: exp(-50) = 2e-22, far below what a float32 can add to 1.
TOP_K_GAP = 50.0


class Answers:
    """Turns logits into answers as a file says.

    Args:
        spec: what to do.
        randomness: where noise comes from.
    """

    def __init__(self, spec: AnswerSpec, randomness: Randomness) -> None:
        self._spec, self._randomness = spec, randomness
        self.changes = spec != AnswerSpec()

    def transform(self, logits: Float32, rows: Rows, seq: int) -> Float32:
        """The answer [n, k] to n rows whose logits are [n, k] and whose charge has ledger number `seq`.

        The same for the same arguments. Without anything to do these are the logits themselves, untouched. A row of
        logits that are not all finite is answered with NaN: a broken classifier is not to look like a sound one. The
        pixels of a reconstruction are treated as logits are.
        """
        if not self.changes:
            return logits
        spec, z = self._spec, logits.astype(np.float64)
        if spec.noise is not None:
            z += noise.draw(spec.noise, self._randomness, rows, z.shape[1], seq)
        broken = ~np.isfinite(z).all(axis=1)
        z[broken] = 0.0
        told = _tell(spec, z)
        told[broken] = np.nan
        with np.errstate(over="ignore"):  # what is beyond float32 is told as infinite
            return told.astype(np.float32)


def _tell(spec: AnswerSpec, z: Float64) -> Float64:
    if spec.scores == "label":
        return one_hot(z)
    told = z / spec.temperature
    if spec.scores == "probabilities":
        told = softmax(told)
    if spec.top_k is not None:
        told = keep_top(told, z, spec.top_k, probabilities=spec.scores == "probabilities")
    if spec.decimals is not None:
        told = np.round(told, spec.decimals) + 0.0  # -0.0, which would still tell a sign, becomes 0.0
    return told


def softmax(z: Float64) -> Float64:
    """Probabilities [n, k] of logits [n, k]."""
    powers = np.exp(z - z.max(axis=1, keepdims=True))
    probabilities: Float64 = powers / powers.sum(axis=1, keepdims=True)
    return probabilities


def one_hot(z: Float64) -> Float64:
    """1 for the largest of each row of [n, k], the first of equals; 0 for the others."""
    told = np.zeros_like(z)
    np.put_along_axis(told, z.argmax(axis=1, keepdims=True), 1.0, axis=1)
    return told


def keep_top(scores: Float64, z: Float64, k: int, *, probabilities: bool) -> Float64:
    """The scores of the k largest of each row of z, the first of equals; the others 0, or `TOP_K_GAP` below the
    smallest kept. Logits z decide, for those that differ little have equal probabilities."""
    kept = np.argsort(-z, axis=1, kind="stable")[:, :k]
    values = np.take_along_axis(scores, kept, axis=1)
    rest = 0.0 if probabilities else values[:, -1:] - TOP_K_GAP
    told = np.zeros_like(scores) + rest
    np.put_along_axis(told, kept, values, axis=1)
    return told
