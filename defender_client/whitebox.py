"""A classifier that the defender's user holds: for the white-box columns, and for attacks that follow gradients.

The server never gives gradients; whoever wants them brings the weights.
"""

from __future__ import annotations

import hashlib
import math
import os
from dataclasses import dataclass
from pathlib import Path

import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from torch import Tensor, nn

from defender_client.config import ConfigError
from defender_client.objective import Objective
from defender_client.progress import console
from shared.models.loading import Classifier, ClassifierSource, Reconstructor, load_classifier, load_reconstructor
from shared.models.weight_files import ModelError
from shared.wire.protocol import Task

WHITEBOX_FILE = "whitebox.json"
_ALIKE = 0.99
COMPARED = 256
"""Clean images on which a white box is held against the oracle."""


@dataclass(frozen=True)
class WhiteBoxSource:
    """The weights file, and the architecture's name where the file does not say it."""

    weights: Path
    model: str | None = None


@dataclass(frozen=True)
class WhiteBox:
    """A local classifier: `module` maps images [b, c, h, w] in [0, 1] to answers [b, k]; its weights are frozen.

    `digest`: SHA-256 of its weights file, hexadecimal.
    """

    module: nn.Module
    digest: str


class Comparison(BaseModel):
    """`whitebox.json`: which weights a run's gradients come from, and how far the oracle agrees with them.

    `agreement`: the objective's mean quality of the white box's answers against the oracle's; None where the run buys
    none of its answers to clean images.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    sha256: str
    agreement: float | None = None


def load_whitebox(
    source: WhiteBoxSource, image_shape: tuple[int, int, int], classes: int, task: Task = "classification"
) -> WhiteBox:
    """A white box for an oracle of this shape and task; `classes` is the number of values of an answer.

    Raises:
        ConfigError: the file cannot be read, or is of another shape than the oracle.
    """
    try:
        loaded: Classifier | Reconstructor
        if task == "reconstruction":
            loaded = load_reconstructor(source.weights, source.model)
            values = math.prod(loaded.image_shape)
        else:
            loaded = load_classifier(ClassifierSource(model=source.model, weights=str(source.weights)))
            values = loaded.classes
    except ModelError as error:
        remedy = "" if source.model else " (--whitebox-model NAME says which architecture it is)"
        raise ConfigError(f"--whitebox {source.weights}: {error}{remedy}") from None
    if (loaded.image_shape, values) != (image_shape, classes):
        raise ConfigError(
            f"--whitebox {source.weights} maps images {list(loaded.image_shape)} to {values} values, and the "
            f"oracle {list(image_shape)} to {classes}: it is not what this oracle hides"
        )
    # Channels last: convolutions, and their gradients, are faster there on a CPU.
    module = loaded.module.to(memory_format=torch.channels_last)
    return WhiteBox(module, hashlib.sha256(source.weights.read_bytes()).hexdigest())


def compare(
    run: Path, whitebox: WhiteBox, images: Tensor | None, answers: Tensor | None, objective: Objective
) -> Comparison:
    """Keep which white box a run has, and warn where the oracle answers otherwise.

    Args:
        images: clean images [n, c, h, w] in [0, 1], or None.
        answers: the oracle's answers [n, k] to them, or None.

    Raises:
        ConfigError: the run was started with other weights.
    """
    path = run / WHITEBOX_FILE
    if path.exists():
        try:
            known = Comparison.model_validate_json(path.read_bytes())
        except ValidationError as error:
            raise ConfigError(f"{path} is damaged ({error.errors()[0]['msg']})") from None
        if known.sha256 != whitebox.digest:
            raise ConfigError(
                f"{run} was started with another white box (SHA-256 {known.sha256[:16]}..., and now "
                f"{whitebox.digest[:16]}...): choose another --out"
            )
        return known
    agreement = None
    if images is not None and answers is not None:
        with torch.no_grad():
            own = whitebox.module(images[:COMPARED])
        agreement = float(objective.quality(own, objective.targets_of(answers[:COMPARED])).mean())
        console.print(f"white box: {objective.quality_name} with the oracle {agreement:.3f} on {len(own)} clean images")
        if objective.quality_name == "agreement" and agreement < _ALIKE:
            console.print("white box: that is not what the oracle hides; its gradients are those of a surrogate")
    found = Comparison(sha256=whitebox.digest, agreement=agreement)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(found.model_dump_json(indent=2) + "\n", encoding="utf-8")
    os.replace(temporary, path)
    return found
