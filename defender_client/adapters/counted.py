"""An oracle in batches that it takes, with a count of what it was asked: what every adapter stands on."""

from __future__ import annotations

from typing import Any, overload

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from defender_client.callables import AnyOracle, cost_of
from defender_client.config import ConfigError

_ROWS = 1024  # of a batch, for an oracle that names no limit


class Counted:
    """Images [n, c, h, w] in [0, 1] -> scores float32 [n, k], a tensor for a tensor and an array for an array.

    Gradients end here. What the oracle raises is raised.

    Args:
        oracle: who is asked; it is given float32 tensors on the CPU.
        image_shape: (c, h, w); left out, as the oracle has it.
        classes: k, likewise.
        batch: rows of a call, at most; left out, what the oracle takes at once.

    Attributes:
        image_shape, classes, batch: as they are.

    Raises:
        ConfigError: the oracle does not say its shapes, and they were left out.
    """

    def __init__(
        self,
        oracle: AnyOracle,
        *,
        image_shape: tuple[int, int, int] | None = None,
        classes: int | None = None,
        batch: int | None = None,
    ) -> None:
        said = getattr(oracle, "info", oracle)
        shape, k = image_shape or getattr(said, "image_shape", None), classes or getattr(said, "classes", None)
        if shape is None or k is None:
            raise ConfigError("this oracle does not say what it reads and answers: give image_shape and classes")
        self.image_shape: tuple[int, int, int] = shape
        self.classes: int = k
        self.batch: int = batch or getattr(said, "max_rows", None) or _ROWS
        self._oracle = oracle
        self._paid_before = cost_of(oracle)
        self._rows = 0

    @property
    def queries(self) -> int:
        """Queries since this was made: by the oracle's own account where it keeps one, else rows that were answered."""
        paid = cost_of(self._oracle)
        return self._rows if paid is None or self._paid_before is None else paid - self._paid_before

    @overload
    def __call__(self, images: Tensor) -> Tensor: ...

    @overload
    def __call__(self, images: NDArray[Any]) -> NDArray[np.float32]: ...

    @torch.no_grad()
    def __call__(self, images: Tensor | NDArray[Any]) -> Tensor | NDArray[np.float32]:
        if not isinstance(images, Tensor):
            return self(torch.from_numpy(np.array(images, np.float32))).numpy()
        given = images.detach().to("cpu", torch.float32)
        answers = [self._ask(part) for part in given.split(self.batch)] if len(given) else []
        together = torch.cat(answers) if answers else torch.empty(0, self.classes)
        return together.to(images.device)

    def _ask(self, images: Tensor) -> Tensor:
        scores = torch.as_tensor(self._oracle(images)).to("cpu", torch.float32)
        if scores.shape != (len(images), self.classes):
            raise ValueError(f"scores must be {[len(images), self.classes]}, not {list(scores.shape)}")
        self._rows += len(images)
        return scores


def counted(oracle: AnyOracle) -> Counted:
    """The oracle, counted; itself where it is."""
    return oracle if isinstance(oracle, Counted) else Counted(oracle)
