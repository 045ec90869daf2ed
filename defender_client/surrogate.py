"""A small local model of the black box f', learnt only from answers that are bought anyway.

    s(w) ~ f'(w)        an MLP over the points that the search moves
    L = |s(w) - f'(w)|^2 / var f'  +  rho |D_u s - D_u f'|^2 / mean |D_u f'|^2       every probe is a training pair

The second term is what a probe a small step away says that its base point does not: a derivative (Sobolev training,
Czarnecki et al., NeurIPS 2017). Its gradient, through the run's loss, guides estimators (`zo.guided`); no query is
asked for its sake.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from defender_client.config import SurrogateConfig
from defender_client.objective import Objective

_PREFIX_NET, _PREFIX_ADAM, _PREFIX_MEMORY = "net.", "adam.", "memory."


class Surrogate:
    """The model, its optimizer and what it remembers.

    Args:
        config: sizes and rates.
        dimension: d of a point.
        answers: k of an answer.
        seed: of the weights and of what is replayed.
    """

    def __init__(self, config: SurrogateConfig, dimension: int, answers: int, seed: int) -> None:
        self._config = config
        self._net = _mlp(dimension, answers, config.width, config.depth, seed)
        self._optimizer = torch.optim.Adam(self._net.parameters(), config.lr)
        self._generator = torch.Generator().manual_seed(seed)
        size = config.memory
        # A ring of pairs: base point and step to its probe (0 for the point itself), answer and difference to it.
        self._memory = {
            "points": torch.zeros(size, dimension),
            "steps": torch.zeros(size, dimension),
            "answers": torch.zeros(size, answers),
            "differences": torch.zeros(size, answers),
        }
        self._written = 0
        self._taught = False
        self._scales = torch.ones(2)  # of points and of answers, from the first that were seen

    @property
    def ready(self) -> bool:
        """Whether it has learnt anything. It has not while its first step's answers come in, so that no guide depends
        on how many of them are there."""
        return self._taught

    def guide(self, points: Tensor, targets: Tensor, objective: Objective) -> Tensor:
        """dl(s(w))/dw [b, d] of the run's loss; 0 before anything was learnt."""
        if not self.ready:
            return torch.zeros_like(points)
        at = points.detach().requires_grad_(True)
        (found,) = torch.autograd.grad(objective.losses(self._answers(at), targets).sum(), at)
        return found

    def remember(self, points: Tensor, probes: Tensor, owners: Tensor, answers: Tensor, bases: Tensor) -> None:
        """Keep pairs, the oldest of which are forgotten.

        Args:
            points: w [b, d].
            probes: rows that were asked about, [n, d].
            owners: to which point each belongs, [n], int64.
            answers: f' of the rows, [n, k].
            bases: f' of the points, [b, k]; of a point without rows it may be anything.
        """
        if not len(probes):
            return
        if not self._written:
            self._scales = torch.stack([_rms(points), _rms(answers - answers.mean(dim=0))]).float()
        size = self._config.memory
        kept = {
            "points": points[owners],
            "steps": probes - points[owners],
            "answers": bases[owners],
            "differences": answers - bases[owners],
        }
        n = min(len(probes), size)
        slots = (self._written + torch.arange(n)) % size
        for name, values in kept.items():
            self._memory[name][slots] = values[-n:].float()
        self._written += n

    def learn(self) -> None:
        """Some Adam steps on what is remembered."""
        if not self._written:
            return
        self._taught = True
        config, filled = self._config, min(self._written, self._config.memory)
        for _ in range(config.steps):
            chosen = torch.randint(0, filled, (min(config.batch, filled),), generator=self._generator)
            loss = self._loss(*(self._memory[name][chosen] for name in ("points", "steps", "answers", "differences")))
            self._optimizer.zero_grad()
            loss.backward()
            self._optimizer.step()

    def _loss(self, points: Tensor, steps: Tensor, answers: Tensor, differences: Tensor) -> Tensor:
        found = self._answers(points)
        scale = self._scales[1]
        loss = ((found - answers) / scale).square().mean()
        lengths = steps.norm(dim=1, keepdim=True)
        moved = (lengths > 0).squeeze(1)
        if self._config.slopes and bool(moved.any()):
            lengths = lengths[moved]
            ahead = self._answers(points[moved] + steps[moved])
            told, known = (ahead - found[moved]) / lengths, differences[moved] / lengths
            size = known.square().mean().clamp(min=1e-12)
            loss = loss + self._config.slopes * (told - known).square().mean() / size
        return loss

    def _answers(self, points: Tensor) -> Tensor:
        answers: Tensor = self._net(points / self._scales[0]) * self._scales[1]
        return answers

    def state(self) -> dict[str, Tensor]:
        """All that a checkpoint needs, as tensors."""
        tensors = {f"{_PREFIX_NET}{name}": value for name, value in self._net.state_dict().items()}
        for index, values in self._optimizer.state_dict()["state"].items():
            tensors |= {f"{_PREFIX_ADAM}{index}.{name}": value for name, value in values.items()}
        filled = min(self._written, self._config.memory)
        tensors |= {f"{_PREFIX_MEMORY}{name}": values[:filled].contiguous() for name, values in self._memory.items()}
        tensors |= {
            "written": torch.tensor(self._written),
            "scales": self._scales,
            "generator": self._generator.get_state(),
        }
        return tensors

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Go on from `state`; KeyError, ValueError or RuntimeError where it is another's."""
        groups = self._optimizer.state_dict()["param_groups"]
        moments: dict[int, dict[str, Tensor]] = {}
        weights = {}
        for name, value in state.items():
            if name.startswith(_PREFIX_NET):
                weights[name.removeprefix(_PREFIX_NET)] = value
            elif name.startswith(_PREFIX_ADAM):
                index, _, key = name.removeprefix(_PREFIX_ADAM).partition(".")
                moments.setdefault(int(index), {})[key] = value
        self._net.load_state_dict(weights)
        self._optimizer.load_state_dict({"state": moments, "param_groups": groups})
        self._written = int(state["written"])
        self._taught = self._written > 0
        for name, values in self._memory.items():
            known = state[f"{_PREFIX_MEMORY}{name}"]
            values[: len(known)] = known
        self._scales = state["scales"]
        self._generator.set_state(state["generator"])


def _mlp(dimension: int, answers: int, width: int, depth: int, seed: int) -> nn.Sequential:
    sizes = [dimension, *[width] * depth]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        layers: list[nn.Module] = []
        for taken, given in itertools.pairwise(sizes):
            layers += [nn.Linear(taken, given), nn.SiLU()]
        return nn.Sequential(*layers, nn.Linear(sizes[-1], answers))


def _rms(values: Tensor) -> Tensor:
    return values.double().square().mean().sqrt().clamp(min=1e-6)
