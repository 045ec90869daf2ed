"""A model from its weights: an architecture by name, made ready to be asked about images in [0, 1].

Both programs build classifiers and reconstructors here: the oracle the one it hides, and a defender with a white box
its own copy.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from shared.measurements import Measurement
from shared.models.architectures import build, check_name, usual
from shared.models.classifiers import CIFAR_DEPTHS, SMALL_CNNS, Normalize
from shared.models.reconstructors import RECONSTRUCTORS, build_reconstructor, check_reconstructor
from shared.models.weight_files import ModelError, WeightsInfo, read_weights

_SHOWN = 3


@dataclass(frozen=True)
class ClassifierSource:
    """Where a classifier comes from.

    Attributes:
        model: the architecture's name; None as the weights file says.
        weights: a file, or the name of torchvision's own weights.
        classes, channels, image_size, mean, std: what is to hold whatever the weights say; None as they say.
    """

    model: str | None
    weights: str
    classes: int | None = None
    channels: int | None = None
    image_size: int | None = None
    mean: Sequence[float] | None = None
    std: Sequence[float] | None = None


@dataclass(frozen=True)
class Classifier:
    """A classifier ready to be queried: `module` maps images [b, *image_shape] in [0, 1] to logits [b, classes].

    `bound` is the one engine that can compute it, None where any may; `remembered` is False where its answers depend on
    more than its layers and weights, so that what was measured of it holds for this process only.
    """

    module: nn.Module
    image_shape: tuple[int, int, int]
    classes: int
    bound: str | None = None
    remembered: bool = True


@dataclass(frozen=True)
class Reconstructor:
    """A reconstructor ready to be queried: `module` maps back-projections [b, *image_shape] in [0, 1] to images as flat
    rows [b, c h w] in [0, 1]; `measurement` says what it is given the back-projections of."""

    module: nn.Module
    image_shape: tuple[int, int, int]
    measurement: Measurement


@dataclass(frozen=True)
class LoadedNetwork:
    """An architecture with its weights, without normalisation, and what is known of the images it reads.

    `image_size` is the side in pixels, None where nothing says it; `mean` and `std` are per channel, of images in
    [0, 1].
    """

    model: str
    network: nn.Module
    channels: int
    classes: int
    image_size: int | None
    mean: Sequence[float]
    std: Sequence[float]


def load_network(source: ClassifierSource) -> LoadedNetwork:
    """The network of a source, on the CPU.

    What the source says wins over what the weights file says, and that over what is usual for the architecture.

    Raises:
        ModelError: unknown architecture, missing or unreadable weights, or weights that do not fit.
    """
    if source.model is not None:
        check_name(source.model)
    state, info = _read(source)
    if info.model in RECONSTRUCTORS:
        raise ModelError(f"{source.weights} holds a reconstructor: it is for --task reconstruction")
    model = source.model or info.model
    if model is None:
        raise ModelError(f"{source.weights} does not say which architecture its weights are of: name the model")
    check_name(model)
    if info.model is not None and info.model != model and {info.model, model} - set(SMALL_CNNS):
        raise ModelError(f"the weights are for '{info.model}', not for '{model}'")
    channels, classes = _ends(model, state)
    channels = source.channels or info.channels or channels
    classes = source.classes or info.classes or classes
    network = build(model, channels, classes, state)
    fill(network, state)
    usually = usual(model)
    return LoadedNetwork(
        model=model,
        network=network,
        channels=channels,
        classes=classes,
        image_size=source.image_size or info.image_size or usually.image_size,
        mean=source.mean or info.mean or usually.mean or (0.0,) * channels,
        std=source.std or info.std or usually.std or (1.0,) * channels,
    )


def load_classifier(source: ClassifierSource) -> Classifier:
    """The classifier of a source, normalisation included, in evaluation mode, on the CPU.

    Raises:
        ModelError: as `load_network`; or nothing says how large its images are, or it cannot read such images.
    """
    loaded = load_network(source)
    size = loaded.image_size
    if size is None:
        raise no_image_size(loaded.model)
    check_normalization(loaded.mean, loaded.std, loaded.channels)
    module = nn.Sequential(Normalize(loaded.mean, loaded.std), loaded.network).eval().requires_grad_(False)
    image_shape = (loaded.channels, size, size)
    if count_classes(module, image_shape, loaded.model) != loaded.classes:
        raise ModelError(f"'{loaded.model}' does not answer one vector of {loaded.classes} logits an image")
    return Classifier(module, image_shape, loaded.classes)


def load_reconstructor(weights: Path, model: str | None = None) -> Reconstructor:
    """The reconstructor in a weights file, in evaluation mode, on the CPU.

    Args:
        weights: what `oracle-server train-reconstructor` wrote.
        model: the architecture's name; None as the file says.

    Raises:
        ModelError: unknown architecture, missing or unreadable weights, weights that do not fit, or a file that does
            not say how its images are measured.
    """
    if model is not None:
        check_reconstructor(model)
    state, info = read_weights(weights)
    if info.model is not None and info.model not in RECONSTRUCTORS:
        raise ModelError(f"{weights} holds the classifier '{info.model}': it is for --task classification")
    model = model or info.model
    if model is None or info.image_shape is None or info.measurement is None:
        raise ModelError(
            f"{weights} does not say which images its reconstructor makes, and of which measurements: give a file that "
            "'oracle-server train-reconstructor' wrote"
        )
    network = build_reconstructor(model, info.image_shape[0])
    fill(network, state)
    module = nn.Sequential(network, nn.Flatten()).eval().requires_grad_(False)
    return Reconstructor(module, info.image_shape, info.measurement)


def _read(source: ClassifierSource) -> tuple[dict[str, Tensor], WeightsInfo]:
    model, weights = source.model, source.weights
    if model is not None and not Path(weights).is_file() and _is_torchvisions(model):
        import torchvision

        names = [known.name for known in torchvision.models.get_model_weights(model)]
        if weights in (*names, "DEFAULT"):
            return _download(model, weights)
        if not Path(weights).suffix:
            raise ModelError(
                f"'{weights}' is neither a file nor weights of torchvision's '{model}': it has {', '.join(names)}"
            )
    return read_weights(Path(weights))


def needs_weights(model: str) -> ModelError:
    """What to say of an architecture that was named without weights."""
    own = model in CIFAR_DEPTHS or model in SMALL_CNNS
    return ModelError(
        f"'{model}' needs --weights FILE" + ("" if own else ", or --weights DEFAULT for torchvision's own")
    )


def _is_torchvisions(model: str) -> bool:
    import torchvision

    return model in torchvision.models.list_models(module=torchvision.models)


def _download(model: str, name: str) -> tuple[dict[str, Tensor], WeightsInfo]:
    import torchvision

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


def fill(network: nn.Module, state: Mapping[str, Tensor]) -> None:
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


def no_image_size(name: str) -> ModelError:
    """What to say where nothing says how large a model's images are."""
    return ModelError(f"nothing says which image size '{name}' was trained on: give --image-size")


def check_normalization(mean: Sequence[float], std: Sequence[float], channels: int) -> None:
    """Raise `ModelError` unless there is a mean and a standard deviation for each channel."""
    for name, values in (("mean", mean), ("std", std)):
        if len(values) != channels:
            raise ModelError(f"--{name} has {len(values)} values and the images {channels} channels")


def count_classes(module: nn.Module, image_shape: tuple[int, int, int], name: str) -> int:
    """Ask once, so that images the network cannot read are found before the first client pays for one.

    Returns:
        k, where one image is answered with one vector of k logits.

    Raises:
        ModelError: it cannot read such images, or answers otherwise.
    """
    try:
        with torch.inference_mode():
            logits = module(torch.zeros(1, *image_shape))
    except ModelError:
        raise
    except Exception as error:  # a network's own code: anything may come
        reason = (str(error) or repr(error)).strip().splitlines()[0]
        raise ModelError(
            f"'{name}' cannot read images {list(image_shape)}: {reason}; see --image-size and --channels"
        ) from error
    if not isinstance(logits, Tensor) or logits.ndim != 2 or len(logits) != 1 or not logits.numel():
        raise ModelError(f"'{name}' does not answer one vector of logits an image")
    return logits.shape[1]
