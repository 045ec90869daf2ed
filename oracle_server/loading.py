"""Which model the settings name, whatever it is made of, behind the preprocessing that was declared."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from oracle_server.settings import Settings
from oracle_server.sources.hub import load_hub
from oracle_server.sources.naming import Kind, ModelName, parse_name
from oracle_server.sources.network import Network
from oracle_server.sources.onnx_file import load_onnx
from oracle_server.sources.preprocessing import Preprocessing, read_preprocessing, with_preprocessing
from oracle_server.sources.timm_models import load_timm
from oracle_server.sources.torch_export import load_export
from oracle_server.sources.torchscript import load_torchscript
from oracle_server.sources.user_code import load_code
from shared.models import loading
from shared.models.architectures import check_name
from shared.models.loading import (
    Classifier,
    ClassifierSource,
    Reconstructor,
    check_normalization,
    count_classes,
    load_network,
    needs_weights,
    no_image_size,
)
from shared.models.reconstructors import check_reconstructor
from shared.models.weight_files import ModelError

__all__ = ["SHIPPED", "Classifier", "Hidden", "Reconstructor", "load_classifier", "load_hidden", "load_model"]

log = logging.getLogger(__name__)
SHIPPED = {"digits-cnn": Path(__file__).parent / "weights" / "digits-cnn.safetensors"}
_OF_CLASSIFIERS = ("classes", "channels", "image_size", "mean", "std", "preprocessing")
_PROGRAMS: dict[Kind, str] = {
    "onnx": "an ONNX graph",
    "torchscript": "a TorchScript program",
    "torch.export": "a program of torch.export",
}
_TRIED, _SUM_WITHIN = 3, 1e-3


@dataclass(frozen=True)
class Hidden:
    """A model and what its operator may know of it.

    Attributes:
        model: ready to be queried.
        source: what kind of name it was loaded by.
        architecture: the network's class, or its kind of program.
        files: what it was read from; none where a library fetched its weights by itself.
        preprocessing: what stands before a classifier, everything filled in; None for a reconstructor.
    """

    model: Classifier | Reconstructor
    source: Kind
    architecture: str
    files: tuple[Path, ...]
    preprocessing: Preprocessing | None


def load_model(settings: Settings) -> Classifier | Reconstructor:
    """The model of the settings' task. Raises `ModelError`, as `load_hidden` does."""
    return load_hidden(settings).model


def load_classifier(settings: Settings) -> Classifier:
    """The classifier that the settings name, in evaluation mode, on the CPU.

    Raises:
        ModelError: unknown architecture, missing or unreadable weights, or weights that do not fit; and as the modules
            of `oracle_server.sources` say of theirs.
    """
    return _classifier(settings)[0]


def load_hidden(settings: Settings) -> Hidden:
    """The model of the settings' task, with what there is to know of it.

    Raises:
        ModelError: as `load_classifier`, and as `load_reconstructor`.
    """
    if settings.task == "reconstruction":
        reconstructor = load_reconstructor(settings)
        made_by = _class(next(reconstructor.module.children()))
        return Hidden(reconstructor, "name", made_by, (Path(settings.weights or ""),), None)
    classifier, name, network, preprocessing = _classifier(settings)
    architecture = _PROGRAMS.get(name.kind) or _class(network.module)
    return Hidden(classifier, name.kind, architecture, network.files, preprocessing)


def load_reconstructor(settings: Settings) -> Reconstructor:
    """The reconstructor that the settings name, in evaluation mode, on the CPU.

    Raises:
        ModelError: unknown architecture, missing or unreadable weights, weights that do not fit, or a setting that only
            a classifier has.
    """
    name = settings.model_name
    check_reconstructor(name)
    for option in _OF_CLASSIFIERS:
        if getattr(settings, option) is not None:
            raise ModelError(f"--{option.replace('_', '-')} is for classifiers: a reconstructor's weights say it all")
    if not settings.weights:
        raise ModelError(f"'{name}' needs --weights FILE: 'oracle-server train-reconstructor' makes one")
    return loading.load_reconstructor(Path(settings.weights), name)


def _classifier(settings: Settings) -> tuple[Classifier, ModelName, Network, Preprocessing]:
    name = parse_name(settings.model_name)
    declared = read_preprocessing(settings.preprocessing)
    network = _network(name, settings)
    preprocessing = _filled(network, declared, settings)
    size, mean, std = preprocessing.size, preprocessing.mean or (), preprocessing.std or ()
    if size is None:
        raise no_image_size(settings.model_name)
    image_shape = (len(mean), *size)
    module = with_preprocessing(network.module, preprocessing, mean, std, size)
    classes = count_classes(module, image_shape, settings.model_name)
    if settings.classes not in (None, classes):
        raise ModelError(f"'{settings.model_name}' has {classes} classes, not {settings.classes}: leave out --classes")
    _check_answers(module, image_shape, classes, preprocessing, settings.model_name)
    return Classifier(module, image_shape, classes, network.bound, network.remembered), name, network, preprocessing


