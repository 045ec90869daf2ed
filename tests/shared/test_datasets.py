"""Data sets from files made on the spot: sizes, splits, and what is refused and why."""

from __future__ import annotations

import hashlib
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image

from shared import datasets
from shared.datasets import DatasetError, ImageSet, load, train_validation


def pixels(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def rows(images: ImageSet) -> list[tuple[bytes, int]]:
    return [(x.numpy().tobytes(), int(y)) for x, y in zip(images.images, images.labels, strict=True)]


def check(images: ImageSet, n: int, shape: tuple[int, int, int], classes: int) -> None:
    assert len(images) == n
    assert images.image_shape == shape
    assert images.classes == classes
    assert (images.images.dtype, images.labels.dtype) == (torch.uint8, torch.int64)
    assert images.images.shape == (n, *shape)
    assert images.labels.shape == (n,)
    assert not n or 0 <= images.labels.min() <= images.labels.max() < classes


def disjoint_and_complete(train: ImageSet, test: ImageSet, everything: list[tuple[bytes, int]]) -> None:
    assert sorted(rows(train) + rows(test)) == sorted(everything)
    assert not set(rows(train)) & set(rows(test))


# --- names -------------------------------------------------------------------------------------------------------


def test_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(DatasetError, match="'imagenet'") as caught:
        load("imagenet", None, "train")
    assert all(name in str(caught.value) for name in datasets.NAMES)


@pytest.mark.parametrize("name", [name for name in datasets.NAMES if name != "digits"])
def test_all_but_digits_need_data(name: str) -> None:
    with pytest.raises(DatasetError, match=f"'{name}' needs --data"):
        load(name, None, "train")


@pytest.mark.parametrize("name", ["npz", "folder"])
def test_missing_directory(name: str, tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="no such directory"):
        load(name, tmp_path / "nowhere", "train")


# --- digits ------------------------------------------------------------------------------------------------------


DIGITS_TEST_LABELS = [6, 5, 5, 7, 9, 9, 8, 4, 6, 8, 6, 0]


def test_digits() -> None:
    train, test = load("digits", None, "train"), load("digits", None, "test")
    check(train, 1438, (1, 8, 8), 10)
    check(test, 359, (1, 8, 8), 10)
    assert rows(train) == rows(load("digits", None, "train"))
    assert rows(test) == rows(load("digits", None, "test"))
    # scikit-learn's digits are distinct, so rows tell them apart.
    assert len(set(rows(train) + rows(test))) == 1797
    # The 17 grey levels span the whole range.
    assert (int(train.images.min()), int(train.images.max())) == (0, 255)
    assert len(train.images.unique()) == 17
    # Pinned: another order would move images between training and test.
    assert test.labels[:12].tolist() == DIGITS_TEST_LABELS


def test_floats_and_subset() -> None:
    images = ImageSet(torch.tensor([0, 51, 255], dtype=torch.uint8).reshape(3, 1, 1, 1), torch.tensor([0, 1, 1]), 2)
    assert images.floats(slice(None)).dtype == torch.float32
    torch.testing.assert_close(images.floats(torch.tensor([2, 1])).flatten(), torch.tensor([1.0, 0.2]))
    part = images.subset(torch.tensor([2, 0]))
    assert (part.images.flatten().tolist(), part.labels.tolist(), part.classes) == ([255, 0], [1, 0], 2)


# --- npz ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("tail", "shape"), [((5, 6), (1, 5, 6)), ((5, 6, 1), (1, 5, 6)), ((5, 6, 3), (3, 5, 6))])
def test_npz_with_both_splits(tail: tuple[int, ...], shape: tuple[int, int, int], tmp_path: Path) -> None:
    first, second, test = pixels(4, *tail), pixels(3, *tail, seed=1), pixels(2, *tail, seed=2)
    np.savez(tmp_path / "train-0.npz", images=first, labels=np.array([0, 1, 2, 0]))
    np.savez_compressed(tmp_path / "train-1.npz", images=second, labels=np.array([1, 2, 4], np.uint8))
    np.savez(tmp_path / "test.npz", images=test, labels=np.array([0, 1], np.int16))
    read = load("npz", tmp_path, "train")
    check(read, 7, shape, 5)
    assert read.labels.tolist() == [0, 1, 2, 0, 1, 2, 4]
    channels_last = read.images.permute(0, 2, 3, 1).numpy()
    np.testing.assert_array_equal(channels_last, np.concatenate([first, second]).reshape(channels_last.shape))
    # The test files lack the last classes, yet the number of classes is the whole set's.
    check(load("npz", tmp_path, "test"), 2, shape, 5)


def test_npz_with_one_file(tmp_path: Path) -> None:
    images, labels = pixels(50, 4, 4, 3), np.arange(50) % 3
    np.savez(tmp_path / "all.npz", images=images, labels=labels)
    train, test = load("npz", tmp_path, "train"), load("npz", tmp_path, "test")
    check(train, 40, (3, 4, 4), 3)
    check(test, 10, (3, 4, 4), 3)
    moved = images.transpose(0, 3, 1, 2)
    disjoint_and_complete(train, test, [(x.tobytes(), int(y)) for x, y in zip(moved, labels, strict=True)])
    assert rows(test) == rows(load("npz", tmp_path, "test"))


def test_npz_files_win_over_torchvision_s_name(tmp_path: Path) -> None:
    np.savez(tmp_path / "all.npz", images=pixels(5, 4, 4), labels=np.arange(5))
    check(load("mnist", tmp_path, "train"), 4, (1, 4, 4), 5)


def test_no_npz(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match=r"no \.npz file"):
        load("npz", tmp_path, "train")


GOOD = {"images": pixels(4, 5, 5), "labels": np.arange(4)}
BAD: dict[str, tuple[dict[str, Any], str]] = {
    "no labels": ({"images": GOOD["images"]}, "no array labels"),
    "no images": ({"labels": GOOD["labels"]}, "no array images"),
    "neither": ({"x": GOOD["images"]}, "no array images and labels"),
    "floats": ({**GOOD, "images": np.zeros((4, 5, 5))}, "float64"),
    "two dimensions": ({**GOOD, "images": pixels(4, 25)}, "expected uint8"),
    "five dimensions": ({**GOOD, "images": pixels(4, 1, 5, 5, 3)}, "expected uint8"),
    "channels first": ({**GOOD, "images": pixels(4, 3, 5, 5)}, "expected uint8"),
    "two channels": ({**GOOD, "images": pixels(4, 5, 5, 2)}, "expected uint8"),
    "scalar": ({**GOOD, "images": np.uint8(3)}, "expected uint8"),
    "labels too short": ({**GOOD, "labels": np.arange(3)}, r"expected whole numbers >= 0, \[4\]"),
    "labels one-hot": ({**GOOD, "labels": np.eye(4, dtype=int)}, "expected whole numbers"),
    "labels of floats": ({**GOOD, "labels": np.arange(4.0)}, "expected whole numbers"),
    "labels negative": ({**GOOD, "labels": np.arange(4) - 1}, "expected whole numbers"),
    "labels of bools": ({**GOOD, "labels": np.ones(4, bool)}, "expected whole numbers"),
    "pickled images": ({**GOOD, "images": np.array([pixels(5, 5)] * 4 + [None], object)}, "allow_pickle"),
    "pickled labels": ({**GOOD, "labels": np.array(["a", 1, None, 2], object)}, "allow_pickle"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_arrays(case: str, tmp_path: Path) -> None:
    arrays, said = BAD[case]
    np.savez(tmp_path / "good.npz", **GOOD)
    np.savez(tmp_path / "odd-one.npz", **arrays)
    with pytest.raises(DatasetError, match=said) as caught:
        load("npz", tmp_path, "train")
    assert "odd-one.npz" in str(caught.value)


def _lone_array(path: Path) -> None:
    with path.open("wb") as file:
        np.save(file, GOOD["images"])


def _damaged(path: Path) -> None:
    np.savez_compressed(path, **GOOD)
    whole = bytearray(path.read_bytes())
    whole[60:90] = bytes(30)
    path.write_bytes(whole)


def _cut(path: Path) -> None:
    np.savez(path, **GOOD)
    path.write_bytes(path.read_bytes()[:100])


class _Trap:
    """Unpickling this would show."""

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str]]:
        return pytest.fail, ("a data file was unpickled",)


FILES: dict[str, Callable[[Path], object]] = {
    "empty": lambda path: path.write_bytes(b""),
    "text": lambda path: path.write_text("images, please"),
    "a lone array": _lone_array,
    "cut": _cut,
    "damaged": _damaged,
    "a pickle": lambda path: path.write_bytes(pickle.dumps(_Trap())),
    "a directory": lambda path: path.mkdir(),
}


@pytest.mark.parametrize("case", FILES)
def test_files_that_are_no_npz(case: str, tmp_path: Path) -> None:
    FILES[case](tmp_path / "odd-one.npz")
    with pytest.raises(DatasetError, match=r"odd-one\.npz cannot be read as npz"):
        load("npz", tmp_path, "train")


def test_npz_files_of_different_shapes(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", **GOOD)
    np.savez(tmp_path / "b.npz", images=pixels(4, 6, 5), labels=np.arange(4))
    with pytest.raises(DatasetError, match="differ in image shape"):
        load("npz", tmp_path, "train")


def test_npz_without_images(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", images=pixels(0, 5, 5), labels=np.arange(0))
    with pytest.raises(DatasetError, match="no image"):
        load("npz", tmp_path, "train")


# --- folder ------------------------------------------------------------------------------------------------------


def make_folder(root: Path, counts: dict[str, int], side: tuple[int, int] = (6, 5), seed: int = 0) -> None:
    width, height = side
    for i, (name, count) in enumerate(counts.items()):
        (root / name).mkdir(parents=True)
        for j in range(count):
            Image.fromarray(pixels(height, width, 3, seed=1000 * seed + 100 * i + j)).save(root / name / f"{j:03}.png")


@pytest.mark.parametrize("test_dir", ["test", "val"])
def test_folder_with_both_splits(test_dir: str, tmp_path: Path) -> None:
    make_folder(tmp_path / "train", {"cat": 3, "dog": 2})
    make_folder(tmp_path / test_dir, {"cat": 1, "dog": 2}, seed=1)
    train, test = load("folder", tmp_path, "train"), load("folder", tmp_path, "test")
    check(train, 5, (3, 5, 6), 2)
    check(test, 3, (3, 5, 6), 2)
    assert train.labels.tolist() == [0, 0, 0, 1, 1]
    np.testing.assert_array_equal(train.images[0].permute(1, 2, 0).numpy(), pixels(5, 6, 3, seed=0))
    assert not set(rows(train)) & set(rows(test))


def test_folder_without_splits(tmp_path: Path) -> None:
    make_folder(tmp_path, {"a": 6, "b": 5, "c": 4})
    train, test = load("folder", tmp_path, "train"), load("folder", tmp_path, "test")
    check(train, 12, (3, 5, 6), 3)
    check(test, 3, (3, 5, 6), 3)
    moved = [
        (pixels(5, 6, 3, seed=100 * i + j).transpose(2, 0, 1).tobytes(), i)
        for i, n in enumerate((6, 5, 4))
        for j in range(n)
    ]
    disjoint_and_complete(train, test, moved)


def test_folder_with_train_only(tmp_path: Path) -> None:
    make_folder(tmp_path / "train", {"cat": 6, "dog": 4})
    check(load("folder", tmp_path, "train"), 8, (3, 5, 6), 2)
    check(load("folder", tmp_path, "test"), 2, (3, 5, 6), 2)


def test_folder_splits_number_their_classes_alike(tmp_path: Path) -> None:
    make_folder(tmp_path / "train", {"ant": 1, "bee": 1, "cow": 1})
    make_folder(tmp_path / "test", {"bee": 1, "cow": 2}, seed=1)
    test = load("folder", tmp_path, "test")
    check(test, 3, (3, 5, 6), 3)
    assert test.labels.tolist() == [1, 2, 2]
    assert load("folder", tmp_path, "train").labels.tolist() == [0, 1, 2]


def test_folder_of_different_sizes(tmp_path: Path) -> None:
    make_folder(tmp_path / "train", {"a": 2}, side=(6, 5))
    make_folder(tmp_path / "train", {"b": 2}, side=(9, 9))
    make_folder(tmp_path / "test", {"a": 1, "b": 1}, side=(9, 9))
    with pytest.raises(DatasetError, match="image_size"):
        load("folder", tmp_path, "train")
    check(load("folder", tmp_path, "train", image_size=8), 4, (3, 8, 8), 2)
    # Images that already have the size stay as they are.
    same = load("folder", tmp_path, "test", image_size=9)
    np.testing.assert_array_equal(same.images[0].permute(1, 2, 0).numpy(), pixels(9, 9, 3))


def test_folder_of_grey_images_is_read_in_colour(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    grey = pixels(4, 4)
    for i in range(5):
        Image.fromarray(grey).save(tmp_path / "a" / f"{i}.png")
    train = load("folder", tmp_path, "train")
    check(train, 4, (3, 4, 4), 1)
    np.testing.assert_array_equal(train.images[0].numpy(), np.stack([grey] * 3))


def test_folder_without_classes(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="not an image folder"):
        load("folder", tmp_path, "train")


def test_folder_with_an_empty_class(tmp_path: Path) -> None:
    make_folder(tmp_path, {"a": 2, "b": 0})
    with pytest.raises(DatasetError, match="not an image folder"):
        load("folder", tmp_path, "train")


def test_folder_with_a_broken_image(tmp_path: Path) -> None:
    make_folder(tmp_path, {"a": 2})
    (tmp_path / "a" / "broken.png").write_bytes(b"no image")
    with pytest.raises(DatasetError, match=r"broken\.png cannot be read as an image"):
        load("folder", tmp_path, "train")


# --- validation --------------------------------------------------------------------------------------------------


def test_validation_is_cut_from_training() -> None:
    whole = ImageSet(torch.from_numpy(pixels(30, 1, 4, 4)), torch.arange(30) % 3, 3)
    train, validation = train_validation(whole, 7, seed=5)
    check(train, 23, (1, 4, 4), 3)
    check(validation, 7, (1, 4, 4), 3)
    disjoint_and_complete(train, validation, rows(whole))
    again = train_validation(whole, 7, seed=5)
    assert (rows(again[0]), rows(again[1])) == (rows(train), rows(validation))
    assert rows(train_validation(whole, 7, seed=6)[1]) != rows(validation)


@pytest.mark.parametrize("validation", [0, 29])
def test_validation_s_extremes(validation: int) -> None:
    whole = ImageSet(torch.zeros(30, 1, 2, 2, dtype=torch.uint8), torch.zeros(30, dtype=torch.int64), 1)
    train, cut = train_validation(whole, validation, seed=0)
    assert (len(train), len(cut)) == (30 - validation, validation)


@pytest.mark.parametrize("validation", [-1, 30, 31])
def test_too_many_validation_images(validation: int) -> None:
    whole = ImageSet(torch.zeros(30, 1, 2, 2, dtype=torch.uint8), torch.zeros(30, dtype=torch.int64), 1)
    with pytest.raises(DatasetError, match=f"cannot cut {validation} .* from 30"):
        train_validation(whole, validation, seed=0)


# --- torchvision's, in its own form on disk ----------------------------------------------------------------------


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise RuntimeError("no download in a test")

    for module in ("mnist", "cifar", "stl10"):
        monkeypatch.setattr(f"torchvision.datasets.{module}.download_and_extract_archive", refuse)


def idx(array: np.ndarray) -> bytes:
    """The format of MNIST's files: a magic number of type (8: bytes) and dimensions, sizes, values."""
    return bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">i4").tobytes() + array.tobytes()


@pytest.mark.parametrize(("name", "directory"), [("mnist", "MNIST"), ("fashion-mnist", "FashionMNIST")])
def test_mnist(name: str, directory: str, tmp_path: Path) -> None:
    raw = tmp_path / directory / "raw"
    raw.mkdir(parents=True)
    images = {"train": pixels(6, 28, 28), "t10k": pixels(3, 28, 28, seed=1)}
    labels = {"train": np.array([9, 0, 1, 2, 3, 4], np.uint8), "t10k": np.array([5, 6, 7], np.uint8)}
    for part in images:
        (raw / f"{part}-images-idx3-ubyte").write_bytes(idx(images[part]))
        (raw / f"{part}-labels-idx1-ubyte").write_bytes(idx(labels[part]))
    for split, part in (("train", "train"), ("test", "t10k")):
        read = load(name, tmp_path, split)
        check(read, len(images[part]), (1, 28, 28), 10)
        np.testing.assert_array_equal(read.images[:, 0].numpy(), images[part])
        assert read.labels.tolist() == labels[part].tolist()


def listed(root: Path, *names: str) -> list[list[str]]:
    """torchvision's list of files with their digests, for the files we made."""
    return [[name, hashlib.md5((root / name).read_bytes()).hexdigest()] for name in names]


def test_cifar10(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = tmp_path / "cifar-10-batches-py"
    root.mkdir()
    parts = {f"data_batch_{i}": pixels(2, 3, 32, 32, seed=i) for i in range(1, 6)}
    parts["test_batch"] = pixels(3, 3, 32, 32)
    for i, (name, images) in enumerate(parts.items()):
        labels = [(i + j) % 10 for j in range(len(images))]
        (root / name).write_bytes(pickle.dumps({"data": images.reshape(-1, 3072), "labels": labels}, protocol=2))
    (root / "batches.meta").write_bytes(pickle.dumps({"label_names": list("abcdefghij")}, protocol=2))
    kind = torchvision.datasets.CIFAR10
    monkeypatch.setattr(kind, "train_list", listed(root, *[name for name in parts if name != "test_batch"]))
    monkeypatch.setattr(kind, "test_list", listed(root, "test_batch"))
    monkeypatch.setitem(kind.meta, "md5", listed(root, "batches.meta")[0][1])

    train, test = load("cifar10", tmp_path, "train"), load("cifar10", tmp_path, "test")
    check(train, 10, (3, 32, 32), 10)
    check(test, 3, (3, 32, 32), 10)
    np.testing.assert_array_equal(train.images.numpy(), np.concatenate(list(parts.values())[:5]))
    np.testing.assert_array_equal(test.images.numpy(), parts["test_batch"])
    assert train.labels.tolist() == [0, 1, 1, 2, 2, 3, 3, 4, 4, 5]
    assert train.images.is_contiguous()


def test_stl10(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = tmp_path / "stl10_binary"
    root.mkdir()
    images = {"train": pixels(3, 3, 96, 96), "test": pixels(2, 3, 96, 96, seed=1)}
    labels = {"train": [0, 9, 4], "test": [2, 3]}
    for part in images:
        # Column-major pictures, labels from 1.
        (root / f"{part}_X.bin").write_bytes(images[part].transpose(0, 1, 3, 2).tobytes())
        (root / f"{part}_y.bin").write_bytes(bytes(label + 1 for label in labels[part]))
    (root / "unlabeled_X.bin").write_bytes(b"")
    kind = torchvision.datasets.STL10
    monkeypatch.setattr(kind, "train_list", listed(root, "train_X.bin", "train_y.bin", "unlabeled_X.bin"))
    monkeypatch.setattr(kind, "test_list", listed(root, "test_X.bin", "test_y.bin"))
    for split in ("train", "test"):
        read = load("stl10", tmp_path, split)
        check(read, len(images[split]), (3, 96, 96), 10)
        np.testing.assert_array_equal(read.images.numpy(), images[split])
        assert read.labels.tolist() == labels[split]


@pytest.mark.parametrize("name", datasets.TORCHVISION)
def test_a_download_that_fails(name: str, tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match=f"(?s)could not load '{name}'.*no download"):
        load(name, tmp_path, "train")
