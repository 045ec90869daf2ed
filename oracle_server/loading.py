"""Where classifiers come from: an architecture by name and its weights, made ready to be queried."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torchvision
from torch import Tensor, nn

from oracle_server.architectures import build, check_name, usual
from oracle_server.settings import Settings
from oracle_server.weight_files import ModelError, WeightsInfo, read_weights
from shared.models.classifiers import CIFAR_DEPTHS, SMALL_CNNS, Normalize

SHIPPED = {"digits-cnn": Path(__file__).parent / "weights" / "digits-cnn.safetensors"}
_SHOWN = 3


@dataclass(frozen=True)
class Classifier:
    """A classifier ready to be queried: `module` maps images [b, *image_shape] in [0, 1] to logits [b, classes]."""

    module: nn.Module
    image_shape: tuple[int, int, int]
    classes: int


def load_classifier(settings: Settings) -> Classifier:
    """The classifier that the settings name, normalisation included, in evaluation mode, on the CPU.

    What the settings say wins over what the weights file says, and that over what is usual for the architecture.

    Raises:
        ModelError: unknown architecture, missing or unreadable weights, or weights that do not fit.
    """
    check_name(settings.model)
    state, info = _read(settings)
    if info.model is not None and info.model != settings.model and {info.model, settings.model} - set(SMALL_CNNS):
        raise ModelError(f"the weights are for '{info.model}', not for '{settings.model}'")
    channels, classes = _ends(settings.model, state)
    channels = settings.channels or info.channels or channels
    classes = settings.classes or info.classes or classes
    network = build(settings.model, channels, classes, state)
    _fill(network, state)
    usually = usual(settings.model)
    size = settings.image_size or info.image_size or usually.image_size
    if size is None:
        raise ModelError(f"nothing says which image size '{settings.model}' was trained on: give --image-size")
    mean = settings.mean or info.mean or usually.mean or (0.0,) * channels
    std = settings.std or info.std or usually.std or (1.0,) * channels
    module = nn.Sequential(_normalize(mean, std, channels), network).eval().requires_grad_(False)
    classifier = Classifier(module, (channels, size, size), classes)
    _try(classifier, settings.model)
    return classifier


def _read(settings: Settings) -> tuple[dict[str, Tensor], WeightsInfo]:
    if settings.weights is None:
        if settings.model in SHIPPED:
            return read_weights(SHIPPED[settings.model])
        own = settings.model in CIFAR_DEPTHS or settings.model in SMALL_CNNS
        raise ModelError(
            f"'{settings.model}' needs --weights FILE" + ("" if own else ", or --weights DEFAULT for torchvision's own")
        )
    if settings.weights_file is None and settings.model in torchvision.models.list_models(module=torchvision.models):
        names = [weights.name for weights in torchvision.models.get_model_weights(settings.model)]
        if settings.weights in (*names, "DEFAULT"):
            return _download(settings.model, settings.weights)
        if not Path(settings.weights).suffix:
            raise ModelError(
                f"'{settings.weights}' is neither a file nor weights of torchvision's '{settings.model}': "
                f"it has {', '.join(names)}"
            )
    return read_weights(Path(settings.weights))


def _download(model: str, name: str) -> tuple[dict[str, Tensor], WeightsInfo]:
    weights = torchvision.models.get_model_weights(model)[name]
    transforms = weights.transforms()
    try:
        state = weights.get_state_dict(progress=False, check_hash=True)
    except (OSError, RuntimeError) as error:
        raise ModelError(f"torchvision's weights '{name}' of '{model}' could not be downloaded: {error}") from error
    return state, WeightsInfo(
        image_size=transforms.crop_size[0], mean=tuple(transforms.mean), std=tuple(transforms.std)
    )


def _ends(model: str, state: Mapping[str, Tensor]) -> tuple[int, int]:
    """(channels, classes) as the weights imply them: the first tensor reads channels, the last one gives logits."""
    # Files do not keep the order of layers; a network without storage does, and costs nothing.
    with torch.device("meta"):
        names = list(build(model, 3, 2, state).state_dict())
    first, last = _first_convolution(names, state), state.get(names[-1])
    if first is None or last is None:
        raise ModelError(f"the weights do not fit '{model}': they have no '{names[-1] if last is None else names[0]}'")
    return first.shape[1], last.shape[0]


def _first_convolution(names: Sequence[str], state: Mapping[str, Tensor]) -> Tensor | None:
    return next((state[name] for name in names if name in state and state[name].ndim == 4), None)


def _fill(network: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Copy weights into a network, or say what does not fit."""
    wanted = network.state_dict()
    # Older files lack these counters of batch normalisation, which play no part in evaluation.
    missing = [name for name in wanted if name not in state and not name.endswith("num_batches_tracked")]
    extra = [name for name in state if name not in wanted]
    shapes = [
        f"{name} is {list(state[name].shape)} and should be {list(tensor.shape)}"
        for name, tensor in wanted.items()
        if name in state and state[name].shape != tensor.shape
    ]
    faults = [
        f"{what} {', '.join(names[:_SHOWN])}" + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")
        for what, names in (("missing:", missing), ("not expected:", extra), ("of another shape:", shapes))
        if names
    ]
    if faults:
        raise ModelError(f"the weights do not fit the architecture; {'; '.join(faults)}")
    network.load_state_dict(state, strict=False)


def _normalize(mean: Sequence[float], std: Sequence[float], channels: int) -> Normalize:
    for name, values in (("mean", mean), ("std", std)):
        if len(values) != channels:
            raise ModelError(f"--{name} has {len(values)} values and the images {channels} channels")
    return Normalize(mean, std)


def _try(classifier: Classifier, name: str) -> None:
    """Ask once, so that images the network cannot read are found before the first client pays for one."""
    try:
        with torch.inference_mode():
            logits = classifier.module(torch.zeros(1, *classifier.image_shape))
    except RuntimeError as error:
        shape = list(classifier.image_shape)
        raise ModelError(f"'{name}' cannot read images {shape}: {error}; see --image-size and --channels") from error
    if not isinstance(logits, Tensor) or logits.shape != (1, classifier.classes):
        raise ModelError(f"'{name}' does not answer one vector of {classifier.classes} logits an image")
