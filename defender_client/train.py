"""Training of denoiser and encoder: from answers alone, ZO-DS and ZO-AE-DS, or through a white box (FO-*).

Zhang et al., ICLR 2022:

    x~  = x + delta,  delta ~ N(0, sigma^2 I)
    w   = Enc(D_theta(x~))                        (ZO-DS: w = D_theta(x~))
    l   = CE(f'(w), argmax f(x))                  stability loss, eq. 5; f'(w) = f(Dec(w))
    g^  = ZO estimate of dl/dw                    from the oracle's answers only
    dl/dtheta = (dw/dtheta)^T g^                  by backpropagating <w, stop_grad(g^)>, eq. 9

FO-DS and FO-AE-DS differ in g^ alone, which is then the gradient (`first_order`).

Everything random comes from the seed through generators that are part of the checkpoint, so that a run killed at any
moment goes on with the same sequence.
"""

from __future__ import annotations

import json
import math
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Protocol

import torch
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from defender_client import checkpoints, noise_floor, rank_norm, zo
from defender_client import stack as stacks
from defender_client.appending import drop_lines_from
from defender_client.black_box import BlackBox
from defender_client.checkpoints import CHECKPOINT_FILE, CheckpointError, Progress
from defender_client.config import ConfigError, RunConfig, TrainConfig
from defender_client.data import Splits, gaussian
from defender_client.estimation import Batch, Estimation, StepResult, make_estimator
from defender_client.first_order import FirstOrder
from defender_client.in_flight import Crew
from defender_client.labels import oracle_answers
from defender_client.objective import OF_TASK, STABILITY, Objective
from defender_client.oracle import Oracle, WaitGivenUp
from defender_client.pretrain import pretrain
from defender_client.progress import meter
from defender_client.ranks import ALONE, Ranks, Tensors
from defender_client.sampling import Sampler, needed
from defender_client.stack import Stack, StackSpec
from defender_client.surrogate import Surrogate
from defender_client.whitebox import COMPARED, WhiteBox, compare
from shared.augmentation import augment

STACK_FILE = "stack.safetensors"
CURVE_FILE = "training.jsonl"


class Gradients(Protocol):
    """Where a step's gradients come from."""

    def backpropagate(self, batch: Batch, label: str) -> StepResult:
        """Add d (mean loss) / d theta to the gradients of the stack's parameters.

        Args:
            batch: the step's samples.
            label: names the step's requests within the run.
        """

    def again(self) -> float:
        """Add the gradients at the weights as they are now, from the same answers; the fraction of samples for which
        these still serve."""


def train(
    config: RunConfig,
    spec: StackSpec,
    run: Path,
    splits: Splits,
    oracle: Oracle,
    whitebox: WhiteBox | None = None,
    ranks: Ranks = ALONE,
) -> Stack:
    """Train a stack over HTTP, from its last checkpoint if there is one; returns the best by the validation split.

    Writes to `run`: `stack.safetensors` (the best so far), `checkpoint.safetensors`, `training.jsonl` (one line per
    validation), TensorBoard events under `tensorboard/`.

    Args:
        whitebox: what gradients go through, where `estimator.name` is `fo`.
        ranks: who shares the work; all of them call this, and rank 0 writes.

    Raises:
        ConfigError: no white box where one is needed, or one where none is; labels that the oracle's scores do not
            have.
        OracleError: a refusal that retrying cannot better, such as `BudgetExhausted`; the run resumes where it stopped.
        FiniteDifferencesUseless: the oracle's answers are too coarse or too noisy; only the measurement was paid for.
    """
    final = run / STACK_FILE
    check_whitebox(config, whitebox is not None)
    if config.estimator.name == "none":
        stack = pretrain(config, spec, run, splits)
        if not final.exists():
            stacks.save(stack, final)
        return stack
    checkpoint = checkpoints.load(run / CHECKPOINT_FILE)
    if checkpoint is not None and checkpoint.progress.epoch >= config.train.total_epochs(len(splits.train)):
        return stacks.load(final)
    objective, mu = OF_TASK[oracle.info.task], config.estimator.mu
    with ranks.leader_first():  # who comes later finds all of it on disk
        stack = pretrain(config, spec, run, splits)
        if config.estimator.zeroth_order:
            mu = noise_floor.step(config, run, stack, splits.train, oracle, started=checkpoint is not None)
        targets, known = _targets(config, run, splits, oracle, objective)
    if whitebox is not None:
        clean, answers = known if known is not None else (None, None)
        compare(run, whitebox, clean, answers, objective)
    _Trainer(config, run, splits, oracle, stack, objective, targets, mu, whitebox, ranks).run(checkpoint)
    return stacks.load(final)


