"""Attack a run's stack before a reconstructor: one row per image in `attack-pgd-THROUGH-EPSILON.tsv`, flushed.

    r(x_b) = 1/m sum_j R(Dec(Enc(D(x_b + delta_j)))),  delta_j ~ N(0, sigma^2 I)
    maximise |r(x_b + eps) - x|^2 over |eps|_2 <= epsilon    (Zhang et al., ICLR 2022, section 5.2)

x_b is the back-projection of the image x, r its reconstruction by the smoothed stack; one answer without noise for
m = 0. PGD crafts with a white box, at no query: `through` = `defended` is adaptive, through the whole of r with fresh
draws in each step; `classifier` crafts on the undefended R, as the paper's code does, and transfers. What is reported,
RMSE and SSIM to x before and under attack, is of the oracle's own answers, which are counted.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
from torch import Tensor, nn

from defender_client.appending import drop_torn_line, read_rows
from defender_client.attack import Victim, crafting_generator, images_left
from defender_client.config import AttackConfig, ConfigError, Form
from defender_client.image_metrics import rmse, ssim
from defender_client.losses import squared_error
from defender_client.measured import MeasuredSet
from defender_client.oracle import Oracle
from defender_client.pgd import draws, pgd
from defender_client.progress import meter
from defender_client.stack import Stack

HEADER = "idx\trmse\tssim\tattacked_rmse\tattacked_ssim\tnorm\tqueries\ttime"


@dataclass(frozen=True)
class Row:
    """One attacked image: RMSE and SSIM of its reconstruction to the original, before and under attack.

    `norm`: l2 norm of what was added to the back-projection; `queries`: what it cost.
    """

    idx: int
    rmse: float
    ssim: float
    attacked_rmse: float
    attacked_ssim: float
    norm: float
    queries: int


@dataclass(frozen=True)
class Summary:
    """Means over all rows, None where there is none; `queries` is what all images cost."""

    images: int
    rmse: float | None
    ssim: float | None
    attacked_rmse: float | None
    attacked_ssim: float | None
    mean_norm: float | None
    queries: int


def read(path: Path) -> list[Row]:
    """Rows of an attack's file; an unfinished last line is left out. ConfigError where it is not such a file."""
    rows = []
    for line in read_rows(path, HEADER):
        try:
            idx, before, similar, under, alike, norm, queries, _ = line.split("\t")
            rows.append(
                Row(int(idx), float(before), float(similar), float(under), float(alike), float(norm), int(queries))
            )
        except ValueError:
            raise ConfigError(f"{path}: not a row: {line!r}") from None
    return rows


def summary(rows: list[Row]) -> Summary:
    """What all rows say."""

    def mean(values: list[float]) -> float | None:
        return sum(values) / len(values) if values else None

    return Summary(
        images=len(rows),
        rmse=mean([row.rmse for row in rows]),
        ssim=mean([row.ssim for row in rows]),
        attacked_rmse=mean([row.attacked_rmse for row in rows]),
        attacked_ssim=mean([row.attacked_ssim for row in rows]),
        mean_norm=mean([row.norm for row in rows]),
        queries=sum(row.queries for row in rows),
    )


def attack(
    stack: Stack,
    oracle: Oracle,
    test: MeasuredSet,
    settings: AttackConfig,
    reconstructor: nn.Module,
    path: Path,
    form: Form = "auto",
) -> list[Row]:
    """Attack the first `settings.images` images of the test set (0: all), those in `path` already left alone.

    All that is random about an image depends on the seed and its index only, so that an interrupted one is asked again
    under the same keys, at no second charge, and two stacks meet the same draws.

    Args:
        reconstructor: the white box, images [b, c, h, w] -> flat images [b, c h w].
        path: the rows' file.
        form: what to send for a query.

    Returns:
        All rows, old and new.
    """
    rows = read(path)
    todo = images_left(settings, len(test), [row.idx for row in rows])
    victim = Victim(stack, oracle, settings, form)
    drop_torn_line(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with (
        path.open("a", encoding="utf-8") as tsv,
        meter("attack", len(rows) + len(todo), "images", len(rows)) as progress,
    ):
        if tsv.tell() == 0:
            tsv.write(HEADER + "\n")
            tsv.flush()
        for index in todo:
            start, part = time.monotonic(), slice(index, index + 1)
            shown, original = test.floats(part)[0], test.originals(part)
            victim.start(index)
            before = _reconstruction(victim, shown, original)
            moved = craft(stack, reconstructor, shown, original, settings, crafting_generator(settings, index))
            under = _reconstruction(victim, moved, original)
            row = Row(
                idx=index,
                rmse=float(rmse(before, original)),
                ssim=float(ssim(before, original)),
                attacked_rmse=float(rmse(under, original)),
                attacked_ssim=float(ssim(under, original)),
                norm=float((moved - shown).norm()),
                queries=victim.queries,
            )
            rows.append(row)
            took = timedelta(seconds=time.monotonic() - start)
            tsv.write(
                f"{row.idx}\t{row.rmse:.6f}\t{row.ssim:.6f}\t{row.attacked_rmse:.6f}\t{row.attacked_ssim:.6f}\t"
                f"{row.norm:.6f}\t{row.queries}\t{took}\n"
            )
            tsv.flush()
            note = f"RMSE {_mean_rmse(rows):.3f} under attack"
            progress.advance(note=note, spent=oracle.log.total, left=oracle.remaining)
    return rows


def craft(
    stack: Stack,
    reconstructor: nn.Module,
    shown: Tensor,
    original: Tensor,
    settings: AttackConfig,
    generator: torch.Generator,
) -> Tensor:
    """A back-projection [c, h, w] near `shown` that is reconstructed badly, by PGD with a white box; asks no oracle.

    Args:
        stack: what stands before the reconstructor.
        reconstructor: images [b, c, h, w] -> flat images [b, c h w].
        shown: x_b, float32 [c, h, w] in [0, 1].
        original: x, [1, c, h, w] in [0, 1].
        settings: of the attack.
        generator: draws the random start and the noise.
    """
    aims = original.flatten(1)

    def defended(images: Tensor) -> Tensor:
        noisy = draws(images, stack.spec.sigma, settings.copies, generator)
        answers = reconstructor(stack(noisy.flatten(0, 1))).unflatten(0, noisy.shape[:2])
        return squared_error(answers.mean(dim=0), aims)

    def undefended(images: Tensor) -> Tensor:
        return squared_error(reconstructor(images), aims)

    loss = defended if settings.through == "defended" else undefended
    return pgd(loss, shown[None], settings.epsilon, settings.steps, generator, settings.step_size)[0]


def _reconstruction(victim: Victim, shown: Tensor, original: Tensor) -> Tensor:
    """r(x_b) [1, c, h, w] as the oracle answers it; m queries."""
    return victim.logits(shown).mean(dim=0).view_as(original)


def _mean_rmse(rows: list[Row]) -> float:
    return sum(row.attacked_rmse for row in rows) / len(rows)
