"""ONNX Runtime: the fastest here on a CPU, where it is installed (extra `onnxruntime`)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from oracle_server.engines.candidate import NotACandidate, first_line
from oracle_server.engines.engine import Compute
from oracle_server.onnx_session import open_session
from shared.models.onnx_export import INPUT, NotExportable, to_onnx


def onnxruntime(module: nn.Module, shape: Sequence[int], *, patient: bool) -> Compute:
    """The module exported to ONNX, in a session whose kernels use one thread: each of ours runs it by itself.

    Args:
        shape: of one image.
        patient: where the tracing exporter fails, try the one that takes many seconds.

    Raises:
        NotACandidate: the packages are not there, or the module cannot be exported.
    """
    try:
        import onnxruntime  # noqa: F401
    except ImportError as error:
        raise NotACandidate(
            f"the package '{error.name}' is not installed: pip install 'zo-defense[onnxruntime]'"
        ) from error
    try:
        model = to_onnx(module, shape, patient=patient)
    except NotExportable as error:
        raise NotACandidate(str(error)) from error
    try:
        session = open_session(model)
    except Exception as error:  # onnxruntime's exceptions have no base of their own
        raise NotACandidate(f"ONNX Runtime cannot load what torch exported: {first_line(error)}") from error

    def compute(rows: Tensor) -> Tensor:
        return torch.from_numpy(session.run(None, {INPUT: rows.numpy()})[0])

    return compute
