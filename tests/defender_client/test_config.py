"""Configurations: shipped presets, changes by `--set`, what is refused, and what is kept beside a run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from defender_support import tiny, write_tiny

from defender_client import config as configs
from defender_client.config import ConfigError, RunConfig, load_preset
from defender_client.stack import specify

PUBLIC = {"zo-ds-rge-q20", "zo-ds-rge-q192", "zo-ae-ds-rge-q20", "zo-ae-ds-rge-q192", "zo-ae-ds-cge", "demo"}


@pytest.mark.parametrize("name", configs.preset_names())
def test_every_shipped_preset_loads_and_describes_a_stack(name: str) -> None:
    config = load_preset(name)
    assert config.preset == name
    assert config.description
    shapes = {"digits": (1, 8, 8), "mnist": (1, 28, 28)}
    specify(config, shapes.get(config.data.dataset, (3, 32, 32)), 10)
    words = name.split("-")
    assert (config.task == "reconstruction") == ("recon" in words)
    if config.estimator.name != "none" and name != "demo":
        assert config.estimator.name in words or (config.estimator.zeroth_order and "zo" in words)
        assert (config.autoencoder.architecture != "none") == ("ae" in words or name == "distil-only")
    if "rge" in words:
        assert f"q{config.estimator.q}" in words


def test_the_paper_s_presets_are_there() -> None:
    assert set(configs.preset_names()) >= PUBLIC
    assert load_preset("zo-ae-ds-cge").autoencoder.latent == 192


def test_settings_change_single_values(tmp_path: Path) -> None:
    config = tiny(tmp_path, "seed=7", "sigma=0.5", "data.augment=flip", "train.lr=1e-2", 'estimator.name="rge"')
    assert (config.seed, config.sigma, config.data.augment, config.train.lr) == (7, 0.5, "flip", 0.01)
    assert config.estimator.name == "rge"
    assert config.data.train_images == 96
    assert tiny(tmp_path, "seed=1", "seed=2").seed == 2
    assert tiny(tmp_path, "description=a=b").description == "a=b"
    assert config.preset == "tiny"


@pytest.mark.parametrize(
    ("setting", "named"),
    [
        ("train.epoch=3", "train.epoch"),
        ("nonsense=1", "nonsense"),
        ("nonsense.deep=1", "nonsense"),
        ("train.epochs=0", "train.epochs"),
        ("train.epochs=many", "train.epochs"),
        ("sigma=-1", "sigma"),
        ("sigma=NaN", "sigma"),
        ("sigma=Infinity", "sigma"),
        ("estimator.mu=Infinity", "estimator.mu"),
        ("estimator.name=hope", "estimator.name"),
        ("data.dataset=imagenet", "imagenet"),
        ("certify.alpha=0.5", "certify.alpha"),
        ("denoiser.architecture=none", "denoiser"),
        ("denoiser.depth=-1", "denoiser.depth"),
        ("data=5", "data"),
        ("seed.x=1", "seed"),
        ("description.x=1", "description"),
        ("seed", "section.key=value"),
        ("=5", "section.key=value"),
        ("", "section.key=value"),
    ],
)
def test_what_cannot_be_set_is_named(tmp_path: Path, setting: str, named: str) -> None:
    with pytest.raises(ConfigError) as told:
        tiny(tmp_path, setting)
    assert named in str(told.value)
    assert "\n" not in str(told.value)


def test_a_search_without_a_denoiser_has_nothing_to_train() -> None:
    with pytest.raises(ConfigError, match="nothing to train"):
        load_preset("standard", ["estimator.name=cge"])


def test_presets_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"choose one of .*zo-ae-ds-cge"):
        load_preset("zo-ae-ds-sge")
    with pytest.raises(ConfigError, match="no such preset file"):
        load_preset(str(tmp_path / "none.toml"))
    path = tmp_path / "bad.toml"
    for content in (b"[train", b"\xff\xfe", b"train = 1\n[train]\nepochs = 1"):
        path.write_bytes(content)
        with pytest.raises(ConfigError, match=r"bad.toml is not valid TOML"):
            load_preset(str(path))


def test_a_run_keeps_its_configuration(tmp_path: Path) -> None:
    config, run = tiny(tmp_path), tmp_path / "run"
    configs.save(config, run)
    assert configs.load(run) == config
    before = (run / configs.CONFIG_FILE).read_bytes()
    configs.save(config, run)
    assert (run / configs.CONFIG_FILE).read_bytes() == before
    assert [path.name for path in run.iterdir()] == [configs.CONFIG_FILE]


def test_another_configuration_in_the_same_run_is_refused_with_the_difference(tmp_path: Path) -> None:
    run = tmp_path / "run"
    configs.save(tiny(tmp_path), run)
    with pytest.raises(ConfigError) as told:
        configs.save(tiny(tmp_path, "train.epochs=3", "sigma=0.5"), run)
    assert "sigma: 0.25 -> 0.5; train.epochs: 2 -> 3" in str(told.value)
    assert "choose another --out" in str(told.value)
    assert configs.load(run) == tiny(tmp_path)


def test_what_is_no_run_is_told(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="not a run directory"):
        configs.load(tmp_path)
    for content in ("{", "[]", '{"preset": "x", "nonsense": 1}', "null"):
        (tmp_path / configs.CONFIG_FILE).write_text(content)
        with pytest.raises(ConfigError):
            configs.load(tmp_path)
    (tmp_path / configs.CONFIG_FILE).write_bytes(b"\xff")
    with pytest.raises(ConfigError):
        configs.load(tmp_path)


def test_a_certification_keeps_its_settings(tmp_path: Path) -> None:
    config = tiny(tmp_path)
    started = configs.certify_settings(config, tmp_path, {"n": 50})
    assert (started.n0, started.n, started.images) == (10, 50, 4)
    configs.save_certify_settings(started, tmp_path)
    # Without changes it goes on as it was started; how many images is free to change.
    assert configs.certify_settings(config, tmp_path, {}) == started
    assert configs.certify_settings(config, tmp_path, {"images": 9, "n": 50}).images == 9
    for changes, named in (({"n": 100}, "n: 50 -> 100"), ({"alpha": 0.01}, "alpha"), ({"n0": 1}, "n0: 10 -> 1")):
        with pytest.raises(ConfigError, match=named):
            configs.certify_settings(config, tmp_path, changes)
    for changes in ({"n": 0}, {"alpha": 0.7}, {"images": -1}):
        with pytest.raises(ConfigError, match=rf"certification: {next(iter(changes))}"):
            configs.certify_settings(config, tmp_path, changes)


def test_a_configuration_is_frozen_and_whole_in_its_file(tmp_path: Path) -> None:
    config = tiny(tmp_path)
    with pytest.raises(ValueError, match="frozen"):
        config.train.epochs = 5  # type: ignore[misc]
    configs.save(config, tmp_path)
    saved = json.loads((tmp_path / configs.CONFIG_FILE).read_text())
    # Also what the preset left out: a default that changes later does not change a run.
    assert saved["train"]["weight_decay"] == 1e-5
    assert RunConfig.model_validate(saved) == config
    assert write_tiny(tmp_path).stem == saved["preset"]
