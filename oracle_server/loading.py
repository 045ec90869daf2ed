"""Which classifier the settings name: see `shared.models.loading`, where it is built."""

from __future__ import annotations

from pathlib import Path

from oracle_server.settings import Settings
from shared.models import loading
from shared.models.architectures import check_name
from shared.models.loading import Classifier, ClassifierSource, needs_weights

__all__ = ["SHIPPED", "Classifier", "load_classifier"]

SHIPPED = {"digits-cnn": Path(__file__).parent / "weights" / "digits-cnn.safetensors"}


def load_classifier(settings: Settings) -> Classifier:
    """The classifier that the settings name, normalisation included, in evaluation mode, on the CPU.

    Raises:
        ModelError: unknown architecture, missing or unreadable weights, or weights that do not fit.
    """
    check_name(settings.model)
    weights = settings.weights or str(SHIPPED.get(settings.model) or "")
    if not weights:
        raise needs_weights(settings.model)
    return loading.load_classifier(
        ClassifierSource(
            model=settings.model,
            weights=weights,
            classes=settings.classes,
            channels=settings.channels,
            image_size=settings.image_size,
            mean=settings.mean,
            std=settings.std,
        )
    )
