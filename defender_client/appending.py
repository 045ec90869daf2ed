"""Files that grow by lines: a kill can leave the last one without its end."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from defender_client.errors import ConfigError


def read_rows(path: Path, *headers: str) -> list[str]:
    """The whole lines after the header, one of these; a last line without its end is left out, and no file is no line.

    Raises:
        ConfigError: the file begins with another line.
    """
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return []
    whole = text[: text.rfind("\n") + 1].splitlines()
    if whole and whole[0] not in headers:
        expected = "' or '".join(headers)
        raise ConfigError(f"{path} does not start with the header '{expected}'")
    return whole[1:]


def drop_torn_line(path: Path) -> None:
    """Cut off a last line without its end, if there is one; a file that does not exist stays so."""
    if path.exists():
        # Cut, not written anew: a kill between the two would cost every line.
        with path.open("rb+") as lines:
            lines.truncate(lines.read().rfind(b"\n") + 1)


def drop_lines_from(path: Path, first: Callable[[bytes], bool]) -> None:
    """Cut off the first line that `first` is true of, with all that follows, and a last line without its end."""
    drop_torn_line(path)
    if path.exists():
        with path.open("rb+") as lines:
            kept = 0
            for line in lines:
                if first(line):
                    break
                kept += len(line)
            lines.truncate(kept)
