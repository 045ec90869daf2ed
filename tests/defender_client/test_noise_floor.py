"""The noise floor of live oracles: its cost, the step that follows, who is refused, and that no kill changes it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from defender_support import (
    PIXELS,
    RGE,
    Interfering,
    Killed,
    Trained,
    at,
    opened,
    same_tensors,
    spent,
    spent_by_purpose,
    tiny,
    train_here,
)
from oracle_support import Caller, Running, running
from torch import Tensor, nn
from typer.testing import CliRunner

from defender_client import noise_floor
from defender_client import stack as stacks
from defender_client.audit import audit
from defender_client.cli import app
from defender_client.config import CONFIG_FILE, ConfigError, EstimatorConfig, RunConfig
from defender_client.data import load_splits
from defender_client.noise import LineNoise, Outcome, Slopes, best_step, difference_error
from defender_client.noise_floor import NOISE_FILE, Finding, FiniteDifferencesUseless, choose, queries, read
from defender_client.oracle_client import RemoteOracle
from defender_client.plan import plan
from defender_client.pretrain import PRETRAINED_FILE, pretrain
from defender_client.train import CHECKPOINT_FILE, STACK_FILE
from oracle_server.oracle import Oracle
from oracle_server.settings import Settings

# An autoencoder that has learnt something, so that moving a latent moves the answers.
LEARNT = ("pretrain.autoencoder_epochs=10", "pretrain.denoiser_epochs=2", "pretrain.lr=0.01", "train.epochs=1")


@pytest.fixture(scope="module")
def learnt(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The pre-trained stack of those settings."""
    folder = tmp_path_factory.mktemp("learnt")
    config = tiny(folder, *LEARNT)
    pretrain(config, stacks.specify(config, (1, 8, 8), 10), folder, load_splits(config.data, None, config.seed))
    return folder / PRETRAINED_FILE


@pytest.fixture
def run(tmp_path: Path, learnt: Path) -> Path:
    """A run that is pre-trained."""
    return _begun(tmp_path / "run", learnt)


def _begun(run: Path, learnt: Path) -> Path:
    run.mkdir()
    shutil.copy(learnt, run / PRETRAINED_FILE)
    return run


def rounded(decimals: int) -> Callable[[Tensor], Tensor]:
    return lambda logits: logits.round(decimals=decimals)


def noisy(sigma: float) -> Callable[[Tensor], Tensor]:
    generator = torch.Generator().manual_seed(0)
    return lambda logits: logits + sigma * torch.randn(logits.shape, generator=generator)


def label_only(logits: Tensor) -> Tensor:
    return nn.functional.one_hot(logits.argmax(1), logits.shape[1]).float()


@contextmanager
def answering(change: Callable[[Tensor], Tensor], classifier: nn.Module, folder: Path) -> Iterator[Running]:
    """A live oracle whose logits are changed before they are given."""

    @torch.no_grad()
    def engine(images: Tensor) -> Tensor:
        return change(classifier(images))

    with running(Settings(ledger=str(folder / "ledger.db")), oracle=Oracle(engine, (1, 8, 8), 10)) as server:
        yield server


def finding_of(run: Path) -> Finding:
    found = read(run).finding
    assert found is not None
    return found


def planned(config: RunConfig, run: Path | None, server: Running, caller: Caller) -> int:
    splits = load_splits(config.data, None, config.seed)
    with RemoteOracle(server.url, caller.key) as oracle:
        spec = stacks.specify(config, (1, 8, 8), 10)
        return plan(config, spec, run, (len(splits.train), len(splits.validation), 0), oracle).noise


# --- what is chosen ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [(), RGE, ("estimator.difference=central",), PIXELS], ids=str)
def test_on_a_clean_oracle_mu_stays_as_it_is(
    server: Running,
    caller: Caller,
    run: Path,
    tmp_path: Path,
    settings: tuple[str, ...],
    capsys: pytest.CaptureFixture[str],
) -> None:
    if settings == PIXELS:
        (run / PRETRAINED_FILE).unlink()  # another stack
    train_here(tiny(tmp_path, *LEARNT, *settings), run, server.url, caller.key)
    found = finding_of(run)
    assert (found.mu, found.useless) == (0.005, False)
    assert found.noise is not None
    assert found.noise < 1e-4
    assert "noise floor: " in capsys.readouterr().err
    assert spent_by_purpose(server, caller)["noise"] == read(run).queries <= 200


