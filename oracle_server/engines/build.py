"""The engine that the settings ask for."""

from __future__ import annotations

import torch

from oracle_server.cpus import usable_cpus
from oracle_server.engines.engine import Engine
from oracle_server.engines.modules import build_block_engine
from oracle_server.loading import Classifier
from oracle_server.settings import Settings


def build_engine(classifier: Classifier, settings: Settings) -> Engine:
    """The engine that the settings ask for.

    Raises:
        ModelError: the device is not there.
    """
    torch.set_num_threads(usable_cpus())
    return build_block_engine(classifier.module, classifier.image_shape, most=settings.engine_block, budget_s=1.0)
