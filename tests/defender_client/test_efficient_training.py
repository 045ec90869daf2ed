"""Training with the estimators beyond the paper's, over HTTP: what they cost, that they learn, and that no kill and no
number of requests in flight changes anything."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from defender_support import Interfering, Killed, at, opened, same_tensors, spent, spent_by_purpose, tiny, train_here
from oracle_support import Caller, Running

from defender_client import checkpoints
from defender_client import stack as stacks
from defender_client.audit import audit
from defender_client.checkpoints import CHECKPOINT_FILE
from defender_client.config import ConfigError, RunConfig
from defender_client.data import load_splits
from defender_client.oracle_client import RemoteOracle
from defender_client.plan import plan
from defender_client.train import STACK_FILE

SMALL = ("surrogate.width=16", "surrogate.memory=64", "surrogate.steps=2", "surrogate.batch=32", "estimator.noise=off")
PRIOR = ("estimator.name=prior", "estimator.q=2", "estimator.active=true", *SMALL)
VARIANTS = {
    "active-cge": ("estimator.name=active-cge", "estimator.difference=central"),
    "orthonormal": ("estimator.name=orthonormal", "estimator.q=3", "estimator.active=true"),
    "answers": ("estimator.name=orthonormal", "estimator.q=3", "estimator.values=answers"),
    "gauss-newton": ("estimator.name=active-cge", "estimator.direction=gauss-newton"),
    "inner": ("estimator.name=active-cge", "train.inner_steps=3", "train.staleness=0.5"),
    "prior": PRIOR,
    "prior-of-components": (*PRIOR, "autoencoder.architecture=pca"),
    "prior-spread": (*PRIOR, "estimator.spread=guide"),
    "prior-micro-batches": (*PRIOR, "train.micro_batch=8", "train.query_rows=16"),
    "prior-by-loss": (*PRIOR, "train.sampling=loss"),
    "control-variate": ("estimator.name=control-variate", "estimator.q=2", *SMALL),
    "distil": ("estimator.name=distil", "estimator.q=0", *SMALL),
    "distil-jitter": ("estimator.name=distil", "estimator.q=1", *SMALL),
    "mse-draws": ("train.mse=1", "train.draws=2"),
}
every_variant = pytest.mark.parametrize("settings", VARIANTS.values(), ids=VARIANTS)


def planned(config: RunConfig, run: Path | None, server: Running, caller: Caller) -> int:
    splits = load_splits(config.data, None, config.seed)
    with RemoteOracle(server.url, caller.key) as oracle:
        spec = stacks.specify(config, oracle.info.image_shape, oracle.info.classes)
        return plan(config, spec, run, (len(splits.train), len(splits.validation), 0), oracle).to_train


def test_active_set_cge_makes_the_same_stack_for_fewer_queries(server: Running, tmp_path: Path) -> None:
    """Every parameter of the denoiser and the encoder, bit for bit: what is not probed is what the ReLU stops."""
    whole, active = server.caller(10**6), server.caller(10**6)
    train_here(tiny(tmp_path), tmp_path / "whole", server.url, whole.key)
    train_here(tiny(tmp_path, "estimator.name=active-cge"), tmp_path / "active", server.url, active.key)
    assert same_tensors(tmp_path / "whole" / STACK_FILE, tmp_path / "active" / STACK_FILE)
    assert spent_by_purpose(server, active)["train"] < 0.8 * spent_by_purpose(server, whole)["train"]


def test_a_run_shorter_than_an_epoch_buys_the_labels_of_its_images_alone(
    server: Running, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = ("train.steps=2", "train.batch=16")
    few, all_ = server.caller(10**6), server.caller(10**6)
    config = tiny(tmp_path, *settings)
    cost = planned(config, None, server, few)
    train_here(config, tmp_path / "few", server.url, few.key)
    assert spent(server, few) == cost
    with monkeypatch.context() as patched:
        patched.setattr("defender_client.train.needed", lambda count, _settings, _seed: torch.arange(count))
        train_here(config, tmp_path / "all", server.url, all_.key)
    assert same_tensors(tmp_path / "few" / STACK_FILE, tmp_path / "all" / STACK_FILE)
    labels = [spent_by_purpose(server, caller)["labels"] for caller in (few, all_)]
    assert labels[1] - labels[0] == config.data.train_images - 2 * 16


@every_variant
def test_a_run_spends_at_most_what_the_plan_says_and_the_accounts_agree(
    server: Running, caller: Caller, tmp_path: Path, settings: tuple[str, ...]
) -> None:
    config, run = tiny(tmp_path, *settings), tmp_path / "run"
    cost = planned(config, None, server, caller)
    train_here(config, run, server.url, caller.key)
    ragged = config.estimator.active or config.estimator.name == "active-cge"
    assert spent(server, caller) <= cost
    assert ragged or spent(server, caller) == cost
    with opened(run, server.url, caller.key) as oracle:
        assert audit([run], oracle).differences == ()


@every_variant
def test_kills_and_requests_in_flight_change_nothing(
    server: Running, caller: Caller, tmp_path: Path, settings: tuple[str, ...]
) -> None:
    quiet = server.caller(10**6)
    train_here(tiny(tmp_path, *settings), tmp_path / "quiet", server.url, quiet.key)
    run = tmp_path / "run"
    for number, in_flight in ((4, 1), (3, 3), (2, 2)):
        config = tiny(tmp_path, *settings, f"train.in_flight={in_flight}", "train.checkpoint_every=1")
        with pytest.raises(Killed):
            train_here(config, run, server.url, caller.key, Interfering(after=at(number, Killed())))
    train_here(tiny(tmp_path, *settings, "train.in_flight=3"), run, server.url, caller.key)
    for name in (STACK_FILE, CHECKPOINT_FILE):
        assert same_tensors(run / name, tmp_path / "quiet" / name), name
    assert spent(server, caller) == spent(server, quiet)


def test_a_checkpoint_keeps_the_surrogate_and_what_is_known_of_it(
    server: Running, caller: Caller, tmp_path: Path
) -> None:
    config, run = tiny(tmp_path, *PRIOR), tmp_path / "run"
    with pytest.raises(Killed):
        train_here(config, run, server.url, caller.key, Interfering(after=at(6, Killed())))
    saved = checkpoints.load(run / CHECKPOINT_FILE)
    assert saved is not None
    assert saved.beside_of("surrogate")
    assert saved.beside_of("alignment").keys() == {"product", "square", "guess"}


def test_inner_steps_ask_nothing_and_move_further(server: Running, tmp_path: Path) -> None:
    one, three = server.caller(10**6), server.caller(10**6)
    settings = ("estimator.name=cge", "train.epochs=1", "train.batch=96", "train.staleness=10")
    train_here(tiny(tmp_path, *settings), tmp_path / "one", server.url, one.key)
    train_here(tiny(tmp_path, *settings, "train.inner_steps=3"), tmp_path / "three", server.url, three.key)
    assert spent(server, one) == spent(server, three)
    start = stacks.load(tmp_path / "one" / "pretrained.safetensors")
    moved = []
    for name in ("one", "three"):
        stack = stacks.load(tmp_path / name / STACK_FILE)
        differences = [a - b for a, b in zip(stack.trainable(), start.trainable(), strict=True)]
        moved.append(float(torch.cat([d.detach().flatten() for d in differences]).norm()))
    assert moved[1] > 1.5 * moved[0]


def test_mse_pulls_the_denoiser_towards_the_clean_image(server: Running, tmp_path: Path) -> None:
    errors = []
    splits = load_splits(tiny(tmp_path).data, None, 0)
    clean = splits.validation.floats(slice(None))
    noisy = clean + 0.25 * torch.randn(clean.shape, generator=torch.Generator().manual_seed(0))
    for weight in (0, 10):
        caller, run = server.caller(10**6), tmp_path / f"mse-{weight}"
        settings = ("estimator.name=active-cge", "train.lr=0.01", "pretrain.denoiser_epochs=0", f"train.mse={weight}")
        stack = train_here(tiny(tmp_path, *settings), run, server.url, caller.key)
        with torch.no_grad():
            errors.append(float((stack.denoise(noisy) - clean).square().mean()))
    assert errors[1] < errors[0]


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        (("estimator.name=rge", "estimator.active=true"), "orthonormal"),
        (("estimator.name=cge", "estimator.scale=projection"), "scale"),
        (("estimator.name=orthonormal", "estimator.spread=guide"), "guide"),
        (("estimator.name=distil", "estimator.values=answers"), "distil"),
        (("estimator.name=rge", "estimator.direction=gauss-newton"), "gauss-newton"),
        (("estimator.name=rge", "train.inner_steps=2"), "inner_steps"),
        (("estimator.name=control-variate", "train.inner_steps=2"), "inner_steps"),
        (("estimator.name=control-variate", "estimator.direction=gauss-newton"), "gauss-newton"),
        (("estimator.name=active-cge", "autoencoder.architecture=none"), "encoder"),
        (("estimator.name=orthonormal", "estimator.q=0"), "q must"),
        (
            ("estimator.name=prior", "estimator.active=true", "autoencoder.architecture=none"),
            "encoder",
        ),
    ],
)
def test_settings_that_do_not_go_together_are_refused(
    tmp_path: Path, settings: tuple[str, ...], complaint: str
) -> None:
    with pytest.raises(ConfigError, match=complaint):
        tiny(tmp_path, *settings)
