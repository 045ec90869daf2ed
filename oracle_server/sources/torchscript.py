"""A TorchScript file. It is a program in a language of its own: see SECURITY.md before serving one of a stranger."""

from __future__ import annotations

import warnings
import zipfile
from pathlib import Path

import torch
from torch import Tensor, nn

from oracle_server.sources.network import Network
from oracle_server.sources.program import Program, check_file, file_digest
from shared.models.weight_files import ModelError


class _Interpreted(nn.Module):
    """A script, as written. TorchScript's optimiser rewrites a program after its first calls, shape by shape, and bits
    that were verified at start would not be those of later answers."""

    def __init__(self, script: nn.Module) -> None:
        super().__init__()
        self.script = script

    def forward(self, images: Tensor) -> Tensor:
        with torch.jit.optimized_execution(False):  # type: ignore[attr-defined]  # of this thread alone
            answers: Tensor = self.script(images)
        return answers


def load_torchscript(path: Path, weights: str | None) -> Network:
    """The program in a file of `torch.jit.save`.

    Raises:
        ModelError: no such file, or not TorchScript.
    """
    check_file(path, weights)
    if not _is_script(path):
        raise ModelError(
            f"{path} is no TorchScript program: if it holds weights, name their architecture as --model and give the "
            "file as --weights"
        )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # that torch.jit is on its way out: whoever exported knows
            script = torch.jit.load(path, map_location="cpu")
    except Exception as error:  # torch promises no particular type
        raise ModelError(f"{path} cannot be read as TorchScript: {str(error).strip().splitlines()[0]}") from error
    if hasattr(script, "training"):  # frozen programs have no mode
        script.eval()
    return Network(Program(_Interpreted(script), file_digest(path)), bound="eager", files=(path,))


def _is_script(path: Path) -> bool:
    try:
        with zipfile.ZipFile(path) as archive:
            return any("/code/" in name for name in archive.namelist())
    except (OSError, zipfile.BadZipFile):
        return False
