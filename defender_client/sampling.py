"""Which images a training step takes, and what each counts.

    uniform   every image once an epoch, in a shuffled order
    loss      image i with probability p_i = (1 - eps) l_i / sum l + eps / N, l_i its last known loss, and the weight
              1 / (N p_i): the expected gradient is that of uniform sampling, while queries go where the loss is

(Importance sampling for SGD: Zhao and Zhang, ICML 2015; by losses: Katharopoulos and Fleuret 2017.)
"""

from __future__ import annotations

import torch
from torch import Tensor

from defender_client.config import TrainConfig
from defender_client.data import epoch_order

EVEN = 0.3
"""eps, so that no weight exceeds 1 / eps and no image is forgotten."""


def needed(count: int, settings: TrainConfig, seed: int) -> Tensor:
    """The images that a run of these settings takes at all, of `count`: rising indices, int64.

    All of them, unless it ends within its first epoch.
    """
    taken = settings.total_steps(count) * settings.batch
    if settings.sampling != "uniform" or taken >= count:
        return torch.arange(count)
    return epoch_order(count, seed, 0)[:taken].sort().values


class Sampler:
    """Draws the batches of a run.

    Args:
        count: N, images of the training set.
        settings: `batch`, `sampling`.
        seed: every draw depends on it, on the step and on the losses told so far, and on nothing else.
    """

    def __init__(self, count: int, settings: TrainConfig, seed: int) -> None:
        self._count, self._settings, self._seed = count, settings, seed
        self._losses = torch.ones(count, dtype=torch.float64)
        self._order: tuple[int, tuple[Tensor, ...]] | None = None

    def batch(self, epoch: int, number: int) -> tuple[Tensor, Tensor]:
        """Images of a step, by their index [b], int64, and their weights [b], float64."""
        if self._order is None or self._order[0] != epoch:
            self._order = epoch, epoch_order(self._count, self._seed, epoch).split(self._settings.batch)
        index = self._order[1][number]
        if self._settings.sampling == "uniform":
            return index, torch.ones(len(index), dtype=torch.float64)
        chances = self._chances()
        generator = torch.Generator().manual_seed((self._seed * 1_000_003 + epoch) * 1_000_003 + number)
        index = torch.multinomial(chances, len(index), replacement=True, generator=generator)
        return index, 1 / (self._count * chances[index])

    def _chances(self) -> Tensor:
        total = float(self._losses.sum())
        even = torch.full_like(self._losses, 1 / self._count)
        return even if total <= 0 else (1 - EVEN) * self._losses / total + EVEN * even

    def tell(self, index: Tensor, losses: Tensor) -> None:
        """The losses [b] of a step's images; what is not finite is not known."""
        known = torch.isfinite(losses)
        self._losses[index[known]] = losses[known].double()

    def state(self) -> dict[str, Tensor]:
        """What a checkpoint keeps."""
        return {"losses": self._losses} if self._settings.sampling == "loss" else {}

    def restore(self, state: dict[str, Tensor]) -> None:
        """Go on from `state`; ValueError where it is another's."""
        losses = state.get("losses", self._losses)
        if losses.shape != self._losses.shape:
            raise ValueError(f"losses of {len(losses)} images, and there are {self._count}")
        self._losses = losses
