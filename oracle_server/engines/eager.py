"""PyTorch as it is."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from oracle_server.engines.engine import Compute


def eager(module: nn.Module) -> Compute:
    """The module's own layers, on channels-last memory: convolutions run 1.2 times faster there."""
    network = copy.deepcopy(module).to(memory_format=torch.channels_last)

    def compute(rows: Tensor) -> Tensor:
        with torch.inference_mode():
            answers: Tensor = network(channels_last(rows))
            return answers.contiguous()

    return compute


def channels_last(rows: Tensor) -> Tensor:
    """Images in the order convolutions like; other rows as they are."""
    return rows.contiguous(memory_format=torch.channels_last) if rows.ndim == 4 else rows
