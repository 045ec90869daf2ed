"""The command: `python -m benchmarks.frontier`; see the package."""

from __future__ import annotations

import argparse
from pathlib import Path

import benchmarks.frontier
from benchmarks.frontier.variants import BY_NAME

DIGITS = (12_500, 25_000, 50_000, 100_000, 200_000)


def options() -> argparse.Namespace:
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        "python -m benchmarks.frontier", description=benchmarks.frontier.__doc__, formatter_class=form
    )
    parser.add_argument("--out", type=Path, required=True, help="Everything goes here; what is in it is gone on with.")
    parser.add_argument("--dataset", default="digits")
    parser.add_argument("--data", type=Path, help="Directory of the data set's files; not needed for digits.")
    parser.add_argument("--model", default="digits-cnn", help="What the oracle hides.")
    parser.add_argument("--weights", type=Path, help="Its weights; not needed for digits-cnn.")
    parser.add_argument("--scale", default="cpu")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--budgets", type=int, nargs="+", default=list(DIGITS), help="Training queries.")
    parser.add_argument("--variants", nargs="+", choices=list(BY_NAME), default=list(BY_NAME), metavar="NAME")
    parser.add_argument("--images", type=int, help="Certified images; by default as the scale says.")
    parser.add_argument("--n", type=int, help="Draws an image; by default as the scale says.")
    parser.add_argument(
        "--set", action="append", default=[], dest="settings", metavar="KEY=VALUE", help="In every run."
    )
    parser.add_argument("--serve-options", nargs=argparse.REMAINDER, default=[], help="More of `oracle-server serve`.")
    found = parser.parse_args()
    for name in ("out", "data", "weights"):  # other programs read them, elsewhere
        path = getattr(found, name)
        setattr(found, name, None if path is None else path.resolve())
    return found


if __name__ == "__main__":
    from shared.process import prepare

    prepare()
    from benchmarks.frontier.making import make_frontier

    make_frontier(options())
