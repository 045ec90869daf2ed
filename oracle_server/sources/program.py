"""A program that somebody else compiled, as a module: asked about as many images at once as it can take."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Self

import torch
from torch import Tensor, nn

from shared.models.weight_files import ModelError


class Program(nn.Module):
    """Images [n, ...] -> answers [n, k] of a program that takes from `least` to `most` images; n >= 1.

    More are given to it in pieces, fewer with zeros beside them, whose answers are dropped. A program has one mode,
    the one it was exported in.

    Args:
        program: takes [m, ...], least <= m <= most.
        digest: of all that it was read from; a program's own text is in no state dict.
        most: None where there is no limit.
    """

    def __init__(self, program: nn.Module, digest: str, least: int = 1, most: int | None = None) -> None:
        super().__init__()
        self.program = program
        self.digest = digest
        self.least, self.most = least, most

    def forward(self, images: Tensor) -> Tensor:
        pieces = [images] if self.most is None else images.split(self.most)
        answers = [self._piece(piece) for piece in pieces]
        return answers[0] if len(answers) == 1 else torch.cat(answers)

    def _piece(self, images: Tensor) -> Tensor:
        rows = len(images)
        if rows < self.least:
            images = torch.cat([images, images.new_zeros(self.least - rows, *images.shape[1:])])
        answers = self.program(images)
        if not isinstance(answers, Tensor):
            raise ModelError(
                f"the program answers with {_described(answers)}: export one that gives one tensor, logits"
            )
        return answers[:rows]

    def train(self, mode: bool = True) -> Self:
        """Only note it: exported programs refuse to change, and a frozen one cannot say in which mode it is."""
        self.training = mode
        return self

    def extra_repr(self) -> str:
        return f"sha256={self.digest}, least={self.least}, most={self.most}"


def file_digest(*paths: Path) -> str:
    """SHA-256 of files one after the other, hexadecimal."""
    digest = hashlib.sha256()
    for path in paths:
        with path.open("rb") as file:
            while chunk := file.read(2**20):
                digest.update(chunk)
    return digest.hexdigest()


def check_file(path: Path, weights: str | None) -> None:
    """Raise `ModelError` unless there is a file, and no weights beside those it holds."""
    if not path.is_file():
        raise ModelError(f"there is no file {path}")
    if weights is not None:
        raise ModelError(f"{path} holds its weights: leave out --weights")


def _described(answers: object) -> str:
    if isinstance(answers, dict):
        return f"tensors by name ({', '.join(map(str, answers))})"
    if isinstance(answers, (tuple, list)):
        return f"{len(answers)} values"
    return type(answers).__name__
