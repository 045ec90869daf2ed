"""Handing an API key over in a file that only its owner and group may read."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

DEFAULT_MODE = 0o640


class KeyFileError(Exception):
    """The key file cannot be written."""


@contextmanager
def key_file(path: Path, mode: int = DEFAULT_MODE) -> Iterator[Callable[[str], object]]:
    """Yields what writes the key; at the end the file is there, whole, and with its mode from the first moment.

    The file is made before the key is, because a key that cannot be kept is lost: it is shown once. An older file of
    the same name is replaced.

    Raises:
        KeyFileError: the directory cannot be made or written to.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    except OSError as error:
        raise KeyFileError(f"cannot write the key file {path}: {error.strerror}") from error
    try:
        with os.fdopen(descriptor, "w") as file:
            os.fchmod(file.fileno(), mode)
            yield lambda key: file.write(f"{key}\n")
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
