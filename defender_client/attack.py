"""Attack a run's stack: one row per image in `attack-METHOD-THROUGH-EPSILON.tsv`, flushed as it goes.

    s(x) = log 1/m sum_j softmax(f(Dec(Enc(D(x + delta_j))))),  delta_j ~ N(0, sigma^2 I)

is what is attacked: the smoothed stack in front of the oracle, its m draws from the seed and the image's index; one
answer without noise for m = 0. Every answer about an image, clean or attacked, is the oracle's own, over the same
draws. PGD crafts its image with a white box, at no query; Square Attack searches with the oracle's answers.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
from torch import Tensor, nn

from defender_client.appending import drop_torn_line, read_rows
from defender_client.certify import DefendedOracle
from defender_client.config import AttackConfig, ConfigError, Form
from defender_client.losses import cross_entropy, mean_log_scores
from defender_client.oracle import Oracle
from defender_client.pgd import draws, pgd
from defender_client.progress import meter
from defender_client.square import check_size, library, square
from defender_client.stack import Stack
from shared.datasets import ImageSet

HEADER = "idx\tlabel\tclean\tattacked\tcorrect\tnorm\tqueries\tagreement\ttime"
PURPOSE = "attack"
_OF_ANSWERS, _OF_CRAFTING, _OF_SEARCH, _STREAMS = 0, 1, 2, 3  # an attacker does not know the draws of an answer


@dataclass(frozen=True)
class Row:
    """One attacked image.

    Attributes:
        clean, attacked: its class before and after.
        correct: 1 where `attacked` is the label.
        norm: l2 norm of what was added; 0 for an image that was wrong before, which is not attacked.
        queries: what it cost.
        agreement: fraction of its clean draws for which the white box names the oracle's class; NaN without one.
    """

    idx: int
    label: int
    clean: int
    attacked: int
    correct: int
    norm: float
    queries: int
    agreement: float


@dataclass(frozen=True)
class Summary:
    """All rows of an attack; accuracies in 0..1, None where there is no image to speak of.

    Attributes:
        clean_accuracy, accuracy: of the same images, before and under attack.
        attacked: images that were right before, and so attacked.
        mean_norm: of what was added to those.
        queries: what all images cost.
        agreement: of the white box with the oracle, over all clean draws.
    """

    images: int
    clean_accuracy: float | None
    accuracy: float | None
    attacked: int
    mean_norm: float | None
    queries: int
    agreement: float | None


class Victim:
    """The classifier under attack, an image at a time; its queries are counted.

    Args:
        stack: what stands before the oracle.
        oracle: who answers.
        settings: how many draws, from which seed.
        form: what to send.
    """

    def __init__(self, stack: Stack, oracle: Oracle, settings: AttackConfig, form: Form = "auto") -> None:
        self._base = DefendedOracle(stack, oracle, PURPOSE, form)
        self._sigma, self._settings = stack.spec.sigma, settings
        self._index = self.queries = 0

    def start(self, index: int) -> None:
        """The image that follows; its draws, and the names of its requests, are those of its index."""
        self._base.start(image_label(self._settings, index))
        self._index, self.queries = index, 0

    def noisy(self, image: Tensor) -> Tensor:
        """The draws [m, c, h, w] of an image [c, h, w], the same whenever it is `index`'s turn."""
        generator = _generator(self._settings, self._index, _OF_ANSWERS)
        return draws(image[None], self._sigma, self._settings.copies, generator)[:, 0]

    def logits(self, image: Tensor) -> Tensor:
        """The oracle's answers [m, k] to the draws of an image; m queries."""
        answers = self._base(self.noisy(image))
        self.queries += len(answers)
        return answers

    def scores(self, image: Tensor) -> Tensor:
        """s(x) [k] of an image [c, h, w]; m queries."""
        return mean_log_scores(self.logits(image)[:, None])[0]


def read(path: Path) -> list[Row]:
    """Rows of an attack's file; an unfinished last line is left out. ConfigError where it is not such a file."""
    rows = []
    for line in read_rows(path, HEADER):
        try:
            idx, label, clean, attacked, correct, norm, queries, agreement, _ = line.split("\t")
            classes = int(label), int(clean), int(attacked)
            rows.append(Row(int(idx), *classes, int(correct), float(norm), int(queries), float(agreement)))
        except ValueError:
            raise ConfigError(f"{path}: not a row: {line!r}") from None
    return rows