@pytest.mark.parametrize(
    ("change", "sigma"),
    [(rounded(2), 10**-2 / 12**0.5), (noisy(0.01), 0.01)],
    ids=["2 decimals", "noise 0.01"],
)
@pytest.mark.parametrize("settings", [(), (*RGE, "estimator.difference=central")], ids=["cge", "rge-central"])
def test_on_a_noisy_oracle_mu_is_raised_to_where_differences_are_good(
    classifier: nn.Module,
    run: Path,
    tmp_path: Path,
    change: Callable[[Tensor], Tensor],
    sigma: float,
    settings: tuple[str, ...],
    capsys: pytest.CaptureFixture[str],
) -> None:
    config = tiny(tmp_path, *LEARNT, *settings)
    with answering(change, classifier, tmp_path) as server:
        caller = server.caller(10**6)
        train_here(config, run, server.url, caller.key)
    found = finding_of(run)
    # The loss is about the difference of two logits, each with that noise.
    assert found.noise is not None
    assert sigma / 4 < found.noise / 2**0.5 < 4 * sigma
    assert found.mu > 4 * 0.005
    assert f"mu raised from 0.005 to {found.mu:.3g}" in capsys.readouterr().err
    # Against differences of the exact classifier: at mu much nearer to the slope than at the configured step.
    assert _error(change, classifier, run, config, found.mu) < 0.5
    assert _error(change, classifier, run, config, found.mu) < 0.4 * _error(change, classifier, run, config, 0.005)


@torch.no_grad()
def _error(change: Callable[[Tensor], Tensor], classifier: nn.Module, run: Path, config: RunConfig, mu: float) -> float:
    """Relative error of the noisy oracle's central differences at `mu` against the exact one's at a tiny step."""
    stack = stacks.load(run / PRETRAINED_FILE)
    points = stack.front(load_splits(config.data, None, 0).train.floats(slice(0, 96)))
    directions = torch.nn.functional.normalize(
        torch.randn(points.shape, generator=torch.Generator().manual_seed(1)), dim=1
    )

    def margins(answers: Callable[[Tensor], Tensor], at: Tensor) -> Tensor:
        top = classifier(stack.back(points)).topk(2).indices
        found = answers(classifier(stack.back(at))).double().gather(1, top)
        return found[:, 0] - found[:, 1]

    def slope(answers: Callable[[Tensor], Tensor], h: float) -> Tensor:
        return (margins(answers, points + h * directions) - margins(answers, points - h * directions)) / (2 * h)

    exact = slope(lambda logits: logits, 0.01)
    return float((slope(change, mu) - exact).norm() / exact.norm())


def test_a_step_that_is_large_enough_already_is_not_lowered(classifier: nn.Module, run: Path, tmp_path: Path) -> None:
    with answering(rounded(3), classifier, tmp_path) as server:
        train_here(tiny(tmp_path, *LEARNT, "estimator.mu=0.7"), run, server.url, server.caller(10**6).key)
    assert finding_of(run).mu == 0.7


