"""What the commands that make many runs have in common on their command lines."""

from __future__ import annotations

import argparse
from pathlib import Path


def parser(command: str, description: str | None, scales: list[str], seeds: list[int]) -> argparse.ArgumentParser:
    """A parser of the common options; `seeds` are the default."""
    form = argparse.RawDescriptionHelpFormatter
    made = argparse.ArgumentParser(f"python -m {command}", description=description, formatter_class=form)
    made.add_argument("--out", type=Path, required=True, help="Everything goes here; what is in it is gone on with.")
    made.add_argument("--dataset", default="digits")
    made.add_argument("--data", type=Path, help="Directory of the data set's files; not needed for digits.")
    made.add_argument("--model", default="digits-cnn", help="What the oracle hides.")
    made.add_argument("--weights", type=Path, help="Its weights; not needed for digits-cnn.")
    made.add_argument("--scale", choices=scales, default="cpu")
    made.add_argument("--seeds", type=int, nargs="+", default=seeds)
    made.add_argument("--images", type=int, help="Certified images; by default as the scale says.")
    made.add_argument("--n", type=int, help="Draws an image; by default as the scale says.")
    made.add_argument("--set", action="append", default=[], dest="settings", metavar="KEY=VALUE", help="In every run.")
    return made


def parse(made: argparse.ArgumentParser) -> argparse.Namespace:
    """The options as given; paths are made absolute, for other programs read them elsewhere."""
    made.add_argument("--serve-options", nargs=argparse.REMAINDER, default=[], help="More of `oracle-server serve`.")
    found = made.parse_args()
    for name in ("out", "data", "weights"):
        path = getattr(found, name)
        setattr(found, name, None if path is None else path.resolve())
    return found
