"""A run's stack for other programs: weights as data, a torch program, an ONNX file, and a manifest that names them.

    stack.safetensors    the stack as data: what `oracle-server serve --defence` reads
    stack.pt2            torch.export's program, for torch.export.load. Load it only if you trust where it comes from:
                         torch unpickles parts of such files
    stack.onnx           for ONNX Runtime and others
    manifest.json        versions, shapes, sigma, what was spent, certified accuracy, and each file's digest

Each maps images float32 [n, c, h, w], n >= 1, in [0, 1] or with noise beyond, to the images [n, c, h, w] in [0, 1] that
the classifier is asked about in their place.
"""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal, get_args

import torch

from defender_client.config import ConfigError
from defender_client.report import RADII, Result, read_run
from defender_client.stack import Stack
from defender_client.stack import save as save_stack
from shared.models.manifest import (
    FILE_NAMES,
    MANIFEST_FILE,
    WEIGHTS,
    Certification,
    FileEntry,
    FileName,
    Manifest,
    entry_of,
)
from shared.models.onnx_export import NotExportable, to_onnx
from shared.version import VERSION

Format = Literal["safetensors", "torch-export", "onnx"]
FORMATS: tuple[Format, ...] = get_args(Format)


def export_stack(run: Path, out: Path, formats: Sequence[str] = FORMATS) -> Manifest:
    """Write a run's stack and its manifest; costs no query.

    Files of an export that stood in `out` before are replaced, and those of formats not asked for removed. The manifest
    is written last: where there is one, the files are those that it names.

    Args:
        run: the run's directory.
        out: where to.
        formats: some of `FORMATS`.

    Raises:
        ConfigError: no run, or none that was trained; an unknown format, or one whose package is not installed.
    """
    unknown = [name for name in formats if name not in FORMATS]
    if unknown or not formats:
        raise ConfigError(f"--format {''.join(unknown[:1])}: choose from {', '.join(FORMATS)}")
    result = read_run(run)
    if result.stack is None:
        raise ConfigError(f"{run} has no stack yet: start it with `train`")
    out.mkdir(parents=True, exist_ok=True)
    (out / MANIFEST_FILE).unlink(missing_ok=True)
    for name in FILE_NAMES:
        (out / name).unlink(missing_ok=True)
    files: dict[FileName, FileEntry] = {}
    for known in FORMATS:
        if known in formats:
            name, write = _WRITERS[known]
            write(result.stack, out / name)
            files[name] = entry_of(out / name)
    manifest = _manifest(result, result.stack, files)
    _replace(out / MANIFEST_FILE, (manifest.model_dump_json(indent=2) + "\n").encode())
    return manifest


def _write_program(stack: Stack, path: Path) -> None:
    example = torch.zeros(2, *stack.spec.image_shape)
    rows = {"images": {0: torch.export.Dim("n", min=1)}}
    with torch.no_grad():
        program = torch.export.export(stack, (example,), dynamic_shapes=rows)
    program.example_inputs = None  # they would be pickled, and the program does not need them
    torch.export.save(program, file := io.BytesIO())
    _replace(path, file.getvalue())


def _write_onnx(stack: Stack, path: Path) -> None:
    try:
        content = to_onnx(stack, stack.spec.image_shape, patient=True)
    except NotExportable as error:
        raise ConfigError(f"--format onnx: {error}") from None
    _replace(path, content)


_WRITERS: dict[Format, tuple[FileName, Callable[[Stack, Path], None]]] = {
    "safetensors": (WEIGHTS, save_stack),
    "torch-export": ("stack.pt2", _write_program),
    "onnx": ("stack.onnx", _write_onnx),
}


def _manifest(result: Result, stack: Stack, files: dict[FileName, FileEntry]) -> Manifest:
    spec, config = stack.spec, result.config
    return Manifest(
        versions={"zo-defense": VERSION, "torch": str(torch.__version__)},
        preset=config.preset,
        task=config.task,
        seed=config.seed,
        image_shape=spec.image_shape,
        classes=spec.classes,
        sigma=spec.sigma,
        queries=result.queries,
        total_queries=sum(result.queries.values()),
        certification=_certification(result),
        files=files,
    )


def _certification(result: Result) -> Certification | None:
    if not result.rows:
        return None
    settings = result.certification
    accuracies = zip(RADII, result.table_row["accuracy"], strict=True)
    return Certification(
        method=settings.method,
        n0=settings.n0,
        n=settings.n,
        alpha=settings.alpha,
        images=len(result.rows),
        abstained=sum(row.predict == -1 for row in result.rows),
        accuracy={f"{radius:g}": accuracy for radius, accuracy in accuracies if accuracy is not None},
    )


def _replace(path: Path, content: bytes) -> None:
    """Write a file whole or not at all."""
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
