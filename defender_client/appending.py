"""Files that grow by lines: a kill can leave the last one without its end."""

from __future__ import annotations

from pathlib import Path


def drop_torn_line(path: Path) -> None:
    """Cut off a last line without its end, if there is one; a file that does not exist stays so."""
    if path.exists():
        # Cut, not written anew: a kill between the two would cost every line.
        with path.open("rb+") as lines:
            lines.truncate(lines.read().rfind(b"\n") + 1)
