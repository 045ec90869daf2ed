"""A classifier that is a callable in this process, asked as any other oracle is."""

from __future__ import annotations

import importlib
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from defender_client.endpoint import PythonEndpoint
from defender_client.errors import ConfigError
from defender_client.oracle import OracleInfo
from defender_client.paying import Paying
from defender_client.presenting import as_scores, laid_out
from shared.wire.errors import OracleError


class CallableFailed(OracleError):
    """The callable raised an error; what it was asked is paid."""

    code, title = "callable-failed", "The oracle's callable failed"


class ForeignCallable:
    """An `Asker` for a callable; one thread at a time calls it.

    `shape` and `classes` come from the description, or from attributes of that name which the callable has.

    Args:
        endpoint: the description.

    Raises:
        ConfigError: there is no such callable, or nothing says its shape and classes.
    """

    def __init__(self, endpoint: PythonEndpoint) -> None:
        self._endpoint, self._lock = endpoint, threading.Lock()
        self._function = _found(endpoint.callable)
        shape = endpoint.shape or getattr(self._function, "shape", None)
        classes = endpoint.classes or getattr(self._function, "classes", None)
        if shape is None or classes is None:
            raise ConfigError(
                f"{endpoint.name}: say what it takes and answers by --endpoint shape=[C,H,W] --endpoint classes=K "
                "(or by attributes `shape` and `classes` of the callable)"
            )
        self.info = OracleInfo(image_shape=shape, classes=classes, max_rows=endpoint.rows, scores=endpoint.scores)

    def scores(self, images: NDArray[np.float32], paying: Paying) -> NDArray[np.float32]:
        """See `Asker`."""
        said = self._endpoint
        values = laid_out(images, said.layout or "nchw", "FP32", said.mean, said.std)
        # What the callable does to its images must not reach those that are asked about again.
        values = values.copy() if np.shares_memory(values, images) else values
        with self._lock, paying.attempt() as attempt:
            try:
                answer = np.asarray(self._function(values))
            except Exception as error:
                raise CallableFailed(f"{said.name}: {type(error).__name__}: {error}") from error
            attempt.answered = True
        return as_scores(answer, len(images), self.info.classes, self.info.scores)

    def stop_waiting(self) -> None:
        """A callable is not waited for by a timer."""

    def close(self) -> None:
        """There is nothing to close."""


def _found(name: str) -> Callable[[NDArray[np.float32]], Any]:
    module, _, path = name.partition(":")
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)
    try:
        found: Any = importlib.import_module(module)
        for part in path.split("."):
            found = getattr(found, part)
    except ImportError as error:
        raise ConfigError(f"python:{name}: {error}") from None
    except AttributeError:
        raise ConfigError(f"python:{name}: module {module} has no '{path}'") from None
    if not callable(found):
        raise ConfigError(f"python:{name} is not a callable")
    return found  # type: ignore[no-any-return]
