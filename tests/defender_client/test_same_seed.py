"""Two runs of one seed agree to the last bit, and those of two seeds do in nothing that is random.

The same for the latent, where the two runs even differ in how much is in flight: `test_in_flight`."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from defender_support import PIXELS, Trained, certify_here, same_tensors, tiny, train_here
from oracle_support import Caller, Running
from test_certify import without_time
from test_train import last_checkpoint

from defender_client.certify import CERTIFIED_FILE, read
from defender_client.checkpoints import CHECKPOINT_FILE
from defender_client.config import RunConfig, load_preset
from defender_client.labels import LABELS_FILE
from defender_client.pretrain import PRETRAINED_FILE
from defender_client.train import CURVE_FILE, STACK_FILE

WEIGHTS = (STACK_FILE, CHECKPOINT_FILE, LABELS_FILE, PRETRAINED_FILE)
SETTINGS = {
    "rge-pixels": (*PIXELS, "data.augment=crop-flip", "data.train_images=64"),
    # Few images: each of them is asked about 65 times.
    "cge-pixels": (*PIXELS, "estimator.name=cge", "data.train_images=16", "train.batch=8"),
}


def from_scratch(config: RunConfig, run: Path, server: Running, caller: Caller) -> None:
    train_here(config, run, server.url, caller.key)
    certify_here(config, run, server.url, caller.key)


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS.keys())
def test_two_runs_of_one_seed_agree_to_the_last_bit(server: Running, tmp_path: Path, settings: tuple[str, ...]) -> None:
    one, other = tmp_path / "one", tmp_path / "other"
    for run in (one, other):
        torch.randn(3)  # what the process has drawn before is of no influence
        from_scratch(tiny(tmp_path, *settings, "seed=3"), run, server, server.caller(10**6))
    for name in WEIGHTS:
        assert same_tensors(one / name, other / name), name
    assert (one / CURVE_FILE).read_bytes() == (other / CURVE_FILE).read_bytes()
    assert without_time(one / CERTIFIED_FILE) == without_time(other / CERTIFIED_FILE)
    assert len({row.radius for row in read(one / CERTIFIED_FILE)}) > 2  # which is no matter of course


def test_another_seed_is_another_run(server: Running, caller: Caller, trained: Trained, tmp_path: Path) -> None:
    run, config = tmp_path / "run", tiny(tmp_path, "seed=1")
    from_scratch(config, run, server, caller)
    for name in WEIGHTS:
        assert not same_tensors(run / name, trained.run / name), name
    assert (run / CURVE_FILE).read_bytes() != (trained.run / CURVE_FILE).read_bytes()
    ours, theirs = (last_checkpoint(folder).generators for folder in (run, trained.run))
    assert {name: torch.equal(ours[name], theirs[name]) for name in theirs} == {"noise": False, "probes": False}


def test_another_seed_is_other_noise_around_the_same_images(server: Running, caller: Caller, tmp_path: Path) -> None:
    for seed in (0, 1):
        undefended = load_preset("standard", [f"seed={seed}", "certify.n0=10", "certify.n=100", "certify.images=4"])
        from_scratch(undefended, tmp_path / str(seed), server, caller)
    assert same_tensors(tmp_path / "0" / STACK_FILE, tmp_path / "1" / STACK_FILE)
    one, other = (read(tmp_path / seed / CERTIFIED_FILE) for seed in ("0", "1"))
    assert [row.label for row in one] == [row.label for row in other]
    assert [row.radius for row in one] != [row.radius for row in other]
