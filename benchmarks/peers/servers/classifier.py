"""The classifier that all of them serve, computed as PyTorch does by itself."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import torch

from benchmarks import models


class Classifier:
    """Images float32 [n, 3, 32, 32] -> logits float32 [n, 10]."""

    def __init__(self) -> None:
        torch.set_num_threads(int(os.environ["BENCHMARK_THREADS"]))
        self._module = models.load(Path(os.environ["BENCHMARK_MODEL"]))

    def __call__(self, images: np.ndarray) -> np.ndarray:
        with torch.inference_mode():
            logits: np.ndarray = self._module(torch.from_numpy(images)).numpy()
        return logits
