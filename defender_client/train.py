"""Zeroth-order training of denoiser and encoder from answers alone: ZO-DS and ZO-AE-DS (Zhang et al., ICLR 2022).

    x~  = x + delta,  delta ~ N(0, sigma^2 I)
    w   = Enc(D_theta(x~))                        (ZO-DS: w = D_theta(x~))
    l   = CE(f'(w), argmax f(x))                  stability loss, eq. 5; f'(w) = f(Dec(w))
    g^  = ZO estimate of dl/dw                    from the oracle's answers only
    dl/dtheta = (dw/dtheta)^T g^                  by backpropagating <w, stop_grad(g^)>, eq. 9

Everything random comes from the seed through generators that are part of the checkpoint, so that a run killed at any
moment goes on with the same sequence.
"""

from __future__ import annotations

import json
import math
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import FrameType

import torch
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from defender_client import checkpoints, noise_floor, zo
from defender_client import stack as stacks
from defender_client.appending import drop_lines_from
from defender_client.black_box import BlackBox
from defender_client.checkpoints import CHECKPOINT_FILE, CheckpointError, Progress
from defender_client.config import RunConfig, TrainConfig
from defender_client.data import Splits, augment, epoch_order, gaussian
from defender_client.estimation import Estimation, StepResult
from defender_client.in_flight import Crew
from defender_client.labels import oracle_labels
from defender_client.losses import cross_entropy
from defender_client.oracle import Oracle, WaitGivenUp
from defender_client.pretrain import pretrain
from defender_client.progress import meter
from defender_client.stack import Stack, StackSpec

STACK_FILE = "stack.safetensors"
CURVE_FILE = "training.jsonl"


def train(config: RunConfig, spec: StackSpec, run: Path, splits: Splits, oracle: Oracle) -> Stack:
    """Train a stack over HTTP, from its last checkpoint if there is one; returns the best by the validation split.

    Writes to `run`: `stack.safetensors` (the best so far), `checkpoint.safetensors`, `training.jsonl` (one line per
    validation), TensorBoard events under `tensorboard/`.

    Raises:
        OracleError: a refusal that retrying cannot better, such as `BudgetExhausted`; the run resumes where it stopped.
        FiniteDifferencesUseless: the oracle's answers are too coarse or too noisy; only the measurement was paid for.
    """
    final = run / STACK_FILE
    if config.estimator.name == "none":
        stack = pretrain(config, spec, run, splits)
        if not final.exists():
            stacks.save(stack, final)
        return stack
    checkpoint = checkpoints.load(run / CHECKPOINT_FILE)
    if checkpoint is not None and checkpoint.progress.epoch >= config.train.epochs:
        return stacks.load(final)
    stack = pretrain(config, spec, run, splits)
    mu = noise_floor.step(config, run, stack, splits.train, oracle, started=checkpoint is not None)
    labels = oracle_labels(
        run,
        oracle,
        {"train": splits.train, "validation": splits.validation},
        config.train.query_rows,
        config.train.in_flight,
    )
    _Trainer(config, run, splits, oracle, stack, labels, mu).run(checkpoint)
    return stacks.load(final)


