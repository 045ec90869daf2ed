"""`manifest.json` beside an exported stack: what the files hold, where they come from, and the digest of each.

Written by whoever trained the stack, read by whoever serves it. A digest says that a file is the one that was exported,
not by whom: a manifest is not signed.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Annotated, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, PositiveFloat, PositiveInt, ValidationError

from shared.models.stack import Stack, load
from shared.models.weight_files import ModelError
from shared.wire.protocol import Task

MANIFEST_FILE = "manifest.json"
FileName = Literal["stack.safetensors", "stack.pt2", "stack.onnx"]
WEIGHTS: FileName = "stack.safetensors"
FILE_NAMES: tuple[FileName, ...] = get_args(FileName)


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class FileEntry(_Part):
    """One exported file: its size, and its SHA-256 in hexadecimal."""

    bytes: NonNegativeInt
    sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]


class Certification(_Part):
    """How the run was certified, and with what result.

    `accuracy`: certified accuracy by l2 radius (a decimal number), of `images` images. `abstained`: of these.
    """

    method: str
    n0: PositiveInt
    n: PositiveInt
    alpha: float
    images: PositiveInt
    abstained: NonNegativeInt
    accuracy: dict[str, float]


class Manifest(_Part):
    """What was exported.

    Attributes:
        format: of the directory.
        versions: of the programs that wrote it, by name.
        preset, task, seed: of the run.
        image_shape: (c, h, w) of the images that the stack reads and makes, in [0, 1] but for noise.
        classes: k, the values of an answer of the oracle that it was trained for.
        sigma: of the noise that it was trained under and is to be smoothed with, pixels in [0, 1].
        queries: what the run spent, by purpose.
        total_queries: their sum.
        certification: None where the run has none.
        files: by name.
    """

    format: Literal["zo-defense stack 1"] = "zo-defense stack 1"
    versions: dict[str, str]
    preset: str
    task: Task
    seed: int
    image_shape: tuple[PositiveInt, PositiveInt, PositiveInt]
    classes: PositiveInt
    sigma: PositiveFloat
    queries: dict[str, int]
    total_queries: NonNegativeInt
    certification: Certification | None = None
    files: dict[FileName, FileEntry]


def entry_of(path: Path) -> FileEntry:
    """A file's entry."""
    content = path.read_bytes()
    return FileEntry(bytes=len(content), sha256=hashlib.sha256(content).hexdigest())


def read_manifest(path: Path) -> tuple[Manifest, Path]:
    """The manifest in a directory, or in a file, and the directory that it is in.

    Raises:
        ModelError: there is none, or it cannot be read.
    """
    file = path / MANIFEST_FILE if path.is_dir() else path
    try:
        return Manifest.model_validate_json(file.read_bytes()), file.parent
    except OSError as error:
        raise ModelError(f"{file} cannot be read: {error.strerror}; 'defender-client export' writes one") from None
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise ModelError(f"{file} is not the manifest of an exported stack: {where}: {first['msg']}") from None


def load_exported(path: Path) -> tuple[Stack, Manifest]:
    """The stack of an export, in evaluation mode, and its manifest, which it agrees with.

    Args:
        path: the directory, or the manifest in it.

    Raises:
        ModelError: a file is missing, is not the one that the manifest names, or does not hold what the manifest says.
    """
    manifest, folder = read_manifest(path)
    file, expected = folder / WEIGHTS, manifest.files.get(WEIGHTS)
    if expected is None:
        raise ModelError(f"{folder} has no {WEIGHTS} in its manifest: export it with --format safetensors")
    try:
        found = entry_of(file)
    except OSError as error:
        raise ModelError(f"{file} cannot be read: {error.strerror}") from None
    if found != expected:
        raise ModelError(
            f"{file} is not the file that was exported: its SHA-256 is {found.sha256[:16]}... and the manifest has "
            f"{expected.sha256[:16]}...: export it again"
        )
    stack = load(file)
    both = ("image_shape", "classes", "sigma")
    differing = [name for name in both if getattr(stack.spec, name) != getattr(manifest, name)]
    if differing:
        raise ModelError(f"the manifest in {folder} and the stack beside it differ in {', '.join(differing)}")
    return stack, manifest
