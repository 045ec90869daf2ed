"""The command: `python -m benchmarks.table`; see the package."""

from __future__ import annotations

import argparse

import benchmarks.table
from benchmarks.table.columns import BY_PRESET
from benchmarks.table.options import parse, parser

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
    made = parser("benchmarks.table", benchmarks.table.__doc__, list(RETRAINING), seeds=[0])
    made.add_argument("--columns", nargs="+", choices=list(BY_PRESET), default=list(BY_PRESET), metavar="PRESET")
    made.add_argument("--equal-queries", type=int, default=0, metavar="N", help="Training queries of each ZO column.")
    made.add_argument("--equal-seeds", type=int, nargs="+", help="Seeds at equal queries; by default --seeds.")
    made.add_argument("--equal-only", action="store_true", help="Leave the table itself out.")
    made.add_argument("--pretrain-seed", type=int, help="Of one pre-training for all seeds.")
    return parse(made)


if __name__ == "__main__":
    from shared.process import prepare

    prepare()
    from benchmarks.table.making import make_table

    make_table(options(), RETRAINING)