class _Trainer:
    def __init__(
        self,
        config: RunConfig,
        run: Path,
        splits: Splits,
        oracle: Oracle,
        stack: Stack,
        labels: dict[str, Tensor],
        mu: float,
    ) -> None:
        self._config, self._run, self._splits, self._oracle = config, run, splits, oracle
        self._stack, self._labels = stack, labels
        self._black_box = BlackBox(stack, oracle, config.train.query_rows, config.train.query_form)
        self._crew = Crew(config.train.in_flight)
        self._generators = {
            name: torch.Generator().manual_seed(config.seed * 7 + offset)
            for offset, name in enumerate(("noise", "probes"), start=1)
        }
        estimator = config.estimator
        self._estimation = Estimation(
            stack,
            self._black_box,
            zo.make(
                estimator.name,
                q=estimator.q,
                mu=mu,
                difference=estimator.difference,
                generator=self._generators["probes"],
            ),
            self._crew,
            query_rows=config.train.query_rows,
            micro_batch=config.train.micro_batch,
        )
        self._progress = Progress()
        self._optimizer = self._new_optimizer(0)

    def run(self, checkpoint: checkpoints.Checkpoint | None) -> None:
        """All epochs that are left; KeyboardInterrupt where a signal ended them."""
        if checkpoint is not None:
            self._restore(checkpoint)
        try:
            self._epochs()
        except WaitGivenUp:
            raise KeyboardInterrupt from None

    def _epochs(self) -> None:
        settings, count = self._config.train, len(self._splits.train)
        batches = math.ceil(count / settings.batch)
        done = self._progress
        samples_done = done.epoch * count + min(done.batch * settings.batch, count)
        with (
            SummaryWriter(str(self._run / "tensorboard"), purge_step=done.step) as board,
            meter("train", settings.epochs * count, "samples", samples_done) as meter_,
            self._crew,
            _whole_steps(self._oracle.stop_waiting) as interrupted,
        ):
            for epoch in range(done.epoch, settings.epochs):
                if optimizer_kind(settings, epoch) is not type(self._optimizer):
                    self._optimizer = self._new_optimizer(epoch)
                order = epoch_order(count, self._config.seed, epoch).split(settings.batch)
                for batch in range(self._progress.batch, batches):
                    result = self._step(order[batch], epoch)
                    self._progress = replace(
                        self._progress, step=self._progress.step + 1, batch=batch + 1, queries=self._oracle.cost
                    )
                    if self._progress.step % settings.checkpoint_every == 0 or interrupted():
                        self._save()
                    self._record(board, "train", result)
                    meter_.advance(
                        len(order[batch]),
                        f"loss {result.loss:.3f}, agreement {result.agreement:.3f}",
                        spent=self._oracle.log.total,
                        left=self._oracle.remaining,
                    )
                    if interrupted():
                        raise KeyboardInterrupt
                self._end_epoch(epoch, board)

    def _step(self, index: Tensor, epoch: int) -> StepResult:
        """One optimizer step on the training images at `index`."""
        config = self._config
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate(config.train, epoch, self._progress.batch, len(self._splits.train))
        self._stack.train()
        clean = augment(self._splits.train.floats(index), config.data.augment, self._generators["noise"])
        noisy = gaussian(clean, config.sigma, self._generators["noise"])
        self._optimizer.zero_grad()
        result = self._estimation.backpropagate(noisy, self._labels["train"][index], f"train/{self._progress.step}")
        self._optimizer.step()
        return result

    def _end_epoch(self, epoch: int, board: SummaryWriter) -> None:
        """Validate, keep the best stack, checkpoint."""
        settings = self._config.train
        last = epoch + 1 == settings.epochs
        best = self._progress.best
        if len(self._splits.validation) and ((epoch + 1) % settings.validate_every == 0 or last):
            result = self._validate(epoch)
            self._record(board, "validation", result)
            line = {
                "epoch": epoch + 1,
                "step": self._progress.step,
                "queries": self._oracle.cost,
                "loss": result.loss,
                "agreement": result.agreement,
            }
            # A validation that a kill cut off from its checkpoint is done again, and replaces itself.
            drop_lines_from(self._run / CURVE_FILE, lambda known: _step_of(known) >= self._progress.step)
            with (self._run / CURVE_FILE).open("a", encoding="utf-8") as curve:
                curve.write(json.dumps(line) + "\n")
            if result.agreement >= best:
                best = result.agreement
                stacks.save(self._stack, self._run / STACK_FILE)
        elif not len(self._splits.validation) and last:
            stacks.save(self._stack, self._run / STACK_FILE)
        self._progress = replace(self._progress, epoch=epoch + 1, batch=0, queries=self._oracle.cost, best=best)
        self._save()

    @torch.no_grad()
    def _validate(self, epoch: int) -> StepResult:
        """Agreement with the oracle's own labels on noisy validation images, the same noise every time."""
        self._stack.eval()
        validation = self._splits.validation
        generator = torch.Generator().manual_seed(self._config.seed)
        losses, hits = 0.0, 0
        for logits, targets in self._crew.in_order(self._validations(epoch, generator)):
            losses += float(cross_entropy(logits, targets).sum())
            hits += int((logits.argmax(1) == targets).sum())
        return StepResult(losses / len(validation), hits / len(validation), 0.0)

    def _validations(self, epoch: int, generator: torch.Generator) -> Iterator[Callable[[], tuple[Tensor, Tensor]]]:
        """Batches of noisy validation images to be asked about: logits [n, k] and labels [n]."""
        validation, size = self._splits.validation, self._config.train.batch
        for start in range(0, len(validation), size):
            part = slice(start, start + size)
            points = self._stack.front(gaussian(validation.floats(part), self._config.sigma, generator))
            yield partial(self._validated, points, self._labels["validation"][part], f"validation/{epoch}/{start}")

    def _validated(self, points: Tensor, targets: Tensor, label: str) -> tuple[Tensor, Tensor]:
        return self._black_box.logits(points, purpose="validation", label=label), targets

    def _record(self, board: SummaryWriter, what: str, result: StepResult) -> None:
        step = self._progress.step
        board.add_scalar(f"{what}/loss", result.loss, step)
        board.add_scalar(f"{what}/agreement", result.agreement, step)
        if what == "train":
            board.add_scalar("train/gradient_norm", result.gradient_norm, step)
            board.add_scalar("queries/spent", self._oracle.cost, step)

    def _new_optimizer(self, epoch: int) -> torch.optim.Optimizer:
        settings = self._config.train
        parameters, decay = self._stack.trainable(), settings.weight_decay
        if optimizer_kind(settings, epoch) is torch.optim.SGD:
            return torch.optim.SGD(parameters, settings.lr, momentum=0.9, weight_decay=decay)
        return torch.optim.Adam(parameters, settings.lr, weight_decay=decay)

    def _save(self) -> None:
        states = {name: generator.get_state() for name, generator in self._generators.items()}
        checkpoints.save(self._run / CHECKPOINT_FILE, self._progress, self._stack, self._optimizer, states)

    def _restore(self, checkpoint: checkpoints.Checkpoint) -> None:
        self._progress = checkpoint.progress
        epoch = max(checkpoint.progress.epoch - (checkpoint.progress.batch == 0), 0)
        self._optimizer = self._new_optimizer(epoch)
        try:
            self._stack.load_state_dict(checkpoint.stack)
            self._optimizer.load_state_dict(checkpoint.optimizer)
            for name, generator in self._generators.items():
                generator.set_state(checkpoint.generators[name])
        except (RuntimeError, ValueError, KeyError) as error:
            raise CheckpointError(f"{self._run / CHECKPOINT_FILE} belongs to another run: {error}") from None


