"""ONNX Runtime: the fastest here on a CPU, where it is installed (extra `onnxruntime`)."""

from __future__ import annotations

import io
import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from oracle_server.engines.candidate import NotACandidate, first_line
from oracle_server.engines.engine import Compute
from oracle_server.onnx_session import open_session


def onnxruntime(module: nn.Module, shape: Sequence[int], *, patient: bool) -> Compute:
    """The module exported to ONNX, in a session whose kernels use one thread: each of ours runs it by itself.

    Args:
        shape: of one image.
        patient: where the tracing exporter fails, try the one that takes many seconds.

    Raises:
        NotACandidate: the packages are not there, or the module cannot be exported.
    """
    try:
        import onnx  # noqa: F401, what torch exports with
        import onnxruntime  # noqa: F401
    except ImportError as error:
        raise NotACandidate(
            f"the package '{error.name}' is not installed: pip install 'zo-defense[onnxruntime]'"
        ) from error
    model = _export(module, shape, patient)
    try:
        session = open_session(model)
    except Exception as error:  # onnxruntime's exceptions have no base of their own
        raise NotACandidate(f"ONNX Runtime cannot load what torch exported: {first_line(error)}") from error

    def compute(rows: Tensor) -> Tensor:
        return torch.from_numpy(session.run(None, {"images": rows.numpy()})[0])

    return compute


def _export(module: nn.Module, shape: Sequence[int], patient: bool) -> bytes:
    example = torch.zeros(2, *shape)
    export: Any = torch.onnx.export  # annotated for paths only, but it writes to files that are open as well
    names: dict[str, Any] = {"input_names": ["images"], "output_names": ["answers"], "verbose": False}
    file = io.BytesIO()
    with _quiet(), torch.no_grad():
        try:
            axes = {"images": {0: "n"}, "answers": {0: "n"}}
            export(module, (example,), file, dynamo=False, dynamic_axes=axes, **names)
            return file.getvalue()
        except Exception as error:  # the exporter runs the module's own code: anything may come
            if not patient:
                raise NotACandidate(f"it cannot be exported by tracing: {first_line(error)}") from error
        try:
            rows = ({0: torch.export.Dim("n", min=1)},)
            program = export(module, (example,), dynamo=True, dynamic_shapes=rows, **names)
            program.save(file := io.BytesIO())
            return file.getvalue()
        except Exception as error:
            raise NotACandidate(f"it cannot be exported to ONNX: {first_line(error)}") from error


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