def check_whitebox(config: RunConfig, given: bool) -> None:
    """ConfigError unless a white box is given where one is needed, and only there."""
    if config.estimator.name == "fo" and not given:
        raise ConfigError(
            f"'{config.preset}' takes its gradients through a classifier that you hold: name its weights by "
            "--whitebox FILE (the oracle gives none)"
        )
    if given and config.estimator.name != "fo":
        raise ConfigError(f"'{config.preset}' takes no gradients through a classifier: leave out --whitebox")


def _targets(
    config: RunConfig, run: Path, splits: Splits, oracle: Oracle, objective: Objective
) -> tuple[dict[str, Tensor], tuple[Tensor, Tensor] | None]:
    """What noisy images are to become, by split; and some clean images with the oracle's answers, if bought."""
    sets = {"train": splits.train, "validation": splits.validation}
    if config.train.targets == "oracle":
        # Of images that no step will take, the answers would be bought for nothing.
        index = needed(len(splits.train), config.train, config.seed)
        asked = {"train": splits.train.subset(index), "validation": splits.validation}
        answers = oracle_answers(run, oracle, asked, config.train.query_rows, config.train.in_flight)
        some = objective.targets_of(answers["train"])
        targets = torch.zeros(len(splits.train), *some.shape[1:], dtype=some.dtype)
        targets[index] = some
        known = splits.train.floats(index[:COMPARED]), answers["train"][:COMPARED]
        return {"train": targets, "validation": objective.targets_of(answers["validation"])}, known
    if objective is not STABILITY:
        raise ConfigError("train.targets=labels is for classifiers: this oracle's answers have no labels")
    largest = max(int(images.labels.max()) for images in sets.values() if len(images))
    if largest >= oracle.info.classes:
        raise ConfigError(
            f"train.targets=labels: the data set has label {largest}, and the oracle {oracle.info.classes} scores"
        )
    return {name: images.labels for name, images in sets.items()}, None


