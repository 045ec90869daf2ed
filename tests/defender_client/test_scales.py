"""`--scale`: one switch for epochs, images and widths."""

from __future__ import annotations

from pathlib import Path

import pytest
from defender_support import tiny, write_tiny

from defender_client import scales
from defender_client.config import ConfigError, TrainConfig, load_preset, preset_names
from defender_client.stack import specify

OURS = {"demo", "zo-ae-ds", "distil-only"}
PAPER = [name for name in preset_names() if name not in OURS and not name.startswith("recon-")]


def test_full_is_the_paper_s_recipe() -> None:
    for name in PAPER:
        full = load_preset(name)
        assert full.scale == "full"
        if full.estimator.name != "none":
            assert (full.denoiser.architecture, full.denoiser.depth, full.denoiser.width) == ("dncnn", 17, 64)
            assert (full.train.epochs, full.train.steps, full.train.batch) == (600, 0, 256)
            assert full.train.schedule == "paper"
    assert load_preset("zo-ae-ds-rge-q20").train.sgd_lr == 1e-5


@pytest.mark.parametrize("scale", ["smoke", "cpu"])
@pytest.mark.parametrize("name", PAPER)
def test_smaller_scales_change_sizes_and_nothing_of_the_method(name: str, scale: str) -> None:
    images = ["data.dataset=cifar10"]
    full, small = load_preset(name, images), load_preset(name, images, scale)
    assert small.scale == scale
    assert small.estimator == full.estimator
    assert small.sigma == full.sigma
    assert small.autoencoder == full.autoencoder
    assert (small.denoiser.architecture == "none") == (full.denoiser.architecture == "none")
    assert small.certify.n < full.certify.n
    assert small.certify.alpha == full.certify.alpha
    specify(small, (3, 32, 32), 10)


@pytest.mark.parametrize("scale", ["smoke", "cpu", "full"])
def test_images_of_other_sizes_have_a_latent_that_fits(scale: str) -> None:
    digits = load_preset("zo-ae-ds-cge", ["data.dataset=digits"], scale)
    # 64 pixels: noise of 0.25 in each moves an image half as far from its neighbours as in CIFAR-10.
    assert (digits.autoencoder.latent, digits.sigma) == (16, 0.25 if scale == "full" else 0.5)
    stl10 = load_preset("zo-ae-ds-cge", ["data.dataset=stl10"], scale)
    assert stl10.autoencoder.latent == 576
    built = specify(stl10, (3, 96, 96), 10).autoencoder
    assert built is not None
    assert [layer.channels_out for layer in built.encoder if layer.kind == "conv"] == [18, 72, 144, 288, 576]


def test_what_is_set_comes_last() -> None:
    config = load_preset("zo-ae-ds-cge", ["train.batch=7", "certify.n=9"], "cpu")
    assert (config.train.batch, config.certify.n) == (7, 9)
    assert config.denoiser.architecture == "unet"


def test_scales_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="choose one of"):
        load_preset("zo-ae-ds-cge", scale="huge")
    with pytest.raises(ConfigError, match="one size"):
        load_preset("demo", scale="cpu")
    with pytest.raises(ConfigError, match="says itself"):
        load_preset(str(write_tiny(tmp_path)), scale="cpu")
    assert set(scales.names()) == {"smoke", "cpu", "full"}


def test_merging_keeps_what_is_not_named() -> None:
    values = {"a": {"b": 1, "c": {"d": 2}}, "e": 3}
    scales.merge(values, {"a": {"c": {"f": 4}}, "g": {"h": 5}})
    assert values == {"a": {"b": 1, "c": {"d": 2, "f": 4}}, "e": 3, "g": {"h": 5}}


# --- steps in place of epochs ---------------------------------------------------------------------------------------


def test_the_arithmetic_of_steps() -> None:
    whole = TrainConfig(epochs=3, batch=40)  # 100 images: batches of 40, 40 and 20
    assert (whole.batches(100), whole.total_steps(100), whole.total_epochs(100)) == (3, 9, 3)
    assert [whole.samples(steps, 100) for steps in (0, 1, 2, 3, 4, 9)] == [0, 40, 80, 100, 140, 300]
    cut = whole.model_copy(update={"steps": 7})
    assert (cut.total_steps(100), cut.total_epochs(100), cut.samples(7, 100)) == (7, 3, 240)


def test_a_tiny_run_of_steps_is_described(tmp_path: Path) -> None:
    assert tiny(tmp_path, "train.steps=4").train.total_epochs(96) == 2
