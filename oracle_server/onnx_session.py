"""ONNX Runtime's sessions, as every part of the server opens them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

_ERRORS_ONLY = 3


def open_session(model: bytes | Path) -> Any:
    """A session on the CPU whose kernels use the calling thread alone; several threads may run it.

    Raises:
        ImportError: onnxruntime is not installed.
        Exception: what ONNX Runtime raises of a model that it cannot load; its exceptions have no base of their own.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.log_severity_level = _ERRORS_ONLY
    given = model if isinstance(model, bytes) else str(model)
    return onnxruntime.InferenceSession(given, options, providers=["CPUExecutionProvider"])
