"""Weights on disk: safetensors with a header that says how to use them; PyTorch's own files are read too.

Nothing is ever unpickled: `.pt` and `.pth` files are read with `weights_only=True`.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from shared.measurements import Measurement


class ModelError(ValueError):
    """The model cannot be built or loaded as asked; the message says what to change."""


@dataclass(frozen=True)
class WeightsInfo:
    """What a weights file says about itself; None where it says nothing.

    `mean` and `std` are per channel, of images in [0, 1]; `image_size` is the side in pixels. A reconstructor's file
    says `image_shape`, (c, h, w), and `measurement`, what its images are back-projections of.
    """

    model: str | None = None
    channels: int | None = None
    image_size: int | None = None
    classes: int | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    command: str | None = None
    image_shape: tuple[int, int, int] | None = None
    measurement: Measurement | None = None

    def header(self) -> dict[str, str]:
        """As safetensors keeps it: text by name, values in JSON."""
        return {name: json.dumps(value, default=_fields) for name, value in asdict(self).items() if value is not None}

    @staticmethod
    def from_header(header: Mapping[str, str]) -> WeightsInfo:
        """Read a header; fields that are not ours are ignored.

        Raises:
            ModelError: a field of ours does not hold what it should.
        """
        values: dict[str, Any] = {}
        for field in fields(WeightsInfo):
            if field.name not in header:
                continue
            try:
                value = json.loads(header[field.name])
                if field.name in ("mean", "std"):
                    value = tuple(float(x) for x in value)
                elif field.name in ("channels", "image_size", "classes"):
                    value = int(value)
                elif field.name == "image_shape":
                    value = _image_shape(value)
                elif field.name == "measurement":
                    value = Measurement.model_validate(value)
            except (TypeError, ValueError):
                raise ModelError(f"the weights' header has a '{field.name}' that cannot be read") from None
            values[field.name] = value
        return WeightsInfo(**values)


def _fields(value: BaseModel) -> dict[str, Any]:
    return value.model_dump()


def _image_shape(value: Any) -> tuple[int, int, int]:
    channels, height, width = (int(x) for x in value)
    if min(channels, height, width) < 1:
        raise ValueError
    return channels, height, width


def write_weights(path: Path, state: Mapping[str, Tensor], info: WeightsInfo) -> None:
    """Write a state dict and its header, atomically: the file is the old one or the new one, never half of one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(descriptor)
    try:
        save_file(
            {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}, temporary, info.header()
        )
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def read_weights(path: Path) -> tuple[dict[str, Tensor], WeightsInfo]:
    """A state dict and what the file says about it.

    Args:
        path: `.safetensors`, or `.pt` / `.pth` holding a state dict, perhaps under 'state_dict' or 'model', perhaps
            with names that start with 'module.'.

    Raises:
        ModelError: no such file, or one that cannot be read as weights.
    """
    if not path.is_file():
        raise ModelError(f"there is no weights file {path}")
    if path.suffix == ".safetensors":
        return _read_safetensors(path)
    if path.suffix in (".pt", ".pth"):
        return _read_torch(path), WeightsInfo()
    raise ModelError(f"{path}: weights are read from .safetensors, .pt and .pth files")


def _read_safetensors(path: Path) -> tuple[dict[str, Tensor], WeightsInfo]:
    try:
        with safe_open(str(path), framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, WeightsInfo.from_header(file.metadata() or {})  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise ModelError(f"{path} cannot be read as safetensors: {error}") from error


def _read_torch(path: Path) -> dict[str, Tensor]:
    try:
        loaded: Any = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch promises no particular type for a file that is not one of its own
        reason = str(error).strip().split("\n")[0]
        raise ModelError(f"{path} cannot be read as a file of tensors: {reason}") from error
    for name in ("state_dict", "model"):
        if isinstance(loaded, Mapping) and isinstance(loaded.get(name), Mapping):
            loaded = loaded[name]
    if not isinstance(loaded, Mapping) or not loaded or not all(isinstance(x, Tensor) for x in loaded.values()):
        raise ModelError(f"{path} holds no state dict (a mapping from names to tensors)")
    return {str(name).removeprefix("module."): tensor for name, tensor in loaded.items()}