@pytest.mark.parametrize(
    ("change", "says"),
    [(label_only, "answers hardly change"), (noisy(20.0), "uncertain by"), (rounded(-1), "finite differences cannot")],
    ids=["label only", "noise 20", "rounded to tens"],
)
def test_what_cannot_work_is_refused_before_anything_else_is_bought(
    classifier: nn.Module, run: Path, learnt: Path, tmp_path: Path, change: Callable[[Tensor], Tensor], says: str
) -> None:
    config = tiny(tmp_path, *LEARNT)
    preset = str(tmp_path / "tiny.toml")
    options = [x for setting in LEARNT for x in ("--set", setting)]
    with answering(change, classifier, tmp_path) as server:
        caller = server.caller(10**6)
        with pytest.raises(FiniteDifferencesUseless, match=says):
            train_here(config, run, server.url, caller.key)
        paid = spent(server, caller)
        assert spent_by_purpose(server, caller) == {"noise": paid}
        assert paid <= queries(config.estimator, 96)
        # Asked again, the command says the same, for free; and what it advises works.
        to = ["--oracle", server.url, "--out"]
        again = CliRunner().invoke(app, ["train", preset, *to, str(run), *options], env={"ORACLE_API_KEY": caller.key})
        assert again.exit_code == 2
        assert says in again.stderr
        assert "--set estimator.noise=off" in again.stderr
        assert spent(server, caller) == paid
        other = _begun(tmp_path / "other", learnt)
        off = ["train", preset, *to, str(other), *options, "--set", "estimator.noise=off"]
        assert CliRunner().invoke(app, off, env={"ORACLE_API_KEY": caller.key}).exit_code == 0
    assert (other / STACK_FILE).exists()
    assert not (other / NOISE_FILE).exists()


# --- the choice in closed form ----------------------------------------------------------------------------------------


def lines(*levels: float | None, outcome: Outcome = Outcome.TOO_CLOSE) -> list[LineNoise]:
    return [LineNoise(level, 0.1, outcome if level is None else Outcome.FOUND) for level in levels]


def test_the_step_follows_from_noise_slope_and_curvature() -> None:
    forward = EstimatorConfig()
    slopes = Slopes(first=0.5, higher=0.2, accepted=1.0)
    # By noise: sqrt(2) 1e-4 / 0.005 / 0.5 = 5.7 %.
    kept = choose(forward, lines(1e-4, 1e-4, 1e-4), 5.0, slopes)
    assert (kept.mu, kept.useless) == (0.005, False)
    assert kept.relative_error == pytest.approx(difference_error("forward", 0.005, 1e-4, 0.2) / 0.5)
    raised = choose(forward, lines(1e-3, None, 1e-3), 5.0, slopes)
    assert raised.mu == pytest.approx(best_step("forward", 1e-3, 0.2))
    assert choose(forward, lines(1e-3, 1e-3), 0.05, slopes).mu == 0.05  # no further than its reach
    wide = EstimatorConfig(mu=0.3)
    assert choose(wide, lines(0.02, 0.02), 5.0, Slopes(0.5, 1.0, 1.0)).mu == 0.3
    central = choose(EstimatorConfig(difference="central"), lines(1e-2), 5.0, slopes)
    assert central.mu == pytest.approx((3 * 1e-2 / 0.2) ** (1 / 3))


def test_useless_is_an_error_greater_than_the_slope() -> None:
    # At the best step E = sqrt(sqrt(2) |f''| eps_f).
    error = (2**0.5 * 0.2 * 0.01) ** 0.5
    for slope, useless in ((1.01 * error, False), (0.99 * error, True), (0.0, True)):
        assert choose(EstimatorConfig(), lines(0.01), 9.0, Slopes(slope, 0.2, 1.0)).useless is useless


def test_without_a_level_the_answers_stand_still_or_nothing_is_known() -> None:
    assert choose(EstimatorConfig(), lines(None, None, 0.1), 1.0, None).useless
    unknown = choose(EstimatorConfig(), lines(None, None, 0.1, outcome=Outcome.TOO_FAR), 1.0, None)
    assert (unknown.useless, unknown.mu, unknown.noise) == (False, 0.005, None)


# --- kept, resumed, and not measured in the middle of a run -----------------------------------------------------------