def attack(
    stack: Stack,
    oracle: Oracle,
    test: ImageSet,
    settings: AttackConfig,
    classifier: nn.Module | None,
    path: Path,
    form: Form = "auto",
) -> list[Row]:
    """Attack the first `settings.images` images of the test set (0: all), those in `path` already left alone.

    An image that is wrong before is wrong under attack too, and costs one answer. All that is random about an image
    depends on the seed and its index only, so that an interrupted one is asked again under the same keys, at no second
    charge.

    Args:
        classifier: the white box, images [b, c, h, w] -> logits [b, k]; needed for `pgd`.
        path: the rows' file.
        form: what to send for a query.

    Returns:
        All rows, old and new.

    Raises:
        ConfigError: the library that searches is missing, or the images are too small for it.
        ValueError: `pgd` without a white box.
    """
    check(settings, test.image_shape)
    if settings.method == "pgd" and classifier is None:
        raise ValueError("pgd takes the gradients of a white box, and there is none")
    rows = read(path)
    indices = _indices(settings, len(test))
    todo = images_left(settings, len(test), [row.idx for row in rows])
    victim = Victim(stack, oracle, settings, form)
    drop_torn_line(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with (
        path.open("a", encoding="utf-8") as tsv,
        meter("attack", len(indices), "images", len(indices) - len(todo)) as progress,
    ):
        if tsv.tell() == 0:
            tsv.write(HEADER + "\n")
            tsv.flush()
        for index in todo:
            start = time.monotonic()
            image, label = test.floats(slice(index, index + 1))[0], int(test.labels[index])
            row = _attacked(stack, victim, classifier, settings, index, image, label)
            rows.append(row)
            took = timedelta(seconds=time.monotonic() - start)
            tsv.write(
                f"{row.idx}\t{row.label}\t{row.clean}\t{row.attacked}\t{row.correct}\t{row.norm:.6f}\t{row.queries}\t"
                f"{row.agreement:.6f}\t{took}\n"
            )
            tsv.flush()
            note = f"accuracy {sum(row.correct for row in rows) / len(rows):.3f}"
            progress.advance(note=note, spent=oracle.log.total, left=oracle.remaining)
    return rows


def check(settings: AttackConfig, image_shape: tuple[int, int, int]) -> None:
    """ConfigError where the method cannot be used here: its library is missing, or the images are too small."""
    if settings.method == "square":
        check_size(image_shape)
        library()


def _attacked(
    stack: Stack,
    victim: Victim,
    classifier: nn.Module | None,
    settings: AttackConfig,
    index: int,
    image: Tensor,
    label: int,
) -> Row:
    """Ask about an image, attack it if it is right, and ask again."""
    victim.start(index)
    answers = victim.logits(image)
    scores = mean_log_scores(answers[:, None])[0]
    agreement = _agreement(stack, classifier, victim.noisy(image), answers)
    clean = int(scores.argmax())
    moved = image
    if clean == label and settings.method == "square":
        allowed = settings.queries_per_image // settings.rows - 1
        seed = _generator(settings, index, _OF_SEARCH).initial_seed()
        found = square(victim.scores, image, label, scores, settings.epsilon, allowed, seed)
        moved, scores = found.image, found.scores
    elif clean == label and classifier is not None:
        moved = craft(stack, classifier, image, label, settings, crafting_generator(settings, index))
        scores = victim.scores(moved)
    attacked = int(scores.argmax())
    norm = float((moved - image).norm())
    return Row(index, label, clean, attacked, int(attacked == label), norm, victim.queries, agreement)


def craft(
    stack: Stack, classifier: nn.Module, image: Tensor, label: int, settings: AttackConfig, generator: torch.Generator
) -> Tensor:
    """An image [c, h, w] near `image`, by PGD with a white box; asks no oracle.

    Through `defended`, the loss is that of the smoothed stack, over fresh draws in each step (SmoothAdv: Salman et al.,
    NeurIPS 2019); through `classifier`, that of the undefended classifier without noise.

    Args:
        stack: what stands before the classifier.
        classifier: images [b, c, h, w] -> logits [b, k].
        image: float32 [c, h, w] in [0, 1].
        label: the class to leave.
        settings: of the attack.
        generator: draws the random start and the noise.
    """
    labels = torch.tensor([label])

    def defended(images: Tensor) -> Tensor:
        noisy = draws(images, stack.spec.sigma, settings.copies, generator)
        logits = classifier(stack(noisy.flatten(0, 1))).unflatten(0, noisy.shape[:2])
        # -log 1/m sum_j softmax(f'(x + delta_j))_y
        return cross_entropy(mean_log_scores(logits), labels)

    def undefended(images: Tensor) -> Tensor:
        return cross_entropy(classifier(images), labels)

    loss = defended if settings.through == "defended" else undefended
    return pgd(loss, image[None], settings.epsilon, settings.steps, generator, settings.step_size)[0]


@torch.no_grad()
def _agreement(stack: Stack, classifier: nn.Module | None, noisy: Tensor, answers: Tensor) -> float:
    """Fraction of draws [m, c, h, w] for which the white box names the class that the oracle's answers [m, k] do."""
    if classifier is None:
        return float("nan")
    return float((classifier(stack(noisy)).argmax(dim=1) == answers.argmax(dim=1)).float().mean())


def image_label(settings: AttackConfig, index: int) -> str:
    """Names the queries of one image; the same name and bytes are charged once."""
    told = settings.model_dump_json(exclude={"images"})
    return f"{PURPOSE}/{settings.name}/{hashlib.sha256(told.encode()).hexdigest()[:8]}/{index}"


def crafting_generator(settings: AttackConfig, index: int) -> torch.Generator:
    """Draws what is random when an image is crafted; other draws than those of the answers about it."""
    return _generator(settings, index, _OF_CRAFTING)


def images_left(settings: AttackConfig, test: int, done: Iterable[int]) -> list[int]:
    """Indices of the images to attack, of a test set of `test`, that are not `done` yet."""
    done = set(done)
    return [index for index in _indices(settings, test) if index not in done]


def summary(rows: list[Row]) -> Summary:
    """What all rows say."""
    norms = [row.norm for row in rows if row.clean == row.label]
    return Summary(
        images=len(rows),
        clean_accuracy=_mean([row.clean == row.label for row in rows]),
        accuracy=_mean([row.correct for row in rows]),
        attacked=len(norms),
        mean_norm=_mean(norms),
        queries=sum(row.queries for row in rows),
        agreement=_mean([row.agreement for row in rows if row.agreement == row.agreement]),
    )


def _mean(values: list[bool] | list[int] | list[float]) -> float | None:
    return sum(values) / len(values) if values else None


def _indices(settings: AttackConfig, test: int) -> range:
    return range(min(settings.images or test, test))


def _generator(settings: AttackConfig, index: int, stream: int) -> torch.Generator:
    return torch.Generator().manual_seed((settings.seed * 1_000_003 + index) * _STREAMS + stream)
