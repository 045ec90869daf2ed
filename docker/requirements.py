"""Splits pyproject's dependencies into what both images need and what each needs beside it, a file each.

A stage of its own runs this, so that only a change of the dependencies themselves installs them again.
"""

from __future__ import annotations

import sys
import tomllib
from pathlib import Path

IMAGES = {"server": ("server", "postgres", "onnxruntime"), "client": ("client",)}  # image -> the extras it holds


def main(pyproject: Path, out: Path) -> None:
    """Write `common.txt`, and one `IMAGE.txt` for each of `IMAGES`, into `out`."""
    project = tomllib.loads(pyproject.read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    images = {image: [line for extra in names for line in extras[extra]] for image, names in IMAGES.items()}
    for name, requirements in {"common": project["dependencies"], **images}.items():
        (out / f"{name}.txt").write_text("".join(f"{line}\n" for line in requirements), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
