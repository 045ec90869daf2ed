"""Certify a run's stack against the remote oracle: one row per image in `certified.tsv`, flushed as it goes.

The form is the one the randomized-smoothing literature reads: `idx label predict radius correct time`, predict -1 for
abstention, radius in l2 over pixels in [0, 1]. The stack is the one the run directory says; nothing of it can be left
out.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from defender_client.appending import drop_torn_line, read_rows
from defender_client.black_box import BlackBox
from defender_client.config import CertifyConfig, ConfigError, Form
from defender_client.in_flight import Crew
from defender_client.oracle import Oracle
from defender_client.progress import meter
from defender_client.smoothing import Smooth
from defender_client.stack import Stack
from shared.datasets import ImageSet

CERTIFIED_FILE = "certified.tsv"
HEADER = "idx\tlabel\tpredict\tradius\tcorrect\ttime"
PURPOSE = "certify"
_BATCH = 1000


@dataclass(frozen=True)
class Row:
    """One certified image; `predict` is -1 where it abstained, `radius` in l2 (0 for an abstention)."""

    idx: int
    label: int
    predict: int
    radius: float
    correct: int


class DefendedOracle:
    """The base classifier that is smoothed, f(Dec(Enc(D(x)))): a callable from images [n, c, h, w] to logits [n, k]."""

    def __init__(self, stack: Stack, oracle: Oracle, purpose: str = PURPOSE, form: Form = "auto") -> None:
        self._stack, self._purpose = stack.eval(), purpose
        self._black_box = BlackBox(stack, oracle, _BATCH, form)
        self._label, self._calls = purpose, 0

    def start(self, label: str) -> None:
        """Name the batches that follow; the same name and bytes are charged once."""
        self._label, self._calls = label, 0

    def __call__(self, images: Tensor) -> Tensor:
        return self._asking(images)()

    def scores(self, batches: Iterator[Tensor], crew: Crew) -> Iterator[Tensor]:
        """Logits of each batch, in order; as many batches as the crew takes are denoised and asked about at a time.

        Batches are named when they are taken from `batches`, which may call `start` meanwhile.
        """
        return crew.in_order(map(self._asking, batches))

    def _asking(self, images: Tensor) -> Callable[[], Tensor]:
        self._calls += 1
        return partial(self._ask, images, f"{self._label}/{self._calls}")

    @torch.no_grad()
    def _ask(self, images: Tensor, label: str) -> Tensor:
        return self._black_box.logits(self._stack.front(images), purpose=self._purpose, label=label)


def read(path: Path) -> list[Row]:
    """Rows of a `certified.tsv`; an unfinished last line is left out. ConfigError where it is not such a file."""
    rows = []
    for line in read_rows(path, HEADER):
        fields = line.split("\t")
        try:
            idx, label, predict, radius, correct = fields[:5]
            rows.append(Row(int(idx), int(label), int(predict), float(radius), int(correct)))
        except ValueError:
            raise ConfigError(f"{path}: not a row: {line!r}") from None
    return rows


def certify(stack: Stack, oracle: Oracle, test: ImageSet, settings: CertifyConfig, seed: int, path: Path) -> list[Row]:
    """Certify the first `settings.images` images of the test set (0: all), those in `path` already left alone.

    The noise of an image depends on the seed and its index only, so that two stacks meet the same noise and an
    interrupted image is asked again under the same keys, at no second charge.

    Returns:
        All rows, old and new.
    """
    rows = read(path)
    done = {row.idx for row in rows}
    indices = range(min(settings.images or len(test), len(test)))
    todo = [index for index in indices if index not in done]
    base = DefendedOracle(stack, oracle, form=settings.query_form)
    smooth = Smooth(base, stack.spec.classes, stack.spec.sigma)
    drop_torn_line(path)
    path.parent.mkdir(parents=True, exist_ok=True)

    def drawn() -> Iterator[tuple[Tensor, torch.Generator]]:
        """The images left, each when its noise is drawn: while the oracle answers for those before it."""
        for index in todo:
            base.start(image_label(settings, seed, index))
            yield test.floats(slice(index, index + 1))[0], torch.Generator().manual_seed(seed * 1_000_003 + index)

    with (
        path.open("a", encoding="utf-8") as tsv,
        meter("certify", len(indices), "images", len(indices) - len(todo)) as progress,
        Crew(settings.in_flight) as crew,
    ):
        if tsv.tell() == 0:
            tsv.write(HEADER + "\n")
            tsv.flush()
        certificates = smooth.certify_each(
            drawn(), settings.n0, settings.n, settings.alpha, _BATCH, partial(base.scores, crew=crew)
        )
        start = time.monotonic()
        for index, certificate in zip(todo, certificates, strict=True):
            label = int(test.labels[index])
            # Rounded down: a certificate must not gain from being written.
            radius = math.floor(certificate.radius * 1e6) / 1e6
            row = Row(index, label, certificate.label, radius, int(certificate.label == label))
            rows.append(row)
            # Since the row before: images overlap, and their times still add up to the whole.
            took, start = timedelta(seconds=time.monotonic() - start), time.monotonic()
            tsv.write(f"{row.idx}\t{row.label}\t{row.predict}\t{row.radius:.6f}\t{row.correct}\t{took}\n")
            tsv.flush()
            accuracy = sum(r.correct for r in rows) / len(rows)
            progress.advance(note=f"accuracy {accuracy:.3f}", spent=oracle.log.total, left=oracle.remaining)
    return rows


def image_label(settings: CertifyConfig, seed: int, index: int) -> str:
    """Names the queries of one image; the same name and bytes are charged once."""
    return f"{PURPOSE}/{settings.n0}-{settings.n}/{seed}/{index}"


def certified_accuracy(rows: list[Row], radius: float) -> float:
    """Fraction of images classified correctly with a certified radius of at least `radius`; NaN for no image."""
    if not rows:
        return float("nan")
    return sum(row.correct and row.radius >= radius for row in rows) / len(rows)