class _Trainer:
    def __init__(
        self,
        config: RunConfig,
        run: Path,
        splits: Splits,
        oracle: Oracle,
        stack: Stack,
        objective: Objective,
        targets: dict[str, Tensor],
        mu: float,
        whitebox: WhiteBox | None,
        ranks: Ranks = ALONE,
    ) -> None:
        self._ranks = ranks
        self._config, self._run, self._splits, self._oracle = config, run, splits, oracle
        self._stack, self._objective, self._targets = stack, objective, targets
        self._black_box = BlackBox(stack, oracle, config.train.query_rows, config.train.query_form)
        self._crew = Crew(config.train.in_flight)
        stack.to(ranks.device)
        if not ranks.alone:
            rank_norm.shared(stack)
        self._generators = {
            name: torch.Generator().manual_seed(config.seed * 7 + offset)
            for offset, name in enumerate(("noise", "probes"), start=1)
        }
        self._surrogate = self._new_surrogate() if config.estimator.guided else None
        self._estimator: zo.Estimator | None = None
        self._gradients = self._first_order(whitebox) if whitebox is not None else self._zeroth_order(mu)
        self._sampler = Sampler(len(splits.train), config.train, config.seed)
        self._progress = Progress()
        self._optimizer = self._new_optimizer(0)

    def _first_order(self, whitebox: WhiteBox) -> Gradients:
        train = self._config.train
        return FirstOrder(self._stack, whitebox.module, self._objective, micro_batch=train.micro_batch, mse=train.mse)

    def _zeroth_order(self, mu: float) -> Gradients:
        self._estimator = make_estimator(self._config.estimator, mu, self._generators["probes"])
        return Estimation(
            self._stack,
            self._black_box,
            self._estimator,
            self._objective,
            self._crew,
            self._config.train,
            self._config.estimator,
            self._surrogate,
            self._ranks,
        )

    def _new_surrogate(self) -> Surrogate:
        answers = self._oracle.info.classes
        return Surrogate(self._config.surrogate, self._stack.dimension, answers, self._config.seed)

    def run(self, checkpoint: checkpoints.Checkpoint | None) -> None:
        """All epochs that are left; KeyboardInterrupt where a signal ended them."""
        if checkpoint is not None:
            self._restore(checkpoint)
        try:
            self._epochs()
            self._ranks.any(False)  # nobody goes on before rank 0 has written the last of it
        except WaitGivenUp:
            raise KeyboardInterrupt from None

    def _epochs(self) -> None:
        settings, count = self._config.train, len(self._splits.train)
        batches, steps = settings.batches(count), settings.total_steps(count)
        done = self._progress
        total, samples_done = settings.samples(steps, count), settings.samples(done.step, count)
        with (
            self._board(done.step) as board,
            meter("train", total, "samples", samples_done) as meter_,
            self._crew,
            _whole_steps(self._oracle.stop_waiting) as interrupted,
        ):
            for epoch in range(done.epoch, settings.total_epochs(count)):
                if optimizer_kind(settings, epoch, count) is not type(self._optimizer):
                    self._optimizer = self._new_optimizer(epoch)
                for batch in range(self._progress.batch, min(batches, steps - epoch * batches)):
                    result = self._step(epoch)
                    self._progress = replace(
                        self._progress, step=self._progress.step + 1, batch=batch + 1, queries=self._cost()
                    )
                    stop = self._ranks.any(interrupted())
                    if self._progress.step % settings.checkpoint_every == 0 or stop:
                        self._save()
                    self._record(board, "train", result)
                    meter_.advance(
                        settings.samples(self._progress.step, count) - settings.samples(self._progress.step - 1, count),
                        f"loss {result.loss:.3f}, {self._objective.quality_name} {result.quality:.3f}"
                        + (f", surrogate's cosine {result.cosine:.2f}" if result.cosine is not None else ""),
                        spent=self._oracle.log.total if self._ranks.alone else self._progress.queries,
                        left=self._oracle.remaining,
                    )
                    if stop:
                        raise KeyboardInterrupt
                self._end_epoch(epoch, board)

    def _board(self, step: int) -> AbstractContextManager[SummaryWriter | None]:
        """Where scalars go; rank 0 alone has one."""
        if not self._ranks.leads:
            return nullcontext()
        board: AbstractContextManager[SummaryWriter] = SummaryWriter(str(self._run / "tensorboard"), purge_step=step)
        return board

    def _cost(self) -> int:
        """Queries that the run's answers have cost in all, on all ranks; told to all of them."""
        return self._ranks.total(self._oracle.cost)

    def _step(self, epoch: int) -> StepResult:
        """One step on the images that are its turn."""
        index, weights = self._sampler.batch(epoch, self._progress.batch)
        return self._train_on(index, weights, epoch)

    def _train_on(self, index: Tensor, weights: Tensor, epoch: int) -> StepResult:
        """The queries of a step on the training images at `index`, and as many optimizer steps as they serve."""
        config = self._config
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate(config.train, epoch, self._progress.batch, len(self._splits.train))
        self._stack.train()
        clean = augment(self._splits.train.floats(index), config.data.augment, self._generators["noise"])
        draws = config.train.draws
        clean, index, weights = (values.repeat_interleave(draws, dim=0) for values in (clean, index, weights))
        noisy = gaussian(clean, config.sigma, self._generators["noise"])
        batch = Batch(noisy, clean, self._targets["train"][index], weights)
        self._optimizer.zero_grad()
        result = self._gradients.backpropagate(batch, f"train/{self._progress.step}")
        self._optimizer.step()
        for _ in range(config.train.inner_steps - 1):
            self._optimizer.zero_grad()
            if not self._gradients.again():
                break
            self._optimizer.step()
        self._sampler.tell(index, result.losses)
        return result

    def _end_epoch(self, epoch: int, board: SummaryWriter | None) -> None:
        """Validate, keep the best stack, checkpoint."""
        settings = self._config.train
        last = epoch + 1 == settings.total_epochs(len(self._splits.train))
        best = self._progress.best
        if len(self._splits.validation) and ((epoch + 1) % settings.validate_every == 0 or last):
            result = self._validate(epoch)
            self._progress = replace(self._progress, queries=self._cost())
            self._record(board, "validation", result)
            if self._ranks.leads:
                self._write_curve(epoch, result)
            if best is None or result.quality >= best:
                best = result.quality
                self._keep_stack()
        elif not len(self._splits.validation) and last:
            self._keep_stack()
        self._progress = replace(self._progress, epoch=epoch + 1, batch=0, best=best)
        self._save()

    def _write_curve(self, epoch: int, result: StepResult) -> None:
        line = {
            "epoch": epoch + 1,
            "step": self._progress.step,
            "queries": self._progress.queries,
            "loss": result.loss,
            self._objective.quality_name: result.quality,
        }
        # A validation that a kill cut off from its checkpoint is done again, and replaces itself.
        drop_lines_from(self._run / CURVE_FILE, lambda known: _step_of(known) >= self._progress.step)
        with (self._run / CURVE_FILE).open("a", encoding="utf-8") as curve:
            curve.write(json.dumps(line) + "\n")

    def _keep_stack(self) -> None:
        if self._ranks.leads:
            stacks.save(self._stack, self._run / STACK_FILE)

    @torch.no_grad()
    def _validate(self, epoch: int) -> StepResult:
        """Loss and quality on noisy validation images, the same noise every time."""
        self._stack.eval()
        validation = self._splits.validation
        generator = torch.Generator().manual_seed(self._config.seed)

        def work() -> Tensors:
            found = [
                (
                    float(self._objective.losses(answers, targets).sum()),
                    float(self._objective.quality(answers, targets).sum()),
                )
                for answers, targets in self._crew.in_order(self._validations(epoch, generator))
            ]
            return {"found": torch.tensor(found, dtype=torch.float64).reshape(-1, 2)}

        parts = [part["found"].tolist() for part in self._ranks.told(work)]
        losses, quality = 0.0, 0.0
        for batch in range(sum(map(len, parts))):
            loss, good = parts[batch % self._ranks.size][batch // self._ranks.size]
            losses += loss
            quality += good
        return StepResult(losses / len(validation), quality / len(validation), 0.0, torch.empty(0))

    def _validations(self, epoch: int, generator: torch.Generator) -> Iterator[Callable[[], tuple[Tensor, Tensor]]]:
        """Batches of noisy validation images to be asked about: answers [n, k] and targets [n, ...]. Ranks take
        turns."""
        validation, size = self._splits.validation, self._config.train.batch
        for number, start in enumerate(range(0, len(validation), size)):
            part = slice(start, start + size)
            noisy = gaussian(validation.floats(part), self._config.sigma, generator)
            if number % self._ranks.size != self._ranks.rank:
                continue
            points = self._stack.front(noisy)
            yield partial(self._validated, points, self._targets["validation"][part], f"validation/{epoch}/{start}")

    def _validated(self, points: Tensor, targets: Tensor, label: str) -> tuple[Tensor, Tensor]:
        return self._black_box.logits(points, purpose="validation", label=label), targets

    def _record(self, board: SummaryWriter | None, what: str, result: StepResult) -> None:
        step = self._progress.step
        if board is None:
            return
        board.add_scalar(f"{what}/loss", result.loss, step)
        board.add_scalar(f"{what}/{self._objective.quality_name}", result.quality, step)
        if what == "train":
            board.add_scalar("train/gradient_norm", result.gradient_norm, step)
            board.add_scalar("queries/spent", self._progress.queries, step)
            if result.cosine is not None:
                board.add_scalar("train/surrogate_cosine", result.cosine, step)

    def _new_optimizer(self, epoch: int) -> torch.optim.Optimizer:
        settings = self._config.train
        parameters, decay = self._stack.trainable(), settings.weight_decay
        if optimizer_kind(settings, epoch, len(self._splits.train)) is torch.optim.SGD:
            return torch.optim.SGD(parameters, settings.sgd_lr or settings.lr, momentum=0.9, weight_decay=decay)
        return torch.optim.Adam(parameters, settings.lr, weight_decay=decay)

    def _save(self) -> None:
        if not self._ranks.leads:
            return
        states = {name: generator.get_state() for name, generator in self._generators.items()}
        checkpoints.save(
            self._run / CHECKPOINT_FILE, self._progress, self._stack, self._optimizer, states, self._beside()
        )

    def _beside(self) -> dict[str, Tensor]:
        """What some runs have beside the stack: a surrogate, what is known of it, the images' losses."""
        tensors = {f"sampler.{name}": value for name, value in self._sampler.state().items()}
        if self._surrogate is not None:
            tensors |= {f"surrogate.{name}": value for name, value in self._surrogate.state().items()}
        if isinstance(self._estimator, zo.Guided):
            alignment = self._estimator.alignment.state()
            tensors |= {
                f"alignment.{name}": torch.tensor(value, dtype=torch.float64) for name, value in alignment.items()
            }
        return tensors

    def _restore(self, checkpoint: checkpoints.Checkpoint) -> None:
        self._progress = checkpoint.progress
        epoch = max(checkpoint.progress.epoch - (checkpoint.progress.batch == 0), 0)
        self._optimizer = self._new_optimizer(epoch)
        try:
            self._stack.load_state_dict(checkpoint.stack)
            self._optimizer.load_state_dict(checkpoint.optimizer)
            for name, generator in self._generators.items():
                generator.set_state(checkpoint.generators[name])
            self._sampler.restore(checkpoint.beside_of("sampler"))
            if self._surrogate is not None:
                self._surrogate.restore(checkpoint.beside_of("surrogate"))
            if isinstance(self._estimator, zo.Guided):
                known = {name: float(value) for name, value in checkpoint.beside_of("alignment").items()}
                self._estimator.alignment.restore(known)
        except (RuntimeError, ValueError, KeyError) as error:
            raise CheckpointError(f"{self._run / CHECKPOINT_FILE} belongs to another run: {error}") from None


def _step_of(line: bytes) -> int:
    """The step of a line of the curve; -1 for one that is damaged."""
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return -1


def optimizer_kind(settings: TrainConfig, epoch: int, images: int) -> type[torch.optim.Optimizer]:
    """Adam; under the paper's schedule SGD after the first third of the epochs, of so many images each."""
    third = math.ceil(settings.total_epochs(images) / 3)
    return torch.optim.SGD if settings.schedule == "paper" and epoch >= third else torch.optim.Adam


def learning_rate(settings: TrainConfig, epoch: int, batch: int, samples: int) -> float:
    """The rate of one step under the run's schedule (see `TrainConfig`)."""
    if settings.schedule == "cosine":
        done = (epoch * settings.batches(samples) + batch) / settings.total_steps(samples)
        return settings.lr * 0.5 * (1 + math.cos(math.pi * done))
    third = math.ceil(settings.total_epochs(samples) / 3)
    if settings.schedule == "paper" and epoch >= third:
        rate = settings.sgd_lr or settings.lr
        return rate / 10 if epoch >= 2 * third else rate
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
