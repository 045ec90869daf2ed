"""The gradient of one training step, while its requests are in flight.

    g^  = ZO estimate of dl/dw from the oracle's answers          (Zhang et al., ICLR 2022)
    dl/dtheta = (dw/dtheta)^T g^, by backpropagating <w, stop_grad(g^)>, eq. 9

A step's samples are cut into micro-batches, each of which goes through the stack at once, and these into questions of
as many samples as fit into one request. While up to `in_flight` questions are with the oracle, the next ones are made
(forward pass, probes) and those answered are told and backpropagated.

Forward passes, random draws, gradients and sums happen in one thread and in the order of the samples; what is in flight
decides only when. The weights are therefore the same, bit for bit, whatever `in_flight` is. The size of the
micro-batches is part of the arithmetic: batch normalization takes its statistics over each of them. What a surrogate
and its alignment learn of a step counts from the next one on, for the same reason.

Several ranks (`ranks`) share each micro-batch out, one after the other: each takes its samples through the stack and
asks about them, along the directions that they have in a single process, and the gradients are summed by
`DistributedDataParallel`. Points, losses and what a surrogate learns from are told to all, so that each rank's
surrogate is the same. The result is that of one process but for the order in which floats are added.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from defender_client import zo
from defender_client.black_box import BlackBox
from defender_client.config import EstimatorConfig, TrainConfig
from defender_client.in_flight import Crew
from defender_client.objective import Objective
from defender_client.ranks import ALONE, Ranks, Tensors
from defender_client.stack import Stack
from defender_client.surrogate import Surrogate
from defender_client.zo import jacobian
from shared.wire.probes import Probes

PURPOSE = "train"


@dataclass(frozen=True)
class Batch:
    """A step's samples.

    Attributes:
        noisy: images [b, c, h, w].
        clean: the same without noise.
        targets: [b, ...], of the run's objective.
        weights: of each sample's loss in the step's, [b], float64, 1 on average.
    """

    noisy: Tensor
    clean: Tensor
    targets: Tensor
    weights: Tensor

    def __len__(self) -> int:
        return len(self.noisy)

    @classmethod
    def even(cls, noisy: Tensor, clean: Tensor, targets: Tensor) -> Batch:
        """One whose samples count alike."""
        return cls(noisy, clean, targets, torch.ones(len(noisy), dtype=torch.float64))

    def part(self, start: int, stop: int) -> Batch:
        """Samples `start` to `stop`."""
        kept = slice(start, stop)
        return Batch(self.noisy[kept], self.clean[kept], self.targets[kept], self.weights[kept])


@dataclass(frozen=True)
class StepResult:
    """What one step's answers say, averaged over the points asked about.

    Attributes:
        loss: mean loss of the run's objective.
        quality: the objective's mean quality; for classifiers the agreement, the fraction of answers whose argmax is
            the label, in 0..1.
        gradient_norm: mean l2 norm of the estimated gradient per sample.
        losses: of each sample, [b], float64; NaN for one that was not asked about. Empty for a validation.
        cosine: of the surrogate's gradient with the oracle's, as far as probes have shown; None without.
    """

    loss: float
    quality: float
    gradient_norm: float
    losses: Tensor
    cosine: float | None = None


@dataclass(frozen=True)
class _Pass:
    """A micro-batch that went through the stack: samples, w [b, d] and D(x~), both with their graph."""

    batch: Batch
    points: Tensor
    denoised: Tensor


@dataclass(frozen=True)
class _Question:
    """Asked, and not told yet.

    Attributes:
        estimator: whose question it is.
        probes: what was asked.
        batch: the samples asked about.
        whole: the micro-batch, if this is its last question.
    """

    estimator: zo.Estimator
    probes: Probes
    batch: Batch
    whole: _Pass | None

    @property
    def owners(self) -> Tensor:
        """The sample of each row, [rows], int64."""
        return torch.arange(len(self.batch)).repeat_interleave(torch.from_numpy(self.probes.row_counts))

    def bases(self, rows: Tensor) -> Tensor:
        """Answers [rows, k] -> those at the points themselves, [n, k]: asked for where differences are forward, and the
        mean of antithetic pairs, but for O(mu^2), where they are central; NaN for a sample without rows."""
        if self.probes.difference == "forward":
            return rows[torch.from_numpy(self.probes.starts)]
        counts = torch.from_numpy(self.probes.row_counts)
        sums = rows.new_zeros(len(counts), rows.shape[1]).index_add_(0, self.owners, rows)
        return torch.where(counts.unsqueeze(1) > 0, sums / counts.unsqueeze(1), torch.nan)


@dataclass(frozen=True)
class _Micro:
    """A micro-batch before anything is asked.

    Attributes:
        whole: all its samples.
        passed: this rank's share of them, through the stack.
        share: which they are, (start, stop).
        points: w of all samples, [b, d], detached.
        guide: a guess of the gradient at each, [b, d]; None without a surrogate.
    """

    whole: Batch
    passed: _Pass
    share: tuple[int, int]
    points: Tensor
    guide: Tensor | None


@dataclass(frozen=True)
class _Lesson:
    """What a surrogate learns from a question: see `Surrogate.remember`, of which `counts` [n] are the owners."""

    points: Tensor
    rows: Tensor
    counts: Tensor
    answers: Tensor
    bases: Tensor

    @property
    def owners(self) -> Tensor:
        """The sample of each row, [rows], int64."""
        return torch.arange(len(self.counts)).repeat_interleave(self.counts)

    def parts(self, size: int) -> Iterator[_Lesson]:
        """The same, of so many samples each."""
        ends = self.counts.cumsum(0).tolist()
        for start in range(0, len(self.counts), size):
            these = slice(start, start + size)
            rows = slice(ends[start - 1] if start else 0, ends[min(start + size, len(ends)) - 1])
            yield _Lesson(
                self.points[these], self.rows[rows], self.counts[these], self.answers[rows], self.bases[these]
            )


@dataclass(frozen=True)
class _Told:
    """A question's answer.

    Attributes:
        gradient: [n, d].
        losses: [n], at the points themselves.
        sums: of losses, of qualities and of rows, over all rows.
        bases, jacobians: what is used again: f' [n, k] and J [n, d, k].
        lesson: for a surrogate, if there is one.
    """

    gradient: Tensor
    losses: Tensor
    sums: tuple[float, float, int]
    bases: Tensor
    jacobians: Tensor | None
    lesson: _Lesson | None


class _Front(nn.Module):
    """What is trained, as one call: noisy images -> w [b, d] and D(x~)."""

    def __init__(self, stack: Stack) -> None:
        super().__init__()
        self.stack = stack

    def forward(self, noisy: Tensor) -> tuple[Tensor, Tensor]:
        denoised = self.stack.denoise(noisy)
        return self.stack.encode(denoised), denoised


@dataclass(frozen=True)
class _Kept:
    """A micro-batch whose Jacobians may be used again: where they were taken, w [b, d] and f'(w) [b, k]."""

    batch: Batch
    points: Tensor
    bases: Tensor
    jacobians: Tensor


