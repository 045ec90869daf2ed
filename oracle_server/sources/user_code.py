"""`module:function`: a network that the operator's own code makes. It is run, with all that the server may do."""

from __future__ import annotations

import importlib
import os
import sys
from pathlib import Path

from torch import nn

from oracle_server.sources.network import Network
from shared.models.loading import fill
from shared.models.weight_files import ModelError, read_weights


def load_code(name: str, weights: str | None) -> Network:
    """What a function without arguments returns, with the weights of a file if one is given.

    Modules are looked for where Python looks, PYTHONPATH included, and last in the working directory.

    Raises:
        ModelError: there is no such module or function, it fails, or it gives no `torch.nn.Module`.
    """
    module_name, _, function_name = name.partition(":")
    here = os.getcwd()
    if here not in sys.path:
        sys.path.append(here)  # last: a file in the working directory must not stand in for a package
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            raise ModelError(f"'{name}': {module_name} needs a module that is not there: {error.name}") from error
        raise ModelError(
            f"'{name}': there is no module {error.name}, neither in the working directory nor on PYTHONPATH"
        ) from error
    except Exception as error:  # the user's own code: anything may come
        raise ModelError(f"'{name}': importing {module_name} failed: {_said(error)}") from error
    function = getattr(module, function_name, None)
    if not callable(function):
        raise ModelError(f"'{name}': {module_name} has no function {function_name}")
    try:
        network = function()
    except Exception as error:
        raise ModelError(f"'{name}' failed: {_said(error)}; it is called without arguments") from error
    if not isinstance(network, nn.Module):
        raise ModelError(f"'{name}' gives {type(network).__name__}: it must return a torch.nn.Module")
    files: tuple[Path, ...] = ()
    if weights is not None:
        fill(network, read_weights(Path(weights))[0])
        files = (Path(weights),)
    # Its code is in no state dict: what was measured of it yesterday may be of another network.
    return Network(network.cpu().float(), remembered=False, files=files)


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0]
