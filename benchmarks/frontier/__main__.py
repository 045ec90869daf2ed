"""The command: `python -m benchmarks.frontier`; see the package."""

from __future__ import annotations

import argparse

import benchmarks.frontier
from benchmarks.frontier.variants import BY_NAME
from benchmarks.table.options import parse, parser

SCALES = ["smoke", "cpu", "full"]
DIGITS = (750, 1_500, 3_000, 6_000, 12_500, 25_000, 50_000, 100_000, 200_000, 400_000)


def options() -> argparse.Namespace:
    made = parser("benchmarks.frontier", benchmarks.frontier.__doc__, SCALES, seeds=[0, 1, 2])
    made.add_argument("--budgets", type=int, nargs="+", default=list(DIGITS), help="Training queries.")
    made.add_argument(
        "--samples",
        type=int,
        nargs=2,
        default=[300, 17_000],
        metavar=("LEAST", "MOST"),
        help="Budgets that buy a variant fewer or more training samples than these are left out for it.",
    )
    made.add_argument("--variants", nargs="+", choices=list(BY_NAME), default=list(BY_NAME), metavar="NAME")
    return parse(made)


if __name__ == "__main__":
    from shared.process import prepare

    prepare()
    from benchmarks.frontier.making import make_frontier

    make_frontier(options())