def make_estimator(settings: EstimatorConfig, mu: float, generator: torch.Generator) -> zo.Estimator:
    """The estimator that a configuration means, with probes of the step `mu`."""
    options = zo.Options(settings.active, settings.scale, settings.spread, settings.jitter)
    return zo.make(
        settings.name, q=settings.q, mu=mu, difference=settings.difference, generator=generator, options=options
    )


class Estimation:
    """Estimates a step's gradients and backpropagates them.

    Args:
        stack: what is trained.
        black_box: f' of this stack.
        estimator: of the gradients; its own open question, if it has one, is left alone.
        objective: what the answers are held against.
        crew: asks.
        train: `query_rows`, rows of a request, at most, where one sample does not take more; `micro_batch`, `mse`,
            `inner_steps` and `staleness`.
        settings: what is differenced, and what becomes of it.
        surrogate: guides the estimator, if it is `guided`.
        ranks: who shares the work.
    """

    def __init__(
        self,
        stack: Stack,
        black_box: BlackBox,
        estimator: zo.Estimator,
        objective: Objective,
        crew: Crew,
        train: TrainConfig,
        settings: EstimatorConfig,
        surrogate: Surrogate | None = None,
        ranks: Ranks = ALONE,
    ) -> None:
        self._stack, self._black_box, self._estimator, self._crew = stack, black_box, estimator, crew
        self._objective, self._train, self._settings, self._surrogate = objective, train, settings, surrogate
        self._group = max(1, train.query_rows // max(1, estimator.queries_per_sample(stack.dimension)))
        self._keeps = train.inner_steps > 1
        self._ranks, self._front = ranks, ranks.distributed(_Front(stack))
        self._kept: list[_Kept] = []

    def backpropagate(self, batch: Batch, label: str) -> StepResult:
        """Add d (mean loss) / d theta to the gradients of the stack's parameters.

        Args:
            batch: the step's samples.
            label: names the step's requests within the run.
        """
        self._kept = []
        norms: list[Tensor] = []
        sample_losses: list[Tensor] = []
        losses, quality, rows = 0.0, 0.0, 0
        answered = self._answered(batch, label) if self._ranks.alone else self._answered_together(batch, label)
        for report in itertools.chain.from_iterable(answered):
            for loss, good, asked in report["sums"].tolist():
                losses += loss
                quality += good
                rows += int(asked)
            norms.append(report["norms"])
            sample_losses.append(report["losses"])
        self._learn()
        return StepResult(
            losses / max(rows, 1),
            quality / max(rows, 1),
            float(torch.cat(norms).mean()),
            torch.cat(sample_losses),
            self._cosine(),
        )

    def _answered(self, batch: Batch, label: str) -> Iterator[list[Tensors]]:
        """A report of each micro-batch, which is backpropagated by then; the questions of the next are out already."""
        told: list[_Told] = []  # of the micro-batch under way
        for question, answers in self._crew.in_order(self._questions(batch, label)):
            told.append(self._tell(question, answers))
            self._remember(told[-1].lesson)
            if question.whole is not None:
                gradient = torch.cat([part.gradient for part in told])
                self._backward(question.whole, gradient, len(batch))
                yield [_report(told, gradient)]
                if self._keeps:
                    self._keep(question.whole, told)
                told.clear()

    def _answered_together(self, batch: Batch, label: str) -> Iterator[list[Tensors]]:
        """Each rank's report of each micro-batch. No rank goes backwards, which takes all of them, before it knows that
        all have their answers."""
        for first, part in self._micro_batches(batch):
            micro = self._begun(part, synchronised=first + len(part) == len(batch))
            gradient = micro.passed.points.detach().cpu()[:0]

            def work(micro: _Micro = micro, first: int = first) -> Tensors:
                nonlocal gradient
                told = [
                    self._tell(question, answers)
                    for question, answers in self._crew.in_order(self._questions_of(micro, label, first))
                ]
                gradient = torch.cat([gradient, *(part.gradient for part in told)])
                lessons = [part.lesson for part in told if part.lesson is not None]
                taught = {} if self._surrogate is None else _written(lessons, micro.points, self._black_box.answers)
                return _report(told, gradient) | taught

            reports = self._ranks.told(work)
            if self._surrogate is not None:
                for lesson in _read(reports).parts(self._group):
                    self._remember(lesson)
            self._backward(micro.passed, gradient, len(batch))
            yield reports

    def again(self) -> float:
        """Add the gradients at the weights as they are now, of the same samples and by the same answers.

            f'(w') ~ f'(w) + J^T (w' - w)    while |w' - w| <= staleness |w|

        Returns:
            The fraction of samples that still are that near, in 0..1; the others add nothing.
        """
        total = sum(len(kept.batch) for kept in self._kept)
        fresh = 0
        for kept in self._kept:
            passed = self._passed(kept.batch)
            moved = passed.points.detach() - kept.points
            near = moved.norm(dim=1) <= self._train.staleness * kept.points.norm(dim=1)
            if bool(near.any()):
                answers = jacobian.predict(kept.jacobians, kept.bases, moved.double())
                gradient = self._direction(kept.jacobians, answers, kept.batch.targets)
                self._backward(passed, torch.where(near.unsqueeze(1), gradient, 0.0).to(passed.points), total)
            fresh += int(near.sum())
        return fresh / total if total else 0.0

    def _passed(self, batch: Batch, *, synchronised: bool = True) -> _Pass:
        """A share through the stack; `synchronised` where its backward pass is the step's last, which sums gradients
        over the ranks."""
        front = self._front
        with front.no_sync() if isinstance(front, DistributedDataParallel) and not synchronised else nullcontext():
            points, denoised = front(batch.noisy)
        return _Pass(batch, points, denoised)

    def _backward(self, passed: _Pass, gradient: Tensor, samples: int) -> None:
        """dl/dtheta = (dw/dtheta)^T g^, weighted and averaged over the step's samples."""
        weights = passed.batch.weights.to(passed.points).unsqueeze(1)
        loss = (passed.points * gradient.to(passed.points) * weights).sum().div(samples)
        if self._train.mse and len(passed.batch):
            # mse |D(x~) - x|^2, per pixel, averaged alike
            error = F.mse_loss(passed.denoised, passed.batch.clean.to(passed.denoised))
            loss = loss + self._train.mse * error * (len(passed.batch) / samples)
        if not self._ranks.alone:
            loss = loss * self._ranks.size  # of whose gradients the mean is taken, and the sum is meant
        loss.backward()

    def _keep(self, passed: _Pass, told: list[_Told]) -> None:
        bases = torch.cat([part.bases for part in told]).double()
        jacobians = torch.cat([part.jacobians for part in told if part.jacobians is not None])
        known = torch.isfinite(bases).all(dim=1)
        bases = torch.where(known.unsqueeze(1), bases, 0.0)  # one without rows has no Jacobian either
        self._kept.append(_Kept(passed.batch, passed.points.detach(), bases, jacobians))

    def _tell(self, question: _Question, answers: Tensor) -> _Told:
        """What a question's answers [rows, k] say."""
        targets, owners = question.batch.targets, question.owners
        losses = self._objective.losses(answers, targets[owners])
        quality = self._objective.quality(answers, targets[owners])
        bases = question.bases(answers)
        estimator, ragged = question.estimator, question.probes.counts is not None
        shape = (-1,) if ragged else (question.probes.n, question.probes.p)
        gauss_newton = self._settings.direction == "gauss-newton"
        jacobians = None
        if gauss_newton or self._keeps:
            jacobians = copy.copy(estimator).derive(answers.view(*shape, answers.shape[1]))
        values = losses
        if self._settings.values == "answers":
            # D_u l = (dl/df)^T D_u f: what is differenced is linear in the answers
            slopes = torch.nan_to_num(self._objective.slopes(bases, targets))
            values = (answers.double() * slopes[owners]).sum(dim=1)
        gradient = estimator.tell(values.view(shape))
        if jacobians is not None:
            gradient = self._direction(jacobians, torch.nan_to_num(bases.double()), targets).to(gradient)
        lesson = None
        if self._surrogate is not None:
            points = torch.from_numpy(question.probes.base)
            rows = torch.from_numpy(question.probes.expand(0, len(question.probes)))
            lesson = _Lesson(points, rows, torch.from_numpy(question.probes.row_counts), answers, bases)
        sums = float(losses.sum()), float(quality.sum()), len(answers)
        return _Told(gradient, self._objective.losses(bases, targets), sums, bases, jacobians, lesson)

    def _remember(self, lesson: _Lesson | None) -> None:
        if self._surrogate is not None and lesson is not None:
            self._surrogate.remember(lesson.points, lesson.rows, lesson.owners, lesson.answers, lesson.bases)

    def _direction(self, jacobians: Tensor, answers: Tensor, targets: Tensor) -> Tensor:
        """dl/dw, or the Gauss-Newton direction, [n, d], float64, at answers [n, k]."""
        slopes = self._objective.slopes(answers, targets)
        if self._settings.direction == "gradient":
            return jacobian.gradient(jacobians, slopes)
        return jacobian.gauss_newton(jacobians, slopes, self._objective.root(answers), self._settings.damping)

    def _cosine(self) -> float | None:
        if not isinstance(self._estimator, zo.Guided) or not self._estimator.alignment.known:
            return None
        return self._estimator.alignment.cosine

    def _learn(self) -> None:
        if self._surrogate is not None:
            self._surrogate.learn()
        if isinstance(self._estimator, zo.Guided):
            alignment = self._estimator.alignment
            alone = torch.tensor([alignment.pending], dtype=torch.float64)
            alignment.settle(None if self._ranks.alone else self._ranks.joined(alone).sum(dim=0).tolist())

    def _micro_batches(self, batch: Batch) -> Iterator[tuple[int, Batch]]:
        """The step's micro-batches, and where each begins."""
        size = self._train.micro_batch or len(batch)
        for first in range(0, len(batch), size):
            yield first, batch.part(first, first + size)

    def _questions(self, batch: Batch, label: str) -> Iterator[Callable[[], tuple[_Question, Tensor]]]:
        """The step's questions in order, to be put to the oracle."""
        for first, part in self._micro_batches(batch):
            yield from self._questions_of(self._begun(part), label, first)

    def _begun(self, part: Batch, *, synchronised: bool = True) -> _Micro:
        """A micro-batch through the stack, of which this rank takes its share."""
        share = self._ranks.share(len(part))
        passed = self._passed(part.part(*share), synchronised=synchronised)
        points = self._ranks.joined(passed.points.detach().cpu())
        guide = None
        if self._surrogate is not None:
            guide = self._surrogate.guide(points, part.targets, self._objective)
        return _Micro(part, passed, share, points, guide)

    def _questions_of(self, micro: _Micro, label: str, first: int) -> Iterator[Callable[[], tuple[_Question, Tensor]]]:
        """This rank's questions about a micro-batch, in order; the generator is drawn from as if all were asked."""
        points, (begin, end) = micro.points, micro.share
        for start in range(0, len(points), self._group):
            stop = min(start + self._group, len(points))
            low, high = max(start, begin), min(stop, end)
            estimator = self._estimator.fork()
            these, guide = points[start:stop], micro.guide[start:stop] if micro.guide is not None else None
            if low >= high:
                estimator.skip(these, guide)
                continue
            part = None if (low, high) == (start, stop) else (low - start, high - start)
            probes = estimator.ask_factored(these, guide, part)
            whole = micro.passed if high == end else None
            question = _Question(estimator, probes, micro.whole.part(low, high), whole)
            yield self._asking(question, f"{label}/{first + low}")

    def _asking(self, question: _Question, label: str) -> Callable[[], tuple[_Question, Tensor]]:
        def asked() -> tuple[_Question, Tensor]:
            answers = self._black_box.probed(question.probes, purpose=PURPOSE, label=label)
            return question, answers.reshape(-1, answers.shape[-1])

        return asked


def _report(told: list[_Told], gradient: Tensor) -> Tensors:
    """What is said of a micro-batch, or of a rank's share of it: sums [questions, 3], norms [n] and losses [n]."""
    return {
        "sums": torch.tensor([part.sums for part in told], dtype=torch.float64).reshape(-1, 3),
        "norms": gradient.norm(dim=1),
        "losses": torch.cat([torch.empty(0, dtype=torch.float64), *(part.losses for part in told)]),
    }


def _written(lessons: list[_Lesson], points: Tensor, answers: int) -> Tensors:
    """Lessons as they travel; `points` and `answers` say what none of them looks like."""
    if not lessons:
        empty, none = points[:0], torch.empty(0, answers)
        lessons = [_Lesson(empty, empty, torch.empty(0, dtype=torch.int64), none, none)]
    names = ("points", "rows", "counts", "answers", "bases")
    return {f"lesson.{name}": torch.cat([getattr(lesson, name) for lesson in lessons]) for name in names}


def _read(reports: list[Tensors]) -> _Lesson:
    """All ranks' lessons in one."""
    return _Lesson(
        *(
            torch.cat([report[f"lesson.{name}"] for report in reports])
            for name in ("points", "rows", "counts", "answers", "bases")
        )
    )