def test_killed_at_any_of_its_requests_it_pays_nothing_twice(classifier: nn.Module, run: Path, tmp_path: Path) -> None:
    """Of an oracle that answers the same question differently each time: only what is on disk can be relied upon."""
    config = tiny(tmp_path, *LEARNT)
    with answering(noisy(0.01), classifier, tmp_path) as server:
        caller = server.caller(10**6)
        cost = planned(config, None, server, caller)
        for number in range(12):
            die = at(1 + number % 2, Killed())
            with pytest.raises(Killed):
                train_here(
                    config,
                    run,
                    server.url,
                    caller.key,
                    Interfering(before=die) if number % 2 else Interfering(after=die),
                )
            paid = spent_by_purpose(server, caller).get("noise", 0)
            assert paid + planned(config, run, server, caller) == cost
        mu = finding_of(run).mu
        train_here(config, run, server.url, caller.key)
        assert spent_by_purpose(server, caller)["noise"] == cost == read(run).queries == 186
        assert finding_of(run).mu == mu
        with opened(run, server.url, caller.key) as oracle:
            audited = audit([run], oracle)
            assert audited.differences == ()
            assert audited.purposes["noise"] == cost


def test_the_measured_step_is_the_one_trained_with(
    server: Running, caller: Caller, tmp_path: Path, learnt: Path
) -> None:
    """A run whose noise.json says 0.05 is a run configured with 0.05."""
    config = tiny(tmp_path, *LEARNT)
    train_here(config, _begun(tmp_path / "first", learnt), server.url, caller.key)
    found = read(tmp_path / "first")
    for name, changes, written in (
        ("kept", (), True),
        ("configured", ("estimator.mu=0.05", "estimator.noise=off"), False),
    ):
        run = _begun(tmp_path / name, learnt)
        if written:
            moved = found.model_copy(update={"finding": finding_of(tmp_path / "first").model_copy(update={"mu": 0.05})})
            (run / NOISE_FILE).write_text(moved.model_dump_json())
        train_here(tiny(tmp_path, *LEARNT, *changes), run, server.url, caller.key)
    assert same_tensors(tmp_path / "kept" / STACK_FILE, tmp_path / "configured" / STACK_FILE)
    assert not same_tensors(tmp_path / "kept" / STACK_FILE, tmp_path / "first" / STACK_FILE)


def test_a_run_that_began_before_there_was_a_measurement_goes_on_as_it_was(
    server: Running, caller: Caller, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config, run, whole = tiny(tmp_path), tmp_path / "run", tmp_path / "whole"
    train_here(tiny(tmp_path, "estimator.noise=off"), whole, server.url, caller.key)
    with pytest.raises(Killed):
        train_here(config, run, server.url, caller.key, Interfering(after=at(20, Killed())))
    assert (run / CHECKPOINT_FILE).exists()
    (run / NOISE_FILE).unlink()
    old = json.loads((run / CONFIG_FILE).read_text())
    del old["estimator"]["noise"]
    (run / CONFIG_FILE).write_text(json.dumps(old))
    before = spent_by_purpose(server, caller)["noise"]
    assert planned(config, run, server, caller) == 0
    train_here(config, run, server.url, caller.key)
    assert "not measured when this run began, so mu stays at 0.005" in capsys.readouterr().err
    assert spent_by_purpose(server, caller)["noise"] == before
    assert not (run / NOISE_FILE).exists()
    assert same_tensors(run / STACK_FILE, whole / STACK_FILE)


def test_a_damaged_file_is_told(trained: Trained, tmp_path: Path) -> None:
    text = (trained.run / NOISE_FILE).read_text()
    (tmp_path / NOISE_FILE).write_text(text[: len(text) // 2])
    with pytest.raises(ConfigError, match=r"noise\.json is damaged"):
        read(tmp_path)
    assert read(tmp_path / "nowhere") == noise_floor.NoiseFloor()


def test_few_images_and_no_training_cost_less() -> None:
    assert queries(EstimatorConfig(), 1) == 62
    assert queries(EstimatorConfig(difference="central"), 1000) == 180
    assert queries(EstimatorConfig(noise="off"), 1000) == queries(EstimatorConfig(name="none"), 1000) == 0


def test_losses_on_disk_are_those_of_the_answers(trained: Trained) -> None:
    kept = read(trained.run)
    assert [len(losses) for losses in kept.losses] == [21] * 4 + [51] * 2
    assert len(kept.labels) == 3
    # Against the second largest logit at the middle of the first lines, a loss is log 2 at least.
    assert (np.array(kept.losses[0]).reshape(3, 7)[:, 3] >= np.log(2)).all()
