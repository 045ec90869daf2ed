"""Certify a run's stack against the remote oracle: one row per image in `certified.tsv`, flushed as it goes.

The form is the one the randomized-smoothing literature reads: `idx label predict radius correct time`, predict -1 for
abstention, radius in l2 over pixels in [0, 1]; where the draws were not a fixed number, `queries` and `method` follow.
The stack is the one the run directory says; nothing of it can be left out. Several ranks (`ranks`) take turns at the
images, and the file is the same but for its times (`row_parts`).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from copy import copy
from dataclasses import dataclass, replace
from datetime import timedelta
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from defender_client.appending import read_rows
from defender_client.black_box import BlackBox
from defender_client.config import CertifyConfig, ConfigError, Form, Method
from defender_client.in_flight import Crew
from defender_client.oracle import Oracle
from defender_client.progress import meter
from defender_client.ranks import ALONE, Ranks
from defender_client.row_parts import SharedRows, parts_of
from defender_client.sequential import design, looks
from defender_client.smoothing import BATCH as _BATCH
from defender_client.smoothing import Certificate, Smooth, largest_radius
from defender_client.stack import Stack, StackSpec
from shared.datasets import ImageSet

CERTIFIED_FILE = "certified.tsv"
HEADER = "idx\tlabel\tpredict\tradius\tcorrect\ttime"
HEADERS: dict[Method, str] = {"fixed": HEADER, "sequential": f"{HEADER}\tqueries\tmethod"}
PURPOSE = "certify"
_FIXED_FIELDS = HEADER.count("\t") + 1
_METHODS: dict[str, Method] = {"sequential": "sequential"}

_Drawn = tuple[str, Tensor, torch.Generator]
"""An image: the label of its queries, itself [c, h, w], and the generator of its noise."""


@dataclass(frozen=True)
class Row:
    """One certified image; `predict` is -1 where it abstained, `radius` in l2 (0 for an abstention). `queries` is what
    it cost, None where n was fixed: then all cost the same."""

    idx: int
    label: int
    predict: int
    radius: float
    correct: int
    queries: int | None = None
    method: Method = "fixed"


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

    def named(self, label: str) -> DefendedOracle:
        """The same, for batches that are named so: one thread may use each."""
        other = copy(self)
        other.start(label)
        return other

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


def read(path: Path, method: Method | None = None) -> list[Row]:
    """Rows of a `certified.tsv`; an unfinished last line is left out.

    Raises:
        ConfigError: it is not such a file, or not by this method, where one is named.
    """
    rows = []
    for line in read_rows(path, *([HEADERS[method]] if method is not None else HEADERS.values())):
        fields = line.split("\t")
        try:
            idx, label, predict, radius, correct = fields[:5]
            row = Row(int(idx), int(label), int(predict), float(radius), int(correct))
            if len(fields) > _FIXED_FIELDS:
                queries, by = fields[_FIXED_FIELDS:]
                row = replace(row, queries=int(queries), method=_METHODS[by])
        except (ValueError, KeyError):
            raise ConfigError(f"{path}: not a row: {line!r}") from None
        rows.append(row)
    if len({row.method for row in rows}) > 1 or (method is not None and any(row.method != method for row in rows)):
        raise ConfigError(f"{path}: not a row of the method that its header says")
    return rows


def done(path: Path) -> set[int]:
    """The images that have a row, in a `certified.tsv` or in one of its parts; ConfigError as `read`."""
    return {row.idx for file in (path, *parts_of(path)) for row in read(file)}


def certify(
    stack: Stack,
    oracle: Oracle,
    test: ImageSet,
    settings: CertifyConfig,
    seed: int,
    path: Path,
    ranks: Ranks = ALONE,
) -> list[Row]:
    """Certify the first `settings.images` images of the test set (0: all), those in `path` already left alone.

    The noise of an image depends on the seed and its index only, so that two stacks, and both methods, meet the same
    noise and an interrupted image is asked again under the same keys, at no second charge.

    Args:
        ranks: who shares the images; all of them call this.

    Returns:
        All rows, old and new.

    Raises:
        ConfigError: the rows in `path` are of the other method, or see `check`.
    """
    rows = read(path, settings.method)
    indices = range(min(settings.images or len(test), len(test)))
    base = DefendedOracle(stack, oracle, form=settings.query_form)
    stack.to(ranks.device)
    check(settings, stack.spec.sigma)
    shared = SharedRows(path, HEADERS[settings.method], indices, [row.idx for row in rows], ranks)
    todo = shared.todo

    def drawn() -> Iterator[_Drawn]:
        """The images left, each when its noise is drawn: while the oracle answers for those before it."""
        for index in todo:
            x = test.floats(slice(index, index + 1))[0]
            yield image_label(settings, seed, index), x, torch.Generator().manual_seed(seed * 1_000_003 + index)

    with (
        shared.opened(),
        meter("certify", len(indices), "images", len(indices) - len(todo)) as progress,
        Crew(settings.in_flight) as crew,
    ):
        certificates = _CERTIFYING[settings.method](base, stack.spec, settings, drawn(), crew)
        start = time.monotonic()
        for index, certificate in zip(todo, certificates, strict=True):
            label = int(test.labels[index])
            row = Row(index, label, certificate.label, _written(certificate.radius), int(certificate.label == label))
            if certificate.method == "sequential":
                row = replace(row, queries=certificate.queries, method="sequential")
            rows.append(row)
            ranks.check()
            # Since the row before: images overlap, and their times still add up to the whole.
            took, start = timedelta(seconds=time.monotonic() - start), time.monotonic()
            more = f"\t{row.queries}\t{row.method}" if row.queries is not None else ""
            shared.write(f"{row.idx}\t{row.label}\t{row.predict}\t{row.radius:.6f}\t{row.correct}\t{took}{more}")
            accuracy = sum(r.correct for r in rows) / len(rows)
            progress.advance(note=f"accuracy {accuracy:.3f}", spent=oracle.log.total, left=oracle.remaining)
    return read(path, settings.method) if shared.from_parts else rows


def _fixed(
    base: DefendedOracle, spec: StackSpec, settings: CertifyConfig, drawn: Iterator[_Drawn], crew: Crew
) -> Iterator[Certificate]:
    """What to ask depends on no answer: the batches of an image, and of the next ones, are in flight together."""
    smooth = Smooth(base, spec.classes, spec.sigma)

    def labelled() -> Iterator[tuple[Tensor, torch.Generator]]:
        for label, x, generator in drawn:
            base.start(label)
            yield x, generator

    return smooth.certify_each(
        labelled(), settings.n0, settings.n, settings.alpha, _BATCH, partial(base.scores, crew=crew)
    )


def _sequential(
    base: DefendedOracle, spec: StackSpec, settings: CertifyConfig, drawn: Iterator[_Drawn], crew: Crew
) -> Iterator[Certificate]:
    """Whether to go on depends on the answers: an image asks one batch after the other, several images at a time."""
    tests = design(spec.sigma, settings.alpha, settings.n, settings.radii)

    def certified(label: str, x: Tensor, generator: torch.Generator) -> Certificate:
        smooth = Smooth(base.named(label), spec.classes, spec.sigma)
        return smooth.certify_sequentially(x, settings.n0, tests, _BATCH, generator)

    return crew.in_order(partial(certified, *image) for image in drawn)


_CERTIFYING = {"fixed": _fixed, "sequential": _sequential}


def _written(radius: float) -> float:
    """With six decimals, rounded down: a certificate must not gain from being written."""
    nearest = round(radius, 6)
    return nearest if nearest <= radius else math.floor(radius * 1e6) / 1e6


def check(settings: CertifyConfig, sigma: float) -> None:
    """ConfigError where a sequential certification is to aim at a radius that its draws cannot reach."""
    if settings.method == "sequential":
        try:
            design(sigma, settings.alpha, settings.n, settings.radii)
        except ValueError as error:
            raise ConfigError(f"certify.radii, with sigma {sigma:g} and alpha {settings.alpha:g}: {error}") from None


def limit(settings: CertifyConfig, sigma: float) -> float:
    """The radius beyond which such a certification says nothing: what n draws reach, or the largest that it aims at."""
    if settings.method == "sequential":
        return settings.radii[-1]
    return largest_radius(settings.n, settings.alpha, sigma)


def cost(settings: CertifyConfig) -> tuple[int, int]:
    """Queries of an image: at least, at most."""
    least = looks(settings.n)[0] if settings.method == "sequential" else settings.n
    return settings.n0 + least, settings.n0 + settings.n


def image_label(settings: CertifyConfig, seed: int, index: int) -> str:
    """Names the queries of one image; the same name and bytes are charged once."""
    way = "sequential/" if settings.method == "sequential" else ""
    return f"{PURPOSE}/{way}{settings.n0}-{settings.n}/{seed}/{index}"


def certified_accuracy(rows: list[Row], radius: float) -> float:
    """Fraction of images classified correctly with a certified radius of at least `radius`; NaN for no image."""
    if not rows:
        return float("nan")
    return sum(row.correct and row.radius >= radius for row in rows) / len(rows)
