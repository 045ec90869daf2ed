"""An oracle as a `BlackBoxClassifier` of the Adversarial Robustness Toolbox: its black-box attacks ask over the wire.

asked = Counted(RemoteOracle(url, key))
adversarial = HopSkipJump(art_classifier(asked), max_iter=10).generate(x)
asked.queries
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from defender_client.adapters.counted import counted
from defender_client.callables import AnyOracle
from defender_client.config import ConfigError

if TYPE_CHECKING:
    from art.estimators.classification import BlackBoxClassifier


def art_classifier(oracle: AnyOracle) -> BlackBoxClassifier:
    """ART's classifier for an oracle: images [n, c, h, w] in [0, 1] (its `clip_values`), in batches that it takes.

    ART's attacks that need gradients refuse such a classifier themselves.

    Args:
        oracle: any, or `Counted`, whose `queries` tell what an attack cost; so does the classifier's `predict_fn`.

    Raises:
        ConfigError: ART is not installed, or the oracle does not say its shapes (see `Counted`).
    """
    try:
        from art.estimators.classification import BlackBoxClassifier
    except ImportError:
        raise ConfigError(
            "the Adversarial Robustness Toolbox is not installed: pip install 'zo-defense[art]'"
        ) from None
    asked = counted(oracle)
    return BlackBoxClassifier(asked, asked.image_shape, asked.classes, clip_values=(0.0, 1.0))
