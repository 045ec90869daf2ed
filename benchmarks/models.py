"""The classifiers that benchmarks serve, as files that every server and every process reads alike.

`linear` computes next to nothing, so that what is measured is how images travel. This module needs torch, safetensors
and `shared` only: other frameworks' environments import it.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from torch import nn

from shared.models.classifiers import Normalize, build_own

IMAGE_SHAPE = (3, 32, 32)
CLASSES = 10
LINEAR = "linear"


def load(path: Path) -> nn.Module:
    """Images [b, 3, 32, 32] in [0, 1] -> logits [b, 10], normalisation included, in evaluation mode."""
    with safe_open(str(path), framework="pt") as file:
        state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        header = {name: json.loads(value) for name, value in (file.metadata() or {}).items()}
    network = _build(header["model"])
    network.load_state_dict(state)
    module = nn.Sequential(Normalize(header["mean"], header["std"]), network)
    return module.eval().requires_grad_(False)


def name_of(path: Path) -> str:
    """The architecture that a file of `write` is for."""
    with safe_open(str(path), framework="pt") as file:
        name: str = json.loads((file.metadata() or {})["model"])
    return name


def _build(name: str) -> nn.Module:
    if name == LINEAR:
        return nn.Sequential(nn.Flatten(), nn.Linear(int(np.prod(IMAGE_SHAPE)), CLASSES))
    module = build_own(name, IMAGE_SHAPE[0], CLASSES)
    if module is None:
        raise ValueError(f"no classifier is called {name!r} here")
    return module


def write(name: str, weights: Path | None, path: Path) -> Path:
    """A file for `load`: the weights of a file that the oracle reads, or random ones; returns `path`."""
    from oracle_server.loading import load_classifier
    from oracle_server.settings import Settings
    from shared.models.architectures import usual
    from shared.models.weight_files import WeightsInfo, write_weights

    if weights is not None and name != LINEAR:
        settings = Settings(model=name, weights=str(weights))
        normalize, network = load_classifier(settings).module.children()
        assert isinstance(normalize, Normalize)
        mean, std = normalize.mean.flatten().tolist(), normalize.std.flatten().tolist()
    else:
        with torch.random.fork_rng(devices=()):
            torch.manual_seed(0)
            network = _build(name)
        if name == LINEAR:
            mean, std = [0.0] * IMAGE_SHAPE[0], [1.0] * IMAGE_SHAPE[0]
        else:
            usually = usual(name)
            mean, std = list(usually.mean or ()), list(usually.std or ())
    info = WeightsInfo(name, IMAGE_SHAPE[0], IMAGE_SHAPE[1], CLASSES, tuple(mean), tuple(std))
    write_weights(path, network.state_dict(), info)
    return path


def images(rows: int, data: Path | None) -> np.ndarray:
    """Images float32 [rows, 3, 32, 32] in [0, 1]: of a data set's test split, or random ones."""
    if data is None:
        return np.random.default_rng(0).random((rows, *IMAGE_SHAPE), dtype=np.float32)
    from shared import datasets

    found = datasets.load("cifar10", data, "test")
    found_rows = torch.arange(rows) % len(found)
    return found.floats(found_rows).numpy()
