"""The images a run uses: splits, order, augmentation, noise."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from defender_client.config import ConfigError, DataConfig
from defender_client.data import check_fit, epoch_order, gaussian, load_splits, load_test
from shared.augmentation import augment
from shared.datasets import DatasetError, ImageSet


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def rows(images: ImageSet) -> list[bytes]:
    return [image.numpy().tobytes() for image in images.images]


def test_the_validation_split_comes_from_the_training_set_and_shares_nothing() -> None:
    config = DataConfig(validation_images=100)
    splits, test = load_splits(config, None, 0), load_test(config, None)
    whole = load_splits(DataConfig(validation_images=0), None, 0).train
    assert len(splits.validation) == 100
    assert sorted(rows(splits.train) + rows(splits.validation)) == sorted(rows(whole))
    # The digits hold no image twice, so that sharing none means being disjoint.
    assert len(set(rows(whole)) | set(rows(test))) == len(whole) + len(test)


def test_splits_depend_on_the_seed_alone() -> None:
    config = DataConfig(validation_images=50, train_images=70)
    first, again, other = (load_splits(config, None, seed) for seed in (1, 1, 2))
    assert torch.equal(first.train.images, again.train.images)
    assert torch.equal(first.validation.labels, again.validation.labels)
    assert not torch.equal(first.validation.images, other.validation.images)
    assert len(first.train) == 70


def test_fewer_training_images_leave_the_validation_split_as_it_is() -> None:
    few, all_ = (load_splits(DataConfig(train_images=count), None, 0) for count in (64, 0))
    assert torch.equal(few.validation.images, all_.validation.images)
    assert torch.equal(few.train.images, all_.train.images[:64])
    assert len(load_splits(DataConfig(train_images=10**6), None, 0).train) == len(all_.train)


def test_what_cannot_be_cut_or_found_is_told(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="validation"):
        load_splits(DataConfig(validation_images=10**6), None, 0)
    with pytest.raises(DatasetError, match="--data"):
        load_splits(DataConfig(dataset="cifar10"), None, 0)
    with pytest.raises(DatasetError):
        load_test(DataConfig(dataset="npz"), tmp_path)


def test_images_that_do_not_fit_the_oracle_are_told() -> None:
    images = load_test(DataConfig(), None)
    check_fit(images, (1, 8, 8))
    with pytest.raises(ConfigError, match=r"\[3, 32, 32\].*\[1, 8, 8\]"):
        check_fit(images, (3, 32, 32))


def test_an_epoch_is_a_permutation_of_its_own() -> None:
    orders = [epoch_order(50, seed, epoch) for seed in (0, 1) for epoch in range(3)]
    assert all(sorted(order.tolist()) == list(range(50)) for order in orders)
    assert len({tuple(order.tolist()) for order in orders}) == 6
    assert torch.equal(epoch_order(50, 1, 2), orders[-1])


def test_flips_mirror_about_half_of_the_images() -> None:
    images = torch.rand(400, 3, 5, 6, generator=seeded())
    flipped = augment(images, "flip", seeded(1))
    mirrored = (flipped == images.flip(3)).flatten(1).all(dim=1)
    same = (flipped == images).flatten(1).all(dim=1)
    assert bool((mirrored ^ same).all())
    assert 150 < int(mirrored.sum()) < 250
    assert torch.equal(augment(images, "flip", seeded(1)), flipped)
    assert augment(images, "none", seeded(1)) is images


def test_crops_are_windows_of_the_padded_image() -> None:
    images = torch.rand(200, 2, 7, 9, generator=seeded())
    cropped = augment(images, "crop-flip", seeded(1))
    assert cropped.shape == images.shape
    padded = torch.nn.functional.pad(images, (4, 4, 4, 4))
    seen = set()
    for image, whole in zip(cropped, padded, strict=True):
        windows = {
            (top, left, flip): whole[:, top : top + 7, left : left + 9]
            for top in range(9)
            for left in range(9)
            for flip in (False, True)
        }
        found = [k for k, w in windows.items() if torch.equal(w.flip(2) if k[2] else w, image)]
        assert found
        seen.add(found[0])
    assert {top for top, _, _ in seen} == {left for _, left, _ in seen} == set(range(9))
    assert {flip for *_, flip in seen} == {False, True}


def test_noise_has_the_spread_asked_for_and_is_the_generator_s() -> None:
    images = torch.full((200, 1, 16, 16), 0.5)
    noise = gaussian(images, 0.25, seeded()) - images
    assert float(noise.std()) == pytest.approx(0.25, rel=0.02)
    assert float(noise.mean()) == pytest.approx(0.0, abs=0.01)
    assert torch.equal(gaussian(images, 0.25, seeded()) - images, noise)
    generator = seeded()
    assert not torch.equal(gaussian(images, 0.25, generator), gaussian(images, 0.25, generator))
