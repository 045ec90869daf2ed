"""A module as ONNX, for any number of rows."""

from __future__ import annotations

import io
import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

INPUT, OUTPUT = "images", "answers"


class NotExportable(Exception):
    """The module cannot be written as ONNX: the message says why."""


def to_onnx(module: nn.Module, shape: Sequence[int], *, patient: bool) -> bytes:
    """The file of a module in evaluation mode: `images` [n, *shape] -> `answers` [n, ...], float32.

    Args:
        shape: of one image.
        patient: where the tracing exporter fails, try the one that takes many seconds.

    Raises:
        NotExportable: a package is missing, or the module has what ONNX cannot say.
    """
    try:
        import onnx  # noqa: F401, what torch exports with
    except ImportError as error:
        raise NotExportable(
            f"the package '{error.name}' is not installed: pip install 'zo-defense[onnxruntime]'"
        ) from error
    example = torch.zeros(2, *shape)
    export: Any = torch.onnx.export  # annotated for paths only, but it writes to files that are open as well
    names: dict[str, Any] = {"input_names": [INPUT], "output_names": [OUTPUT], "verbose": False}
    file = io.BytesIO()
    with _quiet(), torch.no_grad():
        try:
            axes = {INPUT: {0: "n"}, OUTPUT: {0: "n"}}
            export(module, (example,), file, dynamo=False, dynamic_axes=axes, **names)
            return file.getvalue()
        except Exception as error:  # the exporter runs the module's own code: anything may come
            if not patient:
                raise NotExportable(f"it cannot be exported by tracing: {_first_line(error)}") from error
        try:
            rows = ({0: torch.export.Dim("n", min=1)},)
            program = export(module, (example,), dynamo=True, dynamic_shapes=rows, **names)
            program.save(file := io.BytesIO())
            return file.getvalue()
        except Exception as error:
            raise NotExportable(f"it cannot be exported to ONNX: {_first_line(error)}") from error


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the exporters' advice to whoever wrote the model, and without a fused attention that ONNX cannot say."""
    exporter, attention = logging.getLogger("torch.onnx"), torch.backends.mha.get_fastpath_enabled()
    level = exporter.level
    exporter.setLevel(logging.CRITICAL)
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        exporter.setLevel(level)
        torch.backends.mha.set_fastpath_enabled(attention)
