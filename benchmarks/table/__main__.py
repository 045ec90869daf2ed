"""The command: `python -m benchmarks.table`; see the package."""

from __future__ import annotations

import argparse
from pathlib import Path

import benchmarks.table
from benchmarks.table.columns import BY_PRESET

# How long the classifier of the column RS is retrained, by scale and data set: the table's part of `scales.toml`.
RETRAINING = {
    "smoke": {"digits": ["--epochs", "1"], "*": ["--epochs", "1"]},
    "cpu": {
        "digits": ["--epochs", "30"],
        "*": ["--epochs", "1", "--lr", "0.001", "--batch", "128", "--augment", "flip", "--validation", "1000"],
    },
    "full": {
        "digits": ["--epochs", "60"],
        "*": ["--epochs", "90", "--lr", "0.003", "--batch", "256", "--augment", "crop-flip", "--validation", "1000"],
    },
}


def options() -> argparse.Namespace:
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        "python -m benchmarks.table", description=benchmarks.table.__doc__, formatter_class=form
    )
    parser.add_argument("--out", type=Path, required=True, help="Everything goes here; a table in it is gone on with.")
    parser.add_argument("--dataset", default="digits")
    parser.add_argument("--data", type=Path, help="Directory of the data set's files; not needed for digits.")
    parser.add_argument("--model", default="digits-cnn", help="What the oracle hides.")
    parser.add_argument("--weights", type=Path, help="Its weights; not needed for digits-cnn.")
    parser.add_argument("--scale", choices=list(RETRAINING), default="cpu")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--columns", nargs="+", choices=list(BY_PRESET), default=list(BY_PRESET), metavar="PRESET")
    parser.add_argument("--images", type=int, help="Certified images; by default as the scale says.")
    parser.add_argument("--n", type=int, help="Draws an image; by default as the scale says.")
    parser.add_argument("--equal-queries", type=int, default=0, metavar="N", help="Training queries of each ZO column.")
    parser.add_argument("--equal-seeds", type=int, nargs="+", help="Seeds at equal queries; by default --seeds.")
    parser.add_argument("--equal-only", action="store_true", help="Leave the table itself out.")
    parser.add_argument("--pretrain-seed", type=int, help="Of one pre-training for all seeds.")
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
    from benchmarks.table.making import make_table

    make_table(options(), RETRAINING)
