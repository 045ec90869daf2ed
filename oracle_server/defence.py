"""An exported stack in front of the hidden model: f(Dec(Enc(D(x)))), computed as one model by any engine.

The stack is data (`shared.models.stack`), checked against its manifest; no program of the exporter's is run.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

from torch import nn

from oracle_server.loading import Classifier, Reconstructor
from shared.models.manifest import Manifest, load_exported
from shared.models.weight_files import ModelError


def defend(model: Classifier | Reconstructor, path: Path) -> tuple[Classifier | Reconstructor, Manifest]:
    """The model with an exported stack in front of it, and the stack's manifest.

    Args:
        model: what is hidden.
        path: the exported directory, or its manifest.

    Raises:
        ModelError: the export cannot be read, is not as its manifest says, or is for another kind of model.
    """
    stack, manifest = load_exported(path)
    task = "classification" if isinstance(model, Classifier) else "reconstruction"
    if manifest.task != task:
        raise ModelError(f"--defence {path} is for {manifest.task}, and the model does {task}")
    if manifest.image_shape != model.image_shape:
        shapes = f"images {list(manifest.image_shape)}, and the model reads {list(model.image_shape)}"
        raise ModelError(f"--defence {path} is for {shapes}")
    if isinstance(model, Classifier) and manifest.classes != model.classes:
        raise ModelError(f"--defence {path} is for {manifest.classes} classes, and the model has {model.classes}")
    module = nn.Sequential(stack, model.module).eval().requires_grad_(False)
    return dataclasses.replace(model, module=module), manifest
