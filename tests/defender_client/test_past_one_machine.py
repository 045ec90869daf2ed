"""Two ranks make what one process makes: the stack to float tolerance, the certificates, the ledger's total.

Whoever is lost, refused or interrupted stops the others, and the same command goes on at no second charge."""

from __future__ import annotations

import os
import shutil
import signal
from pathlib import Path

import pytest
import torch
from defender_support import (
    DNCNN,
    RGE,
    Trained,
    opened,
    spent,
    spent_by_purpose,
    tiny,
    train_here,
    wait_until,
    write_tiny,
)
from oracle_support import Caller, Running
from ranks_support import ended, ranks, torchrun
from test_certify import without_time
from test_train import last_checkpoint

from defender_client import config as configs
from defender_client.audit import audit
from defender_client.certify import CERTIFIED_FILE, read
from defender_client.query_log import QueryLog, log_file
from defender_client.row_parts import parts_of
from defender_client.train import STACK_FILE

SMALL = ("surrogate.width=16", "surrogate.memory=64", "surrogate.steps=2", "surrogate.batch=32")
# Steps so long that a difference of two answers does not magnify the rounding of its points.
COARSE = ("estimator.mu=0.5", "estimator.noise=off")
VARIANTS = {
    # Batch normalization over both ranks' samples, in micro-batches whose questions do not end where the shares do.
    "cge-batch-norm": (*DNCNN, "train.micro_batch=20", "train.steps=2"),
    # The second step is one sample: a rank has none.
    "rge": (*RGE, "data.train_images=20", "train.batch=19", "train.query_rows=16", "train.steps=2"),
    # As the preset zo-ae-ds: a surrogate that learns from both ranks' answers.
    "prior": ("estimator.name=prior", "estimator.q=2", "estimator.active=true", *SMALL, "train.mse=1", "train.steps=3"),
    "prior-by-loss": (
        *("estimator.name=prior", "estimator.q=2", "estimator.spread=guide", *SMALL),
        *("train.query_rows=40", "train.sampling=loss", "train.draws=2", "train.batch=16", "train.steps=4"),
    ),
}


def options(settings: tuple[str, ...]) -> list[str]:
    return [word for setting in settings for word in ("--set", setting)]


def apart(one: Path, other: Path) -> float:
    """|g - g'| / |g| of the gradients of two runs' steps, which Adam's moving averages keep."""
    a, b = last_checkpoint(one).optimizer["state"], last_checkpoint(other).optimizer["state"]
    assert a.keys() == b.keys()
    first, second = (torch.cat([state[i]["exp_avg"].flatten().double() for i in sorted(a)]) for state in (a, b))
    return float((first - second).norm() / first.norm())


def same_accounts(server: Running, run: Path, caller: Caller) -> None:
    """Logs of all ranks, ledger and statement agree."""
    with opened(run, server.url, caller.key) as oracle:
        assert audit([run], oracle).differences == ()


@pytest.mark.timeout(600)
@pytest.mark.parametrize("settings", VARIANTS.values(), ids=VARIANTS.keys())
def test_two_ranks_make_the_steps_of_one_process(server: Running, tmp_path: Path, settings: tuple[str, ...]) -> None:
    settings = (*settings, *COARSE)
    alone, shared = server.caller(10**6), server.caller(10**6)
    one, two = tmp_path / "one", tmp_path / "two"
    train_here(tiny(tmp_path, *settings), one, server.url, alone.key)
    train = ("train", write_tiny(tmp_path), "--oracle", server.url, "--out", two, *options(settings))
    with ranks(2, *train, folder=tmp_path / "said", key=shared.key) as started:
        said = ended(started)
    assert said.count("stack in") == 1  # rank 0 speaks for both
    assert apart(one, two) < 1e-4
    assert spent_by_purpose(server, shared) == spent_by_purpose(server, alone)
    (a, b) = (last_checkpoint(run) for run in (one, two))
    assert a.progress.queries == b.progress.queries == spent(server, shared)
    assert all(torch.equal(a.generators[name], b.generators[name]) for name in a.generators)
    logged = [QueryLog.read(two / log_file(rank)).charged["train"] for rank in (0, 1)]
    assert min(logged) > 0.3 * sum(logged)  # both ask
    same_accounts(server, two, shared)
    if "prior" in settings[0]:
        x, y = a.beside_of("surrogate"), b.beside_of("surrogate")
        for name in ("memory.points", "memory.answers", "memory.differences", "scales"):
            assert torch.allclose(x[name], y[name], rtol=1e-3, atol=1e-3), name


@pytest.fixture
def run(trained: Trained, tmp_path: Path) -> Path:
    """A trained run that is not certified yet."""
    folder = tmp_path / "run"
    folder.mkdir()
    for name in (configs.CONFIG_FILE, STACK_FILE):
        shutil.copy(trained.run / name, folder / name)
    return folder