def _network(name: ModelName, settings: Settings) -> Network:
    """The network of a source, without what stands before it."""
    weights = settings.weights
    match name.kind:
        case "timm":
            return load_timm(name.name, weights, settings.channels, settings.classes)
        case "hf-hub":
            return load_hub(name.name, weights)
        case "torch.export":
            return load_export(Path(name.name), weights)
        case "torchscript":
            return load_torchscript(Path(name.name), weights)
        case "onnx":
            return load_onnx(Path(name.name), weights)
        case "code":
            return load_code(name.name, weights)
        case "name":
            return _named(name.name, settings)


def _named(name: str, settings: Settings) -> Network:
    """An architecture of ours or of torchvision's."""
    check_name(name)
    weights = settings.weights or str(SHIPPED.get(name) or "")
    if not weights:
        raise needs_weights(name)
    found = load_network(ClassifierSource(name, weights, settings.classes, settings.channels))
    size = found.image_size
    return Network(
        found.network,
        (found.channels, None, None),
        image_size=None if size is None else (size, size),
        mean=found.mean,
        std=found.std,
        files=(Path(weights),) if Path(weights).is_file() else (),
    )


def _filled(network: Network, declared: Preprocessing, settings: Settings) -> Preprocessing:
    """Everything that is to be known: options win over the file, the file over what the source says.

    Raises:
        ModelError: they contradict each other or what the network reads, or too little is known.
    """
    channels, height, width = network.input_shape
    if declared.layout == "nhwc":
        height, width, channels = network.input_shape
    asked = settings.mean or declared.mean or network.mean
    channels = _channels(network, channels, settings.channels, None if asked is None else len(asked))
    if declared.channels == "bgr" and channels != 3:
        raise ModelError(f"--preprocessing: bgr is an order of 3 channels, and these images have {channels}")
    mean = settings.mean or declared.mean or _in_its_terms(network.mean or (0.0,) * channels, declared)
    std = settings.std or declared.std or _in_its_terms(network.std or (1.0,) * channels, declared)
    check_normalization(mean, std, channels)
    fixed = None if height is None or width is None else (height, width)
    option = None if settings.image_size is None else (settings.image_size, settings.image_size)
    size = option or declared.size or declared.resize or fixed or network.image_size
    read = declared.resize or size
    if fixed is not None and read != fixed:
        raise ModelError(
            f"the network reads images of {fixed[0]} x {fixed[1]} pixels and not {' x '.join(map(str, read or ()))}: "
            f"say resize = [{fixed[0]}, {fixed[1]}] in --preprocessing"
        )
    return declared.model_copy(update={"size": size, "resize": read, "mean": tuple(mean), "std": tuple(std)})


def _channels(network: Network, fixed: int | None, option: int | None, normalized: int | None) -> int:
    if fixed is not None and option not in (None, fixed):
        raise ModelError(f"the network reads images of {fixed} channels, not {option}: leave out --channels")
    first = next((layer.in_channels for layer in network.module.modules() if isinstance(layer, nn.Conv2d)), None)
    found = option or fixed or normalized or first
    if found is None:
        raise ModelError("nothing says how many channels its images have: give --channels")
    return found


def _in_its_terms(values: Sequence[float], declared: Preprocessing) -> tuple[float, ...]:
    """A source's mean or deviation, of red, green, blue in [0, 1], in the units and the order that were declared."""
    scaled = tuple(declared.range * value for value in values)
    return scaled[::-1] if declared.channels == "bgr" else scaled


def _class(network: nn.Module) -> str:
    return f"{type(network).__module__}.{type(network).__qualname__}"


def _check_answers(
    module: nn.Module, image_shape: tuple[int, int, int], classes: int, declared: Preprocessing, name: str
) -> None:
    """Ask about several images at once, and hold the answers against what was declared of them."""
    images = torch.rand(_TRIED, *image_shape, generator=torch.Generator().manual_seed(0))
    try:
        with torch.inference_mode():
            answers = module(images)
    except Exception as error:  # a network's own code: anything may come
        reason = (str(error) or repr(error)).strip().splitlines()[0]
        raise ModelError(
            f"'{name}' answers one image and not {_TRIED} at once ({reason}): export it with a dynamic batch axis"
        ) from error
    if answers.shape != (_TRIED, classes):
        raise ModelError(f"'{name}' answers {_TRIED} images with a tensor {list(answers.shape)}, not one row each")
    total = answers.double().exp().sum(1)
    if declared.output != "logits" and not bool(((total - 1).abs() < _SUM_WITHIN).all()):
        raise ModelError(f"'{name}' does not answer with {declared.output}: over its classes they are not 1 in all")
    total = answers.double().sum(1)
    if declared.output == "logits" and bool((answers >= 0).all() & ((total - 1).abs() < _SUM_WITHIN).all()):
        log.warning(
            "the model's answers look like probabilities and are served as logits: if they are, say "
            "output = 'probabilities' in --preprocessing"
        )
