"""What the oracle answers to clean images: bought once per image, then kept.

They are what training aims at: argmax f(x), the labels of the stability loss (Zhang et al., ICLR 2022, eq. 5), or f(x).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
from numpy.typing import NDArray
from torch import Tensor

from defender_client.config import ConfigError
from defender_client.in_flight import Crew
from defender_client.oracle import Oracle
from defender_client.progress import meter
from defender_client.stack import write_safetensors
from shared.datasets import ImageSet

LABELS_FILE = "oracle-labels.safetensors"
PURPOSE = "labels"


def bought(run: Path) -> bool:
    """Whether the run has its labels already."""
    return (run / LABELS_FILE).exists()


def oracle_answers(
    run: Path, oracle: Oracle, sets: dict[str, ImageSet], rows: int, in_flight: int = 1
) -> dict[str, Tensor]:
    """Answers float32 [n, k] to the clean images of each set; one query per image, once per run.

    Interrupted, it asks again under the same keys, which the server answers without a second charge.

    Args:
        run: the run's directory; the answers are kept there.
        sets: image sets by name.
        rows: images per request.
        in_flight: requests at a time.

    Raises:
        ConfigError: the answers kept are of another number of images.
    """
    path = run / LABELS_FILE
    if not path.exists():
        answered: dict[str, Tensor] = {}
        with (
            meter("oracle labels", sum(len(images) for images in sets.values()), "images") as progress,
            Crew(in_flight) as crew,
        ):
            for name, images in sets.items():
                parts = [np.empty((0, oracle.info.classes), np.float32)]
                for answers in crew.in_order(_questions(oracle, name, images, rows)):
                    parts.append(answers)
                    progress.advance(len(answers), spent=oracle.log.total, left=oracle.remaining)
                answered[name] = torch.from_numpy(np.concatenate(parts))
        write_safetensors(answered, path, {})
    kept = safetensors.torch.load_file(path)
    for name, images in sets.items():
        if len(kept[name]) != len(images):
            raise ConfigError(
                f"{path} holds answers to {len(kept[name])} {name} images and the data set has {len(images)}: "
                "this run was started with other data"
            )
    return kept


def _questions(oracle: Oracle, name: str, images: ImageSet, rows: int) -> Iterator[Callable[[], NDArray[np.float32]]]:
    for start in range(0, len(images), rows):
        batch = images.floats(slice(start, start + rows)).numpy()
        yield partial(oracle.query, batch, purpose=PURPOSE, label=f"{PURPOSE}/{name}/{start}")