@pytest.mark.timeout(600)
def test_two_ranks_certify_as_one_process_and_go_on_from_each_others_rows(
    server: Running, trained: Trained, run: Path, tmp_path: Path
) -> None:
    """Rank 1's budget ends first; what was certified is kept, by whoever comes next, and paid once."""
    caller = server.caller(4 * 110 + 60)
    # Image 0 is certified by a rank that was killed, image 2 too; one row is torn.
    lines = (trained.run / CERTIFIED_FILE).read_text().splitlines(keepends=True)
    (run / "certified-rank1.tsv").write_text(lines[0] + lines[3] + lines[2][:7])
    certify = ("certify", "--run", run, "--oracle", server.url, "--images", "3")
    with ranks(2, *certify, folder=tmp_path / "said", key=caller.key) as started:
        assert "3 images" in ended(started)
    assert spent(server, caller) == 2 * 110
    assert without_time(run / CERTIFIED_FILE) == without_time(trained.run / CERTIFIED_FILE)[:4]
    assert parts_of(run / CERTIFIED_FILE) == []

    # Images 3 and 4 are paid for, 5 is not.
    further = (*certify[:-1], "6")
    with ranks(2, *further, folder=tmp_path / "further", key=caller.key) as started:
        said = ended(started, 3, 5)
    assert said.count("budget: ") == 1  # the plan is rank 0's to check
    assert "rank 1: rank 0 stopped the run: PlanUnaffordable" in said


def asked(run: Path, rank: int) -> int:
    """Training requests of a rank that were answered."""
    path = run / log_file(rank)
    known = QueryLog.read(path).requests.values() if path.exists() else ()
    return sum(request.purpose == "train" and request.charged is not None for request in known)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_rank_that_is_lost_interrupted_or_refused_stops_all_and_the_run_resumes(
    server: Running, tmp_path: Path
) -> None:
    settings = (*COARSE, "train.epochs=3", "train.query_rows=32", "train.checkpoint_every=2")
    alone, caller = server.caller(10**6), server.caller(10**6)
    train_here(tiny(tmp_path, *settings), tmp_path / "one", server.url, alone.key)
    run = tmp_path / "run"
    train = ("train", write_tiny(tmp_path), "--oracle", server.url, "--out", run, *options(settings))

    with torchrun(2, *train, output=tmp_path / "killed.log", key=caller.key) as under_way:
        wait_until(lambda: asked(run, 1) >= 3 or under_way.process.poll() is not None)
        workers = under_way.workers()
        os.kill(workers[1], signal.SIGKILL)
        assert under_way.process.wait(60) != 0
        assert under_way.workers() == []
    assert "rank 0: a rank is gone without a word" in under_way.said
    assert "Signal 9 (SIGKILL) received by PID" in under_way.said  # as torchrun says it

    with ranks(2, *train, folder=tmp_path / "interrupted", key=caller.key) as started:
        seen = asked(run, 1)
        wait_until(lambda: asked(run, 1) > seen or not started[0].running)
        for one in started:
            one.signal(signal.SIGTERM)
        said = ended(started, 130, 130)
    assert said.count("stopped; the same command resumes it") == 2
    assert last_checkpoint(run).progress.queries == spent(server, caller)  # nothing paid is behind the checkpoint

    with ranks(2, *train, folder=tmp_path / "refused", key=caller.key) as started:
        seen = asked(run, 1)
        wait_until(lambda: asked(run, 1) > seen or not started[0].running)
        server.ledger.set_budget(caller.client.name, spent(server, caller))
        codes = sorted(one.wait() for one in started)
        said = "".join(one.said for one in started)
    assert codes in ([3, 3], [3, 5]), said
    assert "budget: " in said
    assert "Traceback" not in said
    server.ledger.set_budget(caller.client.name, 10**6)

    with ranks(2, *train, folder=tmp_path / "resumed", key=caller.key) as started:
        ended(started)
    assert apart(tmp_path / "one", run) < 1e-3
    assert spent(server, caller) == spent(server, alone) == last_checkpoint(run).progress.queries
    # As a user types it: torchrun takes options for its own, even behind the module's name, unless `--` says otherwise.
    certify = ("certify", "--run", run, "--oracle", server.url, "--images", "4")
    with torchrun(2, *certify, output=tmp_path / "certified.log", key=caller.key) as under_way:
        assert under_way.process.wait(120) == 0, under_way.said
    assert "4 images" in under_way.said
    assert len(read(run / CERTIFIED_FILE)) == 4
    same_accounts(server, run, caller)
    # One process has all accounts of it too.
    train_here(tiny(tmp_path, *settings), run, server.url, caller.key)
    with opened(run, server.url, caller.key):
        assert QueryLog.of_run(run).total == spent(server, caller)
