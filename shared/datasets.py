"""Images and labels by name: `digits` (embedded), torchvision's, npz files, an image folder.

Every source becomes an `ImageSet`: uint8 images [n, c, h, w], int64 labels [n]. Nothing is downloaded for `digits`, npz
and folders; torchvision's sets are downloaded into `--data DIR` once. Where a source has no split of its own, a fixed
fifth of its images is the test set.
"""

from __future__ import annotations

import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

Split = Literal["train", "test"]
TORCHVISION = {"mnist": "MNIST", "fashion-mnist": "FashionMNIST", "cifar10": "CIFAR10", "stl10": "STL10"}
NAMES = ("digits", *TORCHVISION, "npz", "folder")
_SPLIT_SEED = 0
_TEST_FRACTION = 0.2
_TRAIN_DIRS, _TEST_DIRS = ("train",), ("test", "val")


class DatasetError(ValueError):
    """The data cannot be used as it is; the message says what to change."""


@dataclass(frozen=True)
class ImageSet:
    """Images uint8 [n, c, h, w] (0..255 stands for [0, 1]) and labels int64 [n] in 0..classes-1."""

    images: Tensor
    labels: Tensor
    classes: int

    def __len__(self) -> int:
        return len(self.images)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(c, h, w)."""
        _, c, h, w = self.images.shape
        return c, h, w

    def floats(self, index: Tensor | slice) -> Tensor:
        """Images at `index` as float32 [b, c, h, w] in [0, 1]."""
        return self.images[index].float() / 255.0

    def subset(self, index: Tensor | slice) -> ImageSet:
        """The same set with the images at `index` only."""
        return ImageSet(self.images[index], self.labels[index], self.classes)


def load(name: str, data: Path | None, split: Split, *, image_size: int | None = None) -> ImageSet:
    """A data set by name.

    Args:
        name: one of `NAMES`.
        data: directory of the files; needed for all but `digits`. A directory with `*.npz` files is read as such
            whatever `name` says.
        split: `train` or `test`.
        image_size: side to which images of a folder are resized (needed where they differ in size).

    Raises:
        DatasetError: unknown name, missing or unreadable files.
    """
    if name not in NAMES:
        raise DatasetError(f"no data set is called '{name}': choose one of {', '.join(NAMES)}")
    if name == "digits":
        return _digits(split)
    if data is None:
        raise DatasetError(f"data set '{name}' needs --data DIR")
    if name in TORCHVISION and not any(data.glob("*.npz")):
        return _torchvision(name, data, split)
    if not data.is_dir():
        raise DatasetError(f"--data {data}: no such directory")
    if name == "folder":
        return _folder(data, split, image_size)
    return _npz(data, split)


def train_validation(train: ImageSet, validation: int, seed: int) -> tuple[ImageSet, ImageSet]:
    """Cut a validation split of `validation` images from the training set, the same for the same seed.

    Raises:
        DatasetError: no image would be left to train on.
    """
    if not 0 <= validation < len(train):
        raise DatasetError(f"cannot cut {validation} validation images from {len(train)} training images")
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(seed))
    return train.subset(order[validation:]), train.subset(order[:validation])


def _fifth(images: Tensor, labels: Tensor, classes: int, split: Split) -> ImageSet:
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(_SPLIT_SEED))
    cut = round(len(images) * _TEST_FRACTION)
    index = order[:cut] if split == "test" else order[cut:]
    return ImageSet(images[index], labels[index], classes)


def _digits(split: Split) -> ImageSet:
    from sklearn.datasets import load_digits

    digits = load_digits()
    # scikit-learn's digits have 17 grey levels, 0..16.
    images = torch.from_numpy(np.rint(digits.images * (255 / 16)).astype(np.uint8)).unsqueeze(1)
    return _fifth(images, torch.from_numpy(digits.target.astype(np.int64)), 10, split)


def _torchvision(name: str, data: Path, split: Split) -> ImageSet:
    import torchvision

    kind: Any = getattr(torchvision.datasets, TORCHVISION[name])
    chosen: dict[str, Any] = {"split": split} if name == "stl10" else {"train": split == "train"}
    try:
        source = kind(root=str(data), download=True, **chosen)
    except (OSError, RuntimeError) as error:
        raise DatasetError(f"torchvision could not load '{name}' from {data}: {error}") from error
    images = torch.as_tensor(np.asarray(source.data))
    labels = source.labels if name == "stl10" else source.targets
    if name == "cifar10":
        images = images.permute(0, 3, 1, 2)
    elif images.ndim == 3:
        images = images.unsqueeze(1)
    return ImageSet(images.contiguous(), torch.as_tensor(np.asarray(labels), dtype=torch.int64), 10)


def _npz(data: Path, split: Split) -> ImageSet:
    files = sorted(data.glob("*.npz"))
    if not files:
        raise DatasetError(f"{data} holds no .npz file: expected arrays 'images' (uint8) and 'labels' (int)")
    train = [path for path in files if path.name.startswith("train")]
    test = [path for path in files if path not in train]
    if train and test:
        chosen = train if split == "train" else test
        images, labels = _read_npz(chosen)
        # Both splits must agree on the number of classes even if one of them lacks the last class.
        classes = max(int(labels.max()), int(_read_npz(test if split == "train" else train)[1].max())) + 1
        return ImageSet(images, labels, classes)
    images, labels = _read_npz(files)
    return _fifth(images, labels, int(labels.max()) + 1, split)


def _read_npz(files: list[Path]) -> tuple[Tensor, Tensor]:
    images, labels = [], []
    for path in files:
        try:
            with np.load(path, allow_pickle=False) as arrays:
                missing = {"images", "labels"} - set(arrays.files)
                if missing:
                    raise DatasetError(f"{path.name} has no array {' and '.join(sorted(missing))}")
                x, y = arrays["images"], arrays["labels"]
        except DatasetError:
            raise
        except (OSError, ValueError, TypeError, EOFError, zipfile.BadZipFile, zlib.error) as error:
            # A lone .npy array under this name has no `with` (TypeError); a cut or damaged archive is one of the rest.
            raise DatasetError(f"{path.name} cannot be read as npz: {error}") from error
        if x.dtype != np.uint8 or x.ndim not in (3, 4) or (x.ndim == 4 and x.shape[3] not in (1, 3)):
            raise DatasetError(
                f"{path.name}: 'images' is {x.dtype} {list(x.shape)}; expected uint8 [n, h, w] or [n, h, w, 1 or 3]"
            )
        if y.shape != (len(x),) or y.dtype.kind not in "iu" or (len(y) and y.min() < 0):
            raise DatasetError(
                f"{path.name}: 'labels' is {y.dtype} {list(y.shape)}; expected whole numbers >= 0, [{len(x)}]"
            )
        images.append(np.ascontiguousarray(x[:, None] if x.ndim == 3 else x.transpose(0, 3, 1, 2)))
        labels.append(y.astype(np.int64))
    if len({x.shape[1:] for x in images}) > 1:
        raise DatasetError(f"the npz files differ in image shape: {sorted({x.shape[1:] for x in images})}")
    if not sum(len(x) for x in images):
        raise DatasetError("the npz files hold no image")
    return torch.from_numpy(np.concatenate(images)), torch.from_numpy(np.concatenate(labels))


def _folder(data: Path, split: Split, image_size: int | None) -> ImageSet:
    from PIL import Image, UnidentifiedImageError
    from torchvision.datasets import ImageFolder
    from torchvision.datasets.folder import find_classes

    parts = {
        part: next((data / d for d in dirs if (data / d).is_dir()), None)
        for part, dirs in (("train", _TRAIN_DIRS), ("test", _TEST_DIRS))
    }
    own = parts["train"] is not None and parts["test"] is not None
    # A lone `train` is where the images are, not a class of that name.
    root = (parts[split] if own else parts["train"]) or data
    try:
        source = ImageFolder(str(root))
        # Numbered over both splits: else a class that only one of them has would shift the labels of the other.
        classes = sorted(
            {name for part in parts.values() if part for name in find_classes(str(part))[0]} if own else source.classes
        )
    except (FileNotFoundError, OSError) as error:
        raise DatasetError(f"{root} is not an image folder (one sub-folder per class): {error}") from error
    images = []
    for path, _ in source.samples:
        try:
            with Image.open(path) as opened:
                image = opened.convert("RGB")
        except (OSError, UnidentifiedImageError) as error:
            raise DatasetError(f"{path} cannot be read as an image: {error}") from error
        if image_size is not None and image.size != (image_size, image_size):
            image = image.resize((image_size, image_size), Image.Resampling.BILINEAR)
        images.append(np.asarray(image).transpose(2, 0, 1))
    sizes = {x.shape for x in images}
    if len(sizes) > 1:
        raise DatasetError("the images of the folder differ in size: give an image size (image_size) to resize them to")
    stacked = torch.from_numpy(np.stack(images))
    number = [classes.index(name) for name in source.classes]
    labels = torch.tensor([number[label] for _, label in source.samples], dtype=torch.int64)
    if own:
        return ImageSet(stacked, labels, len(classes))
    return _fifth(stacked, labels, len(classes), split)
