"""Square Attack in l2: random search over squares, from scores alone (Andriushchenko et al., ECCV 2020).

The search is AutoAttack's, as its authors wrote it (package `pyautoattack`). It is given one image at a time, so that
an interrupted one is searched again alike, and stopped here: at the first wrong class, or when its answers are used up.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from defender_client.config import ConfigError

_SMALLEST = 5  # pixels: its first perturbation is of 5 x 5 tiles

Scores = Callable[[Tensor], Tensor]
"""One image [c, h, w] -> scores [k], whose margin is to be made small."""


@dataclass(frozen=True)
class Found:
    """Where a search ended: an image [c, h, w] and its scores [k], the first wrong one or that of the least margin."""

    image: Tensor
    scores: Tensor


class _Ended(Exception):
    """The search is over."""


def library() -> Any:
    """The class that searches; ConfigError where it is not installed."""
    try:
        return importlib.import_module("pyautoattack.square").SquareAttack
    except ImportError:
        raise ConfigError(
            "Square Attack is AutoAttack's, which is not installed: pip install 'zo-defense[attacks]', or pyautoattack"
        ) from None


def check_size(image_shape: tuple[int, int, int]) -> None:
    """ConfigError for images (c, h, w) that are too small for it."""
    if min(image_shape[1:]) < _SMALLEST:
        raise ConfigError(f"Square Attack needs images of {_SMALLEST} x {_SMALLEST} pixels, not {list(image_shape)}")


def square(scores: Scores, image: Tensor, label: int, clean: Tensor, epsilon: float, answers: int, seed: int) -> Found:
    """Search for an image near `image` that is not of class `label`.

    The same arguments make the same search. The global generator of torch, which the library draws from, is put back.

    Args:
        scores: asked about one image at a time.
        image: float32 [c, h, w] in [0, 1], at least 5 x 5 pixels.
        label: the class to leave; that of the largest of `clean`.
        clean: the scores [k] of `image`, which is not asked about again.
        epsilon: radius of the ball, in l2 over pixels in [0, 1].
        answers: how often `scores` may be asked, at least 2.
        seed: of the search.

    Raises:
        ConfigError: the library is not installed.
        ValueError: fewer than 2 answers.
    """
    if answers < 2:
        raise ValueError(f"there must be an answer for the start and one for a step, not {answers}")
    found, asked = Found(image, clean), 0

    def predict(images: Tensor) -> Tensor:
        nonlocal found, asked
        if torch.equal(images[0], image):
            return clean[None].clone()
        values = scores(images[0].clone())
        asked += 1
        if _margin(values, label) < _margin(found.scores, label):
            found = Found(images[0].clone(), values)
        if int(values.argmax()) != label:
            found = Found(images[0].clone(), values)
            raise _Ended
        if asked == answers:
            raise _Ended
        shown = values.clone()
        if _margin(values, label) <= 0:  # a tie is still of class `label`, and the library would stop at it
            shown[label] += torch.finfo(shown.dtype).tiny + shown[label].abs() * torch.finfo(shown.dtype).eps
        return shown[None]  # which the library writes into

    attack = library()(predict, norm="L2", n_queries=answers - 1, eps=epsilon, seed=seed)
    with torch.random.fork_rng(devices=[]), suppress(_Ended):
        attack.perturb(image[None], torch.tensor([label]))
    return found


def _margin(scores: Tensor, label: int) -> float:
    """f_y - max_{c != y} f_c: not positive where the class is another."""
    others = scores.clone()
    others[label] = -torch.inf
    return float(scores[label] - others.max())
