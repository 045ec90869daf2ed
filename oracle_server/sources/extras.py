"""Packages that only some sources need, imported when such a source is asked for."""

from __future__ import annotations

import importlib
from types import ModuleType

from shared.models.weight_files import ModelError


def need(package: str, extra: str, what: str) -> ModuleType:
    """Import an optional package.

    Args:
        package: its name.
        extra: which of zo-defense's extras brings it.
        what: what is in need of it, as the user named it.

    Raises:
        ModelError: it is not installed; the message says how to install it.
    """
    try:
        return importlib.import_module(package)
    except ImportError as error:
        missing = error.name or package
        raise ModelError(
            f"{what} needs the package '{missing}', which is not installed: pip install 'zo-defense[{extra}]'"
        ) from error
