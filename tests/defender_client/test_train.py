"""Training over HTTP: the gradient, the cost, and that no kill, of either side and at any moment, changes or costs
anything."""

from __future__ import annotations

import itertools
import json
import os
import signal
from collections.abc import Callable
from contextlib import ExitStack, closing
from pathlib import Path

import pytest
import safetensors.torch
import torch
from defender_support import (
    DNCNN,
    PIXELS,
    RGE,
    Interfering,
    Killed,
    ServerProcess,
    at,
    certify_here,
    command,
    opened,
    same_tensors,
    spent,
    spent_by_purpose,
    tiny,
    train_here,
    wait_until,
    write_tiny,
)
from oracle_support import Caller, Running
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn
from torch.nn import functional as F

from defender_client import checkpoints
from defender_client import stack as stacks
from defender_client.audit import audit
from defender_client.checkpoints import CHECKPOINT_FILE, CheckpointError
from defender_client.config import RunConfig, load_preset
from defender_client.data import load_splits
from defender_client.labels import LABELS_FILE
from defender_client.oracle_client import RemoteOracle
from defender_client.plan import plan
from defender_client.pretrain import PRETRAINED_FILE
from defender_client.query_log import LOG_FILE, QueryLog
from defender_client.train import CURVE_FILE, STACK_FILE, learning_rate, optimizer_kind
from oracle_server.ledger import Ledger
from shared.wire.errors import BudgetExhausted


def last_checkpoint(run: Path) -> checkpoints.Checkpoint:
    found = checkpoints.load(run / CHECKPOINT_FILE)
    assert found is not None
    return found


def planned(config: RunConfig, run: Path | None, server: Running, caller: Caller) -> int:
    splits = load_splits(config.data, None, config.seed)
    with RemoteOracle(server.url, caller.key) as oracle:
        spec = stacks.specify(config, oracle.info.image_shape, oracle.info.classes)
        return plan(config, spec, run, (len(splits.train), len(splits.validation), 0), oracle).to_train


# --- what is learnt ---------------------------------------------------------------------------------------------------


def test_the_gradient_is_that_of_the_whole_stack(
    server: Running, caller: Caller, classifier: nn.Module, tmp_path: Path
) -> None:
    """One step over all images, almost without noise: Adam's first moment is then 0.1 times the gradient."""
    config = tiny(
        tmp_path,
        "sigma=1e-6",
        "estimator.mu=1e-3",
        "estimator.difference=central",
        "train.epochs=1",
        "train.batch=96",
        "train.weight_decay=0",
        "pretrain.autoencoder_epochs=10",
        "pretrain.denoiser_epochs=3",
    )
    train_here(config, tmp_path / "run", server.url, caller.key)
    moments = last_checkpoint(tmp_path / "run").optimizer["state"]
    stack = stacks.load(tmp_path / "run" / PRETRAINED_FILE).train()
    images = load_splits(config.data, None, config.seed).train.floats(slice(None))
    with torch.no_grad():
        labels = classifier(images).argmax(1)
    F.cross_entropy(classifier(stack(images)), labels).backward()
    estimated = torch.cat([moments[i]["exp_avg"].flatten() / 0.1 for i in range(len(stack.trainable()))])
    exact = torch.cat([p.grad.flatten() for p in stack.trainable() if p.grad is not None])
    assert float(F.cosine_similarity(estimated, exact, dim=0)) > 0.99
    assert float(estimated.norm() / exact.norm()) == pytest.approx(1, abs=0.05)


