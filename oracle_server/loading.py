"""Which model the settings name: see `shared.models.loading`, where it is built."""

from __future__ import annotations

from pathlib import Path

from oracle_server.settings import Settings
from shared.models import loading
from shared.models.architectures import check_name
from shared.models.loading import Classifier, ClassifierSource, Reconstructor, needs_weights
from shared.models.reconstructors import check_reconstructor
from shared.models.weight_files import ModelError

__all__ = ["SHIPPED", "Classifier", "Reconstructor", "load_classifier", "load_model", "load_reconstructor"]

SHIPPED = {"digits-cnn": Path(__file__).parent / "weights" / "digits-cnn.safetensors"}
_OF_CLASSIFIERS = ("classes", "channels", "image_size", "mean", "std")


def load_model(settings: Settings) -> Classifier | Reconstructor:
    """The model of the settings' task.

    Raises:
        ModelError: as `load_classifier` and `load_reconstructor`.
    """
    return load_reconstructor(settings) if settings.task == "reconstruction" else load_classifier(settings)


def load_classifier(settings: Settings) -> Classifier:
    """The classifier that the settings name, normalisation included, in evaluation mode, on the CPU.

    Raises:
        ModelError: unknown architecture, missing or unreadable weights, or weights that do not fit.
    """
    name = settings.model_name
    check_name(name)
    weights = settings.weights or str(SHIPPED.get(name) or "")
    if not weights:
        raise needs_weights(name)
    return loading.load_classifier(
        ClassifierSource(
            model=name,
            weights=weights,
            classes=settings.classes,
            channels=settings.channels,
            image_size=settings.image_size,
            mean=settings.mean,
            std=settings.std,
        )
    )


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
