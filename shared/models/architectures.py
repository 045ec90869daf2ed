"""Classifier architectures by name, ours and torchvision's, and what is usual for each."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from shared.models.classifiers import CIFAR_DEPTHS, SMALL_CNNS, build_own
from shared.models.reconstructors import RECONSTRUCTORS
from shared.models.weight_files import ModelError

# The usual normalisation of the CIFAR ResNets that circulate: ImageNet's numbers, although the images are CIFAR's.
_IMAGENET_MEAN, _IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_OWN = (*SMALL_CNNS, *CIFAR_DEPTHS)
# These two build auxiliary classifiers, and warn unless told how to initialise.
_WITH_AUXILIARY = ("googlenet", "inception_v3")


@dataclass(frozen=True)
class Usual:
    """What an architecture is used with unless something says otherwise; None where nothing is usual."""

    image_size: int | None = None
    mean: Sequence[float] | None = None
    std: Sequence[float] | None = None


def build(name: str, channels: int, classes: int, names_in_state: Collection[str] = ()) -> nn.Module:
    """An untrained classifier, images [b, channels, h, w] -> logits [b, classes], without normalisation.

    Args:
        name: one of ours or of torchvision's.
        channels: of the images; torchvision's read 3.
        classes: number of logits.
        names_in_state: the tensors it is to be given, where that decides what must be built.

    Raises:
        ModelError: no architecture has this name, or it cannot read that many channels.
    """
    own = build_own(name, channels, classes)
    if own is not None:
        return own
    check_name(name)
    if channels != 3:
        raise ModelError(f"torchvision's '{name}' reads images of 3 channels, not {channels}")
    options: dict[str, Any] = {}
    if name in _WITH_AUXILIARY:
        options = {
            "aux_logits": any(key.startswith(("aux", "AuxLogits")) for key in names_in_state),
            "init_weights": False,
        }
    import torchvision  # takes seconds, and only its own models need it

    model: nn.Module = torchvision.models.get_model(name, weights=None, num_classes=classes, **options)
    return model


def usual(name: str) -> Usual:
    """The usual image size and normalisation of an architecture. Raises `ModelError` for an unknown name."""
    if name in CIFAR_DEPTHS:
        return Usual(32, _IMAGENET_MEAN, _IMAGENET_STD)
    if name in SMALL_CNNS:
        return Usual()
    check_name(name)
    import torchvision

    transforms = torchvision.models.get_model_weights(name).DEFAULT.transforms()
    return Usual(transforms.crop_size[0], tuple(transforms.mean), tuple(transforms.std))


def check_name(name: str) -> None:
    """Raise `ModelError`, with the nearest names, unless an architecture has this name."""
    if name in _OWN:
        return
    import torchvision

    known = [*_OWN, *torchvision.models.list_models(module=torchvision.models)]
    if name in known:
        return
    if name in RECONSTRUCTORS:
        raise ModelError(f"'{name}' is a reconstructor: it is for --task reconstruction")
    close = difflib.get_close_matches(name, known, n=3)
    hint = f"did you mean {', '.join(close)}?" if close else f"ours are {', '.join(_OWN)}; the others torchvision's"
    raise ModelError(f"no classifier is called '{name}': {hint}")