@pytest.mark.parametrize(
    "settings",
    [("estimator.difference=central",), (*RGE, *DNCNN), (*RGE, "estimator.difference=central"), PIXELS],
    ids=["cge-central", "rge-dncnn", "rge-central", "rge-pixels"],
)
def test_a_run_spends_what_the_plan_says(
    server: Running, caller: Caller, tmp_path: Path, settings: tuple[str, ...]
) -> None:
    config, run = tiny(tmp_path, "train.epochs=3", "train.validate_every=2", *settings), tmp_path / "run"
    cost = planned(config, None, server, caller)
    train_here(config, run, server.url, caller.key)
    paid = spent_by_purpose(server, caller)
    each = 2 * 3 if "estimator.difference=central" in settings and RGE[0] in settings else 4
    if "estimator.name=rge" not in settings:
        each = 2 * 8
    # The noise floor, labels once an image, training, validation after epochs 2 and 3.
    noise = 180 if "estimator.difference=central" in settings else 186
    assert paid == {"noise": noise, "labels": 96 + 16, "train": 3 * 96 * each, "validation": 2 * 16}
    assert spent(server, caller) == sum(paid.values()) == cost == last_checkpoint(run).progress.queries
    assert QueryLog.read(run / LOG_FILE).charged == paid
    assert planned(config, run, server, caller) == 0


def test_cge_in_pixels_probes_every_pixel(server: Running, caller: Caller, tmp_path: Path) -> None:
    settings = (*PIXELS, "estimator.name=cge", "data.train_images=8", "train.epochs=1", "pretrain.denoiser_epochs=0")
    config = tiny(tmp_path, *settings)
    cost = planned(config, None, server, caller)
    train_here(config, tmp_path / "run", server.url, caller.key)
    assert spent(server, caller) == cost == 186 + 8 + 16 + 8 * 65 + 16


def test_training_again_costs_nothing_and_changes_nothing(server: Running, caller: Caller, tmp_path: Path) -> None:
    config, run = tiny(tmp_path), tmp_path / "run"
    train_here(config, run, server.url, caller.key)
    before, paid = (run / STACK_FILE).read_bytes(), spent(server, caller)
    stack = train_here(config, run, server.url, caller.key)
    assert (run / STACK_FILE).read_bytes() == before
    assert spent(server, caller) == paid
    assert not stack.training


def test_training_agrees_with_the_oracle_more_and_more(server: Running, caller: Caller, tmp_path: Path) -> None:
    config = tiny(
        tmp_path,
        "data.validation_images=100",
        "pretrain.autoencoder_epochs=15",
        "pretrain.denoiser_epochs=0",
        "pretrain.lr=0.01",
        "train.epochs=4",
        "train.lr=0.02",
        "train.query_rows=1024",
    )
    run = tmp_path / "run"
    train_here(config, run, server.url, caller.key)
    curve = [json.loads(line) for line in (run / CURVE_FILE).read_text().splitlines()]
    assert [point["epoch"] for point in curve] == [1, 2, 3, 4]
    assert curve[-1]["loss"] < 0.95 * curve[0]["loss"]
    assert curve[-1]["agreement"] > curve[0]["agreement"]
    assert curve[-1]["queries"] == spent(server, caller)
    # The stack that is kept is the best one seen.
    best = max(point["agreement"] for point in curve)
    assert last_checkpoint(run).progress.best == best
    if curve[-1]["agreement"] == best:
        kept, final = stacks.load(run / STACK_FILE).state_dict(), last_checkpoint(run).stack
        assert all(torch.equal(kept[name], final[name]) for name in kept)
    board = EventAccumulator(str(run / "tensorboard")).Reload()
    assert {"train/loss", "train/agreement", "train/gradient_norm", "queries/spent", "validation/agreement"} <= set(
        board.Tags()["scalars"]
    )
    assert [event.value for event in board.Scalars("validation/loss")] == pytest.approx([p["loss"] for p in curve])
    assert len(board.Scalars("train/loss")) == 4 * 96 / 32


def test_the_undefended_run_asks_nothing(server: Running, caller: Caller, tmp_path: Path) -> None:
    stack = train_here(load_preset("standard"), tmp_path / "run", server.url, caller.key)
    assert spent(server, caller) == 0
    assert stack.trainable() == []
    assert stacks.load(tmp_path / "run" / STACK_FILE).spec == stack.spec


def test_without_a_validation_split_the_last_stack_is_kept(server: Running, caller: Caller, tmp_path: Path) -> None:
    run = tmp_path / "run"
    train_here(tiny(tmp_path, "data.validation_images=0"), run, server.url, caller.key)
    kept, final = stacks.load(run / STACK_FILE).state_dict(), last_checkpoint(run).stack
    assert all(torch.equal(kept[name], final[name]) for name in kept)
    assert "validation" not in spent_by_purpose(server, caller)


