"""Attacks on a reconstructor: what is crafted, what is reported, and what it costs."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from defender_support import spent, spent_by_purpose, tiny
from oracle_support import Caller, Running
from reconstruction_support import MEASUREMENT
from torch import nn
from typer.testing import CliRunner

from defender_client import jobs
from defender_client import stack as stacks
from defender_client.attack import crafting_generator
from defender_client.attack_reconstruction import Row, craft, read, summary
from defender_client.cli import app
from defender_client.config import AttackConfig, ConfigError, DataConfig
from defender_client.data import load_test
from defender_client.image_metrics import rmse, ssim
from defender_client.measured import MeasuredSet, measure
from defender_client.sources import LiveOracle
from defender_client.stack import Stack
from defender_client.train import STACK_FILE
from defender_client.whitebox import WhiteBoxSource

UNDEFENDED = (
    "estimator.name=none",
    "denoiser.architecture=none",
    "denoiser.depth=0",
    "denoiser.width=0",
    "autoencoder.architecture=none",
)
SETTINGS = AttackConfig(epsilon=1.0, steps=15, copies=3, images=4, whitebox="test")


@pytest.fixture(scope="module")
def images() -> MeasuredSet:
    return measure(load_test(DataConfig(), None), MEASUREMENT)


@pytest.fixture(scope="module")
def trained_run(reconstructing: Running, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """To be copied, not changed."""
    folder = tmp_path_factory.mktemp("reconstruction")
    payer = reconstructing.caller(10**6)
    config = tiny(folder, "task=reconstruction", "train.epochs=1")
    source = LiveOracle(reconstructing.url, payer.key)
    jobs.train_job(config, folder / "run", None, source, lambda _: None)
    return folder / "run"


@pytest.fixture
def run(trained_run: Path, tmp_path: Path) -> Path:
    """A run of its own, whose client has not paid for anything yet."""
    target = tmp_path / "run"
    shutil.copytree(trained_run, target, ignore=shutil.ignore_patterns("queries.jsonl", "run-id", "ledger*"))
    return target


def attack(run: Path, server: Running, payer: Caller, weights: Path, **changes: object) -> list[Row]:
    settings = {"steps": 5, "copies": 3, "images": 4} | changes
    source = LiveOracle(server.url, payer.key)
    done = jobs.attack_job(run, None, source, settings, WhiteBoxSource(weights), lambda _: None)
    return read(done.path)


def smoothed(stack: Stack, reconstructor: nn.Module, image: torch.Tensor, seed: int) -> torch.Tensor:
    """The expected reconstruction, over many draws of our own."""
    generator = torch.Generator().manual_seed(seed)
    noisy = image + stack.spec.sigma * torch.randn(300, *image.shape, generator=generator)
    with torch.no_grad():
        return reconstructor(stack(noisy)).mean(0).view(1, 1, 8, 8)


@pytest.mark.parametrize("through", ["defended", "classifier"])
def test_what_is_crafted_is_near_and_is_reconstructed_worse(
    trained_run: Path, images: MeasuredSet, reconstructor: nn.Module, through: str
) -> None:
    stack = stacks.load(trained_run / STACK_FILE)
    settings = SETTINGS.model_copy(update={"through": through})
    worse = 0
    for index in range(4):
        part = slice(index, index + 1)
        shown, original = images.floats(part)[0], images.originals(part)
        moved = craft(stack, reconstructor, shown, original, settings, crafting_generator(settings, index))
        assert float((moved - shown).norm()) <= 1.0 + 1e-5
        assert 0.0 <= float(moved.min()) <= float(moved.max()) <= 1.0
        with torch.no_grad():
            if through == "defended":
                before, after = (smoothed(stack, reconstructor, image, index) for image in (shown, moved))
            else:
                before, after = (reconstructor(image[None]).view(1, 1, 8, 8) for image in (shown, moved))
        worse += float(rmse(after, original)) > float(rmse(before, original))
    assert worse == 4


def test_the_adaptive_attack_hurts_the_defence_more_than_the_transferred_one(
    trained_run: Path, images: MeasuredSet, reconstructor: nn.Module
) -> None:
    stack = stacks.load(trained_run / STACK_FILE)
    errors = {"defended": 0.0, "classifier": 0.0}
    for through in errors:
        settings = SETTINGS.model_copy(update={"through": through})
        for index in range(6):
            part = slice(index, index + 1)
            shown, original = images.floats(part)[0], images.originals(part)
            moved = craft(stack, reconstructor, shown, original, settings, crafting_generator(settings, index))
            errors[through] += float(rmse(smoothed(stack, reconstructor, moved, index), original))
    assert errors["defended"] > errors["classifier"]


def test_rows_are_of_the_oracle_s_answers_and_each_is_paid(
    run: Path, reconstructing: Running, payer: Caller, weights: Path, images: MeasuredSet, reconstructor: nn.Module
) -> None:
    rows = attack(run, reconstructing, payer, weights)
    assert [row.idx for row in rows] == [0, 1, 2, 3]
    assert all(row.queries == 2 * 3 for row in rows)
    assert spent_by_purpose(reconstructing, payer) == {"attack": 4 * 6}
    assert all(0 < row.norm <= 1 + 1e-5 for row in rows)
    # The same draws through the white box give the same figures.
    stack = stacks.load(run / STACK_FILE)
    from defender_client.attack import Victim

    class Local:
        def __init__(self, settings: AttackConfig) -> None:
            self.victim = Victim.__new__(Victim)
            vars(self.victim).update(_sigma=stack.spec.sigma, _settings=settings, _index=0, queries=0)

        def noisy(self, index: int, image: torch.Tensor) -> torch.Tensor:
            self.victim._index = index
            return self.victim.noisy(image)

    settings = AttackConfig.model_validate_json((run / "attack-pgd-defended-1.json").read_bytes())
    local = Local(settings)
    for row in rows:
        part = slice(row.idx, row.idx + 1)
        with torch.no_grad():
            made = reconstructor(stack(local.noisy(row.idx, images.floats(part)[0]))).mean(0).view(1, 1, 8, 8)
        assert row.rmse == pytest.approx(float(rmse(made, images.originals(part))), abs=1e-4)
        assert row.ssim == pytest.approx(float(ssim(made, images.originals(part))), abs=1e-3)
    found = summary(rows)
    assert found.attacked_rmse == pytest.approx(sum(row.attacked_rmse for row in rows) / 4)
    assert found.queries == 24


def test_it_goes_on_where_it_stopped_and_pays_nothing_twice(
    run: Path, reconstructing: Running, payer: Caller, weights: Path
) -> None:
    whole = attack(run, reconstructing, payer, weights)
    paid = spent(reconstructing, payer)
    path = run / "attack-pgd-defended-1.tsv"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:3]) + "2\t0.1")  # killed in the third row
    assert attack(run, reconstructing, payer, weights) == whole
    assert spent(reconstructing, payer) == paid
    assert attack(run, reconstructing, payer, weights, images=5)[:4] == whole
    assert spent(reconstructing, payer) == paid + 6


def test_the_undefended_reconstructor_is_attacked_as_it_is(
    reconstructing: Running, payer: Caller, weights: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    source = LiveOracle(reconstructing.url, payer.key)
    jobs.train_job(tiny(tmp_path, "task=reconstruction", *UNDEFENDED), run, None, source, lambda _: None)
    assert spent(reconstructing, payer) == 0
    rows = attack(run, reconstructing, payer, weights, copies=0, through="classifier", steps=20)
    assert all(row.queries == 2 for row in rows)
    found = summary(rows)
    assert found.attacked_rmse is not None
    assert found.rmse is not None
    assert found.attacked_rmse > found.rmse


def test_the_command(run: Path, reconstructing: Running, payer: Caller, weights: Path) -> None:
    arguments = ["attack", "--run", str(run), "--oracle", reconstructing.url, "--whitebox", str(weights)]
    arguments += ["--images", "2", "--steps", "3", "--copies", "2"]
    result = CliRunner().invoke(app, arguments, env={"ORACLE_API_KEY": payer.key})
    assert result.exit_code == 0, result.output
    assert "at most 8 queries" in result.stderr
    assert "under attack" in result.stdout
    assert "SSIM" in result.stdout
    again = CliRunner().invoke(app, [*arguments, "--json"], env={"ORACLE_API_KEY": payer.key})
    said = json.loads(again.stdout)
    assert (said["images"], said["queries"]) == (2, 8)
    assert said["attacked_rmse"] == pytest.approx(summary(read(run / "attack-pgd-defended-1.tsv")).attacked_rmse)
    assert spent(reconstructing, payer) == 8


def test_what_cannot_be_attacked(run: Path, reconstructing: Running, payer: Caller, tmp_path: Path) -> None:
    source = LiveOracle(reconstructing.url, payer.key)
    with pytest.raises(ConfigError, match="looks for another class"):
        jobs.attack_job(run, None, source, {"method": "square"}, None, lambda _: None)
    with pytest.raises(ConfigError, match="--whitebox"):
        jobs.attack_job(run, None, source, {}, None, lambda _: None)
    damaged = tmp_path / "rows.tsv"
    damaged.write_text("idx\tsomething\n1\t2\n")
    with pytest.raises(ConfigError, match="does not start with the header"):
        read(damaged)
    assert read(tmp_path / "none.tsv") == []
    assert summary([]).rmse is None
    assert spent(reconstructing, payer) == 0
