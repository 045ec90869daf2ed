"""A smoothed classifier as an engine: each image's answer is the vote of many noisy copies of it.

    g(x) = argmax_c P[f(x + delta) = c],  delta ~ N(0, sigma^2 I)    (Cohen et al., ICML 2019, eq. (1))

The noise of a copy is a function of a secret and of the image: an image asked about again, alone or in any company, has
the same answer to the last bit. So a retry is told the same, and asking again tells nothing new.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from oracle_server.engines import Engine
from oracle_server.policy.randomness import Randomness
from shared.wire import protocol

_PURPOSE = b"smoothing"


@dataclass(frozen=True)
class Smoothing:
    """How a classifier is smoothed.

    Attributes:
        sigma: standard deviation of the noise, pixels in [0, 1].
        draws: noisy copies of an image.
        alpha: None to answer with shares of the votes; else the label, or an abstention where the votes do not tell the
            first two classes apart at this error, in (0, 1).
    """

    sigma: float
    draws: int
    alpha: float | None = None

    @property
    def scores(self) -> Literal["probabilities", "label"]:
        """What an answer holds."""
        return "probabilities" if self.alpha is None else "label"

    def announced(self) -> dict[str, Any]:
        """Parameters for the model's metadata."""
        told: dict[str, Any] = {"sigma": self.sigma, "draws": self.draws}
        if self.alpha is not None:
            told["alpha"] = self.alpha
        return {
            protocol.SCORES_PARAMETER: self.scores,
            protocol.SMOOTHING_PARAMETER: told,
            protocol.ABSTAINS_PARAMETER: self.alpha is not None,
        }


class SmoothedEngine:
    """Images float32 [n, c, h, w] in [0, 1] -> answers float32 [n, k].

    Shares of the votes, in [0, 1], which add up to 1; or, with an alpha, 1 at the label and 0 elsewhere, and a row of
    zeros for an abstention. A row for which the classifier's answers are not numbers is not a number either.

    Args:
        engine: the classifier f. If its answer for an image does not depend on what is computed beside it, neither does
            this engine's.
        classes: k.
        smoothing: how.
        randomness: the secret that the noise comes from.

    Attributes:
        block: images that are computed at once, at most.
    """

    def __init__(self, engine: Engine, classes: int, smoothing: Smoothing, randomness: Randomness) -> None:
        self.block = max(1, engine.block // smoothing.draws)
        self._engine, self._classes, self._smoothing, self._randomness = engine, classes, smoothing, randomness

    def __call__(self, images: Tensor) -> Tensor:
        votes, broken = self._votes(images.numpy())
        alpha, draws = self._smoothing.alpha, self._smoothing.draws
        answers = votes / np.float32(draws) if alpha is None else decided(votes, alpha)
        answers[broken] = np.nan
        return torch.from_numpy(answers.astype(np.float32))

    def _votes(self, images: NDArray[np.float32]) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
        """Votes [n, k] for the classes, and whether an image had an answer that is no vote, [n]."""
        draws, sigma = self._smoothing.draws, np.float32(self._smoothing.sigma)
        votes = np.zeros((len(images), self._classes), np.int64)
        broken = np.zeros(len(images), np.bool_)
        # -0.0 is the same pixel as 0.0, and must not have another noise: adding 0 makes it one.
        bits = ((image + np.float32(0)).astype("<f4").tobytes() for image in images)
        noise = [self._randomness.generator(_PURPOSE, image) for image in bits]
        for start in range(0, len(images) * draws, self._engine.block):
            # Copy i is the (i mod draws)-th of image i // draws: blocks are full, and no image need fit into one.
            owners = np.arange(start, min(start + self._engine.block, len(images) * draws)) // draws
            copies = images[owners]
            for row in range(owners[0], owners[-1] + 1):
                mine = copies[owners == row]
                copies[owners == row] = mine + sigma * noise[row].standard_normal(mine.shape, np.float32)
            scores = self._engine(torch.from_numpy(copies)).numpy()
            broken[owners[np.isnan(scores).any(axis=1)]] = True
            np.add.at(votes, (owners, scores.argmax(axis=1)), 1)
        return votes, broken


def decided(votes: NDArray[np.int64], alpha: float) -> NDArray[np.float32]:
    """PREDICT of Cohen et al. 2019 for votes [n, k]: 1 at the label, 0 elsewhere; zeros where it abstains.

    It abstains unless a two-sided binomial test of n_A ~ Binomial(n_A + n_B, 1/2), of the votes for the first two
    classes, rejects at `alpha` (Hung and Fithian, 2019).
    """
    answers = np.zeros(votes.shape, np.float32)
    for row, counts in zip(answers, votes, strict=True):
        first, second = np.argsort(-counts, kind="stable")[:2]
        if counts[first] >= needed(int(counts[first] + counts[second]), alpha):
            row[first] = 1.0
    return answers


@functools.lru_cache(maxsize=4096)
def needed(votes: int, alpha: float) -> int:
    """The least n_A of `votes` with 2 P[Binomial(votes, 1/2) >= n_A] <= alpha; votes + 1 where there is none."""
    # In whole numbers: the sum of C(votes, i) over i >= n_A is at most alpha 2^votes / 2.
    most = Fraction(alpha) * 2**votes // 2
    least, ways, tail = votes + 1, 1, 1
    while least > 0 and tail <= most:
        least -= 1
        ways = ways * least // (votes - least + 1)
        tail += ways
    return least