def test_labels_of_other_data_are_not_used(server: Running, caller: Caller, tmp_path: Path) -> None:
    run = tmp_path / "run"
    config = tiny(tmp_path)
    train_here(config, run, server.url, caller.key, None)
    labels = safetensors.torch.load((run / LABELS_FILE).read_bytes())
    assert {name: tuple(rows.shape) for name, rows in labels.items()} == {"train": (96, 10), "validation": (16, 10)}
    (run / CHECKPOINT_FILE).unlink()
    safetensors.torch.save_file({"train": labels["train"][:50], "validation": labels["validation"]}, run / LABELS_FILE)
    with pytest.raises(ValueError, match="other data"):
        train_here(config, run, server.url, caller.key)


# --- schedules --------------------------------------------------------------------------------------------------------


def test_the_paper_s_schedule_is_adam_then_sgd_then_a_tenth(tmp_path: Path) -> None:
    settings = tiny(tmp_path, "train.schedule=paper", "train.epochs=600", "train.lr=1.0").train
    kinds = [optimizer_kind(settings, epoch, 96) for epoch in range(600)]
    assert kinds == [torch.optim.Adam] * 200 + [torch.optim.SGD] * 400
    assert [learning_rate(settings, epoch, 0, 96) for epoch in (0, 199, 200, 399, 400, 599)] == [1, 1, 1, 1, 0.1, 0.1]


def test_other_schedules(tmp_path: Path) -> None:
    cosine = tiny(tmp_path, "train.schedule=cosine", "train.epochs=4", "train.lr=2.0").train
    rates = [learning_rate(cosine, epoch, batch, 96) for epoch in range(4) for batch in range(3)]
    assert rates[0] == 2
    assert rates[6] == pytest.approx(1)
    assert rates == sorted(rates, reverse=True)
    assert 0 < rates[-1] < 0.1
    constant = tiny(tmp_path).train
    assert {learning_rate(constant, epoch, 1, 96) for epoch in range(9)} == {1e-3}
    assert optimizer_kind(constant, 8, 96) is optimizer_kind(cosine, 3, 96) is torch.optim.Adam


# --- killed and started again, within this process: every moment ------------------------------------------------------


def finished(config: RunConfig, run: Path, server: Running, caller: Caller, whole: Path) -> None:
    """Train to the end; then everything must be as if there had been no kill."""
    train_here(config, run, server.url, caller.key)
    for name in (STACK_FILE, CHECKPOINT_FILE, LABELS_FILE, PRETRAINED_FILE):
        assert same_tensors(run / name, whole / name), name
    assert last_checkpoint(run).progress == last_checkpoint(whole).progress
    assert spent(server, caller) == last_checkpoint(whole).progress.queries
    assert (run / CURVE_FILE).read_bytes() == (whole / CURVE_FILE).read_bytes()
    with opened(run, server.url, caller.key) as oracle:
        result = audit([run], oracle)
        assert result.differences == ()
        assert result.logged == spent(server, caller)


SWITCH = ("train.schedule=paper", "train.epochs=3", "train.query_rows=512", *RGE)  # Adam, SGD, SGD / 10


