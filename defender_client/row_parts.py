"""Rows of one file that several ranks make: each writes a part, and rank 0 sets them into the file in their order.

    certified.tsv          rows in the order of the images, as one process writes them
    certified-rank1.tsv    rows of rank 1, as they come; gone once the file has them all

A row that a part has is done, wherever the ranks were killed: whoever comes next, several ranks or one process, goes on
from there. One process without parts writes straight into the file.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import torch

from defender_client.appending import drop_torn_line, read_rows
from defender_client.ranks import Ranks


def parts_of(path: Path) -> list[Path]:
    """The parts that there are of a file of rows."""
    return sorted(path.parent.glob(f"{path.stem}-rank*{path.suffix}"))


class SharedRows:
    """The file `path` and its parts, whose lines begin with the number of an image and a tab.

    Args:
        path: of the file.
        header: its first line, and that of its parts.
        indices: of the images to be done, rising.
        done: those that the file has.
        ranks: who makes the rows; all of them make one of these.

    Attributes:
        todo: the images that are this rank's to do.
        from_parts: whether rows come from elsewhere too.

    Raises:
        ConfigError: a part begins with another header.
    """

    def __init__(self, path: Path, header: str, indices: Sequence[int], done: Iterable[int], ranks: Ranks) -> None:
        self._path, self._header, self._ranks = path, header, ranks
        known = set(done)
        self._left = [index for index in indices if index not in known]  # to be set into the file
        self.from_parts = not ranks.alone or bool(parts_of(path))
        path.parent.mkdir(parents=True, exist_ok=True)
        # One look at the parts, for all: others may begin to write while a rank has not yet looked.
        left = torch.tensor([index for index in self._left if index not in self._pending()], dtype=torch.int64)
        self.todo: list[int] = ranks.told(lambda: {"left": left})[0]["left"].tolist()[ranks.rank :: ranks.size]

    @contextmanager
    def opened(self) -> Iterator[SharedRows]:
        """Rows may be written until the block ends, which for rank 0 is when all ranks' rows are in the file."""
        own = self._path.with_name(self._part(self._ranks.rank)) if self.from_parts else self._path
        with self._appended(own) as file:
            self._own = file
            yield self
            if self.from_parts:
                self._ranks.any(False)  # all have written theirs
                self._merge()
        if self._ranks.leads and self.from_parts and not self._pending():
            for part in parts_of(self._path):
                part.unlink()
        self._ranks.any(False)  # nobody reads the file before it is whole

    def write(self, line: str) -> None:
        """Add this rank's next row; it is on disk when this returns, and in the file, once all before it are."""
        self._own.write(line + "\n")
        self._own.flush()
        if self.from_parts:
            self._merge()

    def _merge(self) -> None:
        """Rank 0: set what parts have, and the file has not, into the file, as far as nothing is missing before it."""
        if not self._ranks.leads:
            return
        pending = self._pending()
        with self._appended(self._path) as file:
            while self._left and self._left[0] in pending:
                file.write(pending[self._left[0]] + "\n")
                file.flush()
                del self._left[0]

    def _pending(self) -> dict[int, str]:
        """Lines that parts have and the file has not, by image."""
        lines = [line for part in parts_of(self._path) for line in read_rows(part, self._header)]
        waited_for = set(self._left)
        found = {int(line.partition("\t")[0]): line for line in lines}
        return {index: line for index, line in found.items() if index in waited_for}

    def _part(self, rank: int) -> str:
        return f"{self._path.stem}-rank{rank}{self._path.suffix}"

    @contextmanager
    def _appended(self, path: Path) -> Iterator[IO[str]]:
        """The file, whose last line is whole, to add lines to."""
        drop_torn_line(path)
        with path.open("a", encoding="utf-8") as file:
            if file.tell() == 0:
                file.write(self._header + "\n")
                file.flush()
            yield file
