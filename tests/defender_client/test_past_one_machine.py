"""Two ranks make what one process makes: the stack to float tolerance, the certificates, the ledger's total; and whoever
is lost stops the others, and costs nothing."""

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
from defender_client.certify import CERTIFIED_FILE
from defender_client.query_log import QueryLog, log_file, log_files
from defender_client.row_parts import parts_of
from defender_client.train import CURVE_FILE, STACK_FILE

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
    distance = apart(one, two)
    print("apart", distance)
    assert distance < 1e-4
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