@pytest.fixture(scope="module")
def whole(server: Running, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted run that switches its optimizer twice."""
    folder = tmp_path_factory.mktemp("whole")
    train_here(tiny(folder, *SWITCH), folder / "run", server.url, server.caller(10**6).key)
    return folder / "run"


def test_a_kill_at_any_request_changes_and_costs_nothing(
    server: Running, caller: Caller, tmp_path: Path, whole: Path
) -> None:
    """One run, killed at every single request in turn, by turns before it is sent and after it was answered."""
    config, run = tiny(tmp_path, *SWITCH), tmp_path / "run"
    kills = 0
    for number in itertools.count():
        die = at(1 + number % 3, Killed())
        transport = Interfering(before=die) if number % 2 else Interfering(after=die)
        try:
            train_here(config, run, server.url, caller.key, transport)
            break
        except Killed:
            kills += 1
            left = planned(config, run, server, caller)
            assert spent(server, caller) + left == last_checkpoint(whole).progress.queries
    assert kills > 12
    finished(config, run, server, caller, whole)


def test_a_kill_at_any_file_changes_and_costs_nothing(
    server: Running, caller: Caller, tmp_path: Path, whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed before or after every rename in turn: checkpoints, the best stack, labels, the pre-trained stack."""
    config, run = tiny(tmp_path, *SWITCH), tmp_path / "run"
    replace, kills = os.replace, 0
    for number in itertools.count():
        countdown = 1 + number // 2

        def dying(source: str, target: str, number: int = number) -> None:
            nonlocal countdown
            countdown -= 1
            if countdown == 0 and number % 2:
                raise Killed
            replace(source, target)
            if countdown == 0:
                raise Killed

        with monkeypatch.context() as patched:
            patched.setattr("os.replace", dying)
            try:
                train_here(config, run, server.url, caller.key)
                break
            except Killed:
                kills += 1
    assert kills > 6
    finished(config, run, server, caller, whole)


@pytest.mark.parametrize("settings", [("train.checkpoint_every=2",), (*DNCNN, *RGE)], ids=["seldom", "dncnn"])
def test_kills_under_other_settings(server: Running, caller: Caller, tmp_path: Path, settings: tuple[str, ...]) -> None:
    config, run, whole = tiny(tmp_path, "train.query_rows=512", *settings), tmp_path / "run", tmp_path / "whole"
    train_here(config, whole, server.url, server.caller(10**6).key)
    for number in (5, 3, 2):
        with pytest.raises(Killed):
            train_here(config, run, server.url, caller.key, Interfering(after=at(number, Killed())))
    finished(config, run, server, caller, whole)


def test_a_budget_that_is_just_enough_survives_a_kill(server: Running, tmp_path: Path, whole: Path) -> None:
    config, run = tiny(tmp_path, *SWITCH), tmp_path / "run"
    caller = server.caller(last_checkpoint(whole).progress.queries)
    for number in (1, 5, 3):
        with pytest.raises(Killed):
            train_here(config, run, server.url, caller.key, Interfering(after=at(number, Killed())))
        assert planned(config, run, server, caller) == caller.budget()["remaining"]
    finished(config, run, server, caller, whole)
    assert caller.budget()["remaining"] == 0


def test_a_budget_that_runs_out_stops_and_can_be_raised(
    server: Running, caller: Caller, tmp_path: Path, whole: Path
) -> None:
    config, run = tiny(tmp_path, *SWITCH), tmp_path / "run"
    server.ledger.set_budget(caller.client.name, 686)
    with pytest.raises(BudgetExhausted):
        train_here(config, run, server.url, caller.key)
    assert spent(server, caller) <= 686
    assert QueryLog.read(run / LOG_FILE).total == spent(server, caller)
    server.ledger.set_budget(caller.client.name, 10**6)
    finished(config, run, server, caller, whole)


def test_a_checkpoint_of_another_run_is_refused(server: Running, caller: Caller, tmp_path: Path, whole: Path) -> None:
    config, run = tiny(tmp_path, *DNCNN, "train.epochs=5"), tmp_path / "run"
    run.mkdir()
    (run / CHECKPOINT_FILE).write_bytes((whole / CHECKPOINT_FILE).read_bytes())
    with pytest.raises(CheckpointError, match="another run"):
        train_here(config, run, server.url, caller.key)


def test_certifying_in_between_leaves_training_alone(
    server: Running, caller: Caller, tmp_path: Path, whole: Path
) -> None:
    config, run = tiny(tmp_path, *SWITCH, "certify.images=1"), tmp_path / "run"
    with pytest.raises(Killed):
        train_here(config, run, server.url, caller.key, Interfering(after=at(16, Killed())))
    certify_here(config, run, server.url, caller.key)
    assert planned(config, run, server, caller) == last_checkpoint(whole).progress.queries + 110 - spent(server, caller)
    train_here(config, run, server.url, caller.key)
    assert same_tensors(run / STACK_FILE, whole / STACK_FILE)


# --- killed and started again, as processes ---------------------------------------------------------------------------


def requests(run: Path) -> int:
    path = run / LOG_FILE
    return path.read_bytes().count(b'"charged"') if path.exists() else 0


@pytest.fixture
def ledger(tmp_path: Path):  # type: ignore[no-untyped-def]
    with closing(Ledger.open(str(tmp_path / "ledger.db"))) as found:
        yield found


@pytest.mark.parametrize("settings", [(), (*RGE, *DNCNN)], ids=["cge", "rge"])
def test_a_run_and_a_server_that_are_killed_again_and_again(
    tmp_path: Path, ledger: Ledger, settings: tuple[str, ...]
) -> None:
    """SIGKILL to `train` at several moments, and to the server in between; the result is that of a quiet run."""
    keys = {name: ledger.add_client(name, 10**5)[1].reveal() for name in ("quiet", "killed")}
    options = [x for setting in settings for x in ("--set", setting)]
    preset = write_tiny(tmp_path)
    with ServerProcess(tmp_path / "ledger.db") as server, ExitStack() as stack:

        def start(name: str, again: int):  # type: ignore[no-untyped-def]
            arguments = ("train", preset, "--oracle", server.url, "--out", tmp_path / name, *options)
            output = tmp_path / f"{name}-{again}.log"
            return stack.enter_context(
                command("defender_client", *arguments, output=output, environment={"ORACLE_API_KEY": keys[name]})
            )

        quiet = start("quiet", 0)
        assert quiet.wait() == 0, quiet.said
        run = tmp_path / "killed"
        moments: list[Callable[[], bool]] = [
            (run / "pretrain-autoencoder.safetensors").exists,
            lambda: requests(run) >= 1,
            lambda: requests(run) >= 4,
            lambda: requests(run) >= 9,
        ]
        for again, moment in enumerate(moments):
            training = start("killed", again)
            wait_until(lambda moment=moment, training=training: moment() or not training.running)  # type: ignore[misc]
            training.signal(signal.SIGKILL)
            assert training.wait() == -signal.SIGKILL, training.said
        last = start("killed", 9)
        seen = requests(run)
        wait_until(lambda: requests(run) > seen or not last.running)
        server.kill()
        server.start()
        assert last.wait() == 0, last.said

        for name in (STACK_FILE, CHECKPOINT_FILE, LABELS_FILE, PRETRAINED_FILE):
            assert same_tensors(run / name, tmp_path / "quiet" / name), name
        assert last_checkpoint(run).progress == last_checkpoint(tmp_path / "quiet").progress
        assert ledger.get_client("killed").spent == ledger.get_client("quiet").spent > 0
        assert ledger.verify().intact
        for name, key in keys.items():
            with opened(tmp_path / name, server.url, key) as oracle:
                assert audit([tmp_path / name], oracle).differences == ()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_finishes_the_step_and_the_same_command_resumes(
    server: Running, caller: Caller, tmp_path: Path, whole: Path, number: signal.Signals
) -> None:
    run, preset = tmp_path / "run", write_tiny(tmp_path)
    options = [x for setting in SWITCH for x in ("--set", setting)]
    arguments = ("train", preset, "--oracle", server.url, "--out", run, *options)
    key = {"ORACLE_API_KEY": caller.key}
    with command("defender_client", *arguments, output=tmp_path / "one.log", environment=key) as training:
        wait_until((run / CHECKPOINT_FILE).exists)
        training.signal(number)
        assert training.wait() == 130, training.said
        assert "the same command resumes it" in training.said
        assert "Traceback" not in training.said
    # Nothing of what was paid is behind the checkpoint.
    assert last_checkpoint(run).progress.queries == spent(server, caller)
    assert QueryLog.read(run / LOG_FILE).unanswered == []
    with command("defender_client", *arguments, output=tmp_path / "two.log", environment=key) as training:
        assert training.wait() == 0, training.said
    assert caller.key not in (tmp_path / "one.log").read_text() + (tmp_path / "two.log").read_text()
    finished(tiny(tmp_path, *SWITCH), run, server, caller, whole)