def _step_of(line: bytes) -> int:
    """The step of a line of the curve; -1 for one that is damaged."""
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return -1


def optimizer_kind(settings: TrainConfig, epoch: int) -> type[torch.optim.Optimizer]:
    """Adam; under the paper's schedule SGD after the first third of the epochs."""
    third = math.ceil(settings.epochs / 3)
    return torch.optim.SGD if settings.schedule == "paper" and epoch >= third else torch.optim.Adam


def learning_rate(settings: TrainConfig, epoch: int, batch: int, samples: int) -> float:
    """The rate of one step under the run's schedule (see `TrainConfig`)."""
    if settings.schedule == "cosine":
        batches = math.ceil(samples / settings.batch)
        done = (epoch * batches + batch) / (settings.epochs * batches)
        return settings.lr * 0.5 * (1 + math.cos(math.pi * done))
    if settings.schedule == "paper" and epoch >= 2 * math.ceil(settings.epochs / 3):
        return settings.lr / 10
    return settings.lr


@contextmanager
def _whole_steps(stop_waiting: Callable[[], None]) -> Iterator[Callable[[], bool]]:
    """Let SIGINT and SIGTERM wait for the end of the current step; a second signal ends at once.

    `stop_waiting` is called by the first: a step that would wait for the server's limits is not worth waiting for. It
    is made again when the run is resumed, from answers that are paid.
    """
    caught = False
    if threading.current_thread() is not threading.main_thread():
        yield lambda: False  # signals are the main thread's; whoever runs training elsewhere handles them there
        return

    def note(number: int, frame: FrameType | None) -> None:
        nonlocal caught
        if caught:
            raise KeyboardInterrupt
        caught = True
        stop_waiting()

    previous = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: caught
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
